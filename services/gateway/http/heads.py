"""The head of a request: request line and fields, read strictly.

The request line and what the fields mean for the framing are decided here; httptools (llhttp) takes the fields apart. Of llhttp 9 by
itself (httptools 0.9), tried: it has no limits on sizes and counts; takes no, several or nonsensical ``Host`` fields; a
``Transfer-Encoding`` in HTTP/1.0, and ``gzip, chunked``; HTTP/0.9, RTSP and ICE request lines, WebDAV's and others' methods; several
spaces between method and target, ``#`` and other targets than paths; any number of empty lines before a request.

References
----------
RFC 9110 (HTTP semantics), RFC 9112 (HTTP/1.1), sections named below.
"""

import re
from http import HTTPStatus
from typing import Any

import httptools

from libs.errors import MillraceError
from services.gateway.settings import HttpSettings

METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")}
"""Methods that are known; ``CONNECT`` is for proxies."""

ONCE = frozenset(
    {
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"expect",
        b"host",
        b"inference-header-content-length",
        b"last-event-id",
        b"origin",
        b"prefer",
        b"transfer-encoding",
        b"x-api-key",
        b"x-goog-api-key",
        b"x-request-id",
        b"x-request-timeout-ms",
    }
)
"""Fields that decide framing, identity or routing: sent twice, two readers could see two requests. ``traceparent`` decides none of
these: two are joined, which makes one that cannot be read, and a new trace begins (W3C Trace Context, 3.2)."""

MAX_REPEATED_BYTES = 2_048
"""A head of up to so many bytes is kept, to be recognised when it comes again; a longer one would make an idle connection dear."""

_TEXT = bytes(byte for byte in range(256) if byte == 0x09 or 0x20 <= byte != 0x7F)
_USUAL_LINE = re.compile(rb"([A-Z]++) (/[\x21\x22\x24-\x7e]*+) HTTP/1\.([01])\r\n")
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([^ ]++) HTTP/([0-9])\.([0-9])")
_TARGET = re.compile(rb"[\x21\x22\x24-\x7e]++")
_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)([/?].*)?", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._~%!$&'()*+;=-]{1,255})(?::[0-9]{0,5})?")
_LENGTH = re.compile(rb"[0-9]++")
_MAX_LENGTH_DIGITS = 18
_NO_TEXT = "the request is not valid HTTP: its head has control characters, or lines that do not end in CRLF"
_CHUNKED = -1

_TITLED = (
    b"Host Content-Length Content-Type Content-Encoding Transfer-Encoding Connection Accept Accept-Encoding Accept-Language Authorization "
    b"User-Agent Cookie Expect Origin Referer Traceparent Tracestate Prefer X-Request-Id X-Request-Timeout-Ms X-Forwarded-For "
    b"Inference-Header-Content-Length"
).split()
_LOWER = {spelling: name.lower() for name in _TITLED for spelling in (name, name.lower())}
"""Names as they are mostly sent: one object for all heads that are kept."""


class RefusedError(MillraceError):
    """What the server itself refuses; the connection closes after the answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Head:
    """The head of a request that may be answered.

    Attributes
    ----------
    raw
        Its bytes with the empty line.
    size_bytes
        How many bytes it took.
    content_length
        Length of the body in bytes: 0 when there is none, -1 when it is chunked.
    memo
        The application's own, see ``Exchange.head``.
    """

    __slots__ = (
        "content_length",
        "expects_continue",
        "headers",
        "http_version",
        "is_keep_alive",
        "memo",
        "method",
        "query",
        "raw",
        "raw_path",
        "size_bytes",
    )

    def __init__(self, raw: bytes, method: str, target: bytes, http_version: str, headers: dict[bytes, bytes]) -> None:
        self.size_bytes = len(raw)
        self.raw = raw
        self.method = method
        self.raw_path, _, self.query = target.partition(b"?")
        self.http_version = http_version
        self.headers = headers
        self.content_length = _content_length(headers, http_version)
        self.is_keep_alive = _is_keep_alive(headers, http_version)
        self.expects_continue = _expects_continue(headers, http_version)
        self.memo: Any = None

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return self.content_length == _CHUNKED


class _Fields:
    """What httptools calls back: fields by lower-case name, and those whose name had come before."""

    __slots__ = ("headers", "repeated")

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.repeated: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        name = _LOWER.get(name) or name.lower()
        if name in self.headers:
            self.repeated.append((name, value))
        else:
            self.headers[name] = value


def parse_head(raw: bytes, limits: HttpSettings) -> Head:
    """Read a head; ``raw`` ends with its empty line and may begin with one (RFC 9112, 2.2).

    Raises
    ------
    RefusedError
        It is malformed, ambiguous, over a limit, or wants what this server does not do.
    """
    if len(raw) > limits.max_head_bytes:
        raise _too_large(raw, limits)
    begin = 2 if raw.startswith(b"\r\n") else 0
    usual = _USUAL_LINE.match(raw, begin)
    if usual is not None and usual.end() <= limits.max_target_bytes and usual[1] in METHODS:
        method, target, version = METHODS[usual[1]], usual[2], "1.1" if usual[3] == b"1" else "1.0"
    else:
        method, target, version = parse_request_line(raw[begin : raw.index(b"\r\n", begin)], limits)
    headers = _headers(raw, raw.count(b"\n") - 2 - begin // 2, limits)
    return Head(raw, method, _origin_form(target, headers, version), version, headers)


def parse_request_line(line: bytes, limits: HttpSettings) -> tuple[str, bytes, str]:
    """Method, target and version ("1.0" or "1.1").

    Raises
    ------
    RefusedError
        As ``parse_head``.
    """
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP: its first line is not 'METHOD /path HTTP/1.1'")
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in b"01":
        raise RefusedError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{major.decode()}.{minor.decode()} is not spoken here; HTTP/1.1 is")
    if len(target) > limits.max_target_bytes:
        raise RefusedError(HTTPStatus.REQUEST_URI_TOO_LONG, f"the URL is longer than the {limits.max_target_bytes} bytes accepted")
    if not _TARGET.fullmatch(target):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the request target has '#' or characters that must be percent-encoded")
    if method not in METHODS:
        raise RefusedError(
            HTTPStatus.NOT_IMPLEMENTED, f"the method {method.decode('ascii')} is not known; methods are in capitals, like GET and POST"
        )
    return METHODS[method], target, "1.1" if minor == b"1" else "1.0"


def check_partial(buffer: bytes | bytearray, start: int, limits: HttpSettings) -> None:
    """Refuse a head that cannot become a good one, before its end has come; ``start``: the bytes before were looked at already.

    Raises
    ------
    RefusedError
        As ``parse_head``.
    """
    if len(buffer) > limits.max_head_bytes:
        raise _too_large(buffer, limits)
    begin = 2 if buffer.startswith(b"\r\n") else 0
    new = buffer[max(start - 1, begin) :]
    if start > begin:
        new = new.removeprefix(b"\n")
    rest = new.translate(None, _TEXT).replace(b"\r\n", b"")
    if rest and not (rest == b"\r" and new.endswith(b"\r")):
        raise RefusedError(HTTPStatus.BAD_REQUEST, _NO_TEXT)
    end = buffer.find(b"\r\n", begin)
    if end < 0:
        if len(buffer) > limits.max_target_bytes + 64:
            raise _too_large(buffer, limits)
    elif end + 2 > start:
        parse_request_line(bytes(buffer[begin:end]), limits)


def _too_large(raw: bytes | bytearray, limits: HttpSettings) -> RefusedError:
    end = raw.find(b"\r\n", 2)
    if end < 0 or end > limits.max_target_bytes + 64:
        return RefusedError(HTTPStatus.REQUEST_URI_TOO_LONG, f"the URL is longer than the {limits.max_target_bytes} bytes accepted")
    return RefusedError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request head is larger than the {limits.max_head_bytes} bytes accepted"
    )


def _headers(raw: bytes, count: int, limits: HttpSettings) -> dict[bytes, bytes]:
    if count > limits.max_headers:
        raise RefusedError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request has more than the {limits.max_headers} header fields accepted"
        )
    fields = _Fields()
    try:
        httptools.HttpRequestParser(fields).feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # an upgrade is an offer that may be passed over (RFC 9110, 7.8)
    except httptools.HttpParserError as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"the request is not valid HTTP: {error}") from None
    headers = fields.headers
    if len(headers) + len(fields.repeated) != count:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP: its head has a line that is no header field")
    if b" \r\n" in raw or b"\t\r\n" in raw:
        headers.update([(name, value.rstrip(b" \t")) for name, value in headers.items()])
    for name, value in fields.repeated:
        headers[name] = _joined(name, headers[name], value.rstrip(b" \t"))
    if len(raw) > limits.max_header_bytes and any(len(name) + len(value) > limits.max_header_bytes for name, value in headers.items()):
        raise RefusedError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a header field is longer than the {limits.max_header_bytes} bytes accepted"
        )
    return headers


def _joined(name: bytes, first: bytes, second: bytes) -> bytes:
    if name in ONCE:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"the header field {name.decode('ascii')} was sent more than once")
    return first + (b"; " if name == b"cookie" else b", ") + second


def _origin_form(target: bytes, headers: dict[bytes, bytes], http_version: str) -> bytes:
    """The target as path and query; an absolute one must name the same authority as ``Host`` (RFC 9112, 3.2)."""
    host = headers.get(b"host")
    if host is None and http_version == "1.1":
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the request has no host header")
    if host is not None and not _HOST.fullmatch(host):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the host header is not a host name or address with an optional port")
    if target.startswith(b"/"):
        return target
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the request target does not begin with '/'")
    authority, path = match.groups()
    if host is not None and authority.lower() != host.lower():
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the request target and the host header name different hosts")
    if not path:
        return b"/"
    return path if path.startswith(b"/") else b"/" + path


def _content_length(headers: dict[bytes, bytes], http_version: str) -> int:
    """Length of the body (RFC 9112, 6.3); -1: chunked."""
    coding = headers.get(b"transfer-encoding")
    length = headers.get(b"content-length")
    if coding is not None:
        if length is not None:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the request has both content-length and transfer-encoding")
        if http_version == "1.0":
            raise RefusedError(HTTPStatus.BAD_REQUEST, "HTTP/1.0 has no transfer-encoding")
        if coding.lower() != b"chunked":
            raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, "the only transfer-encoding accepted is chunked")
        return _CHUNKED
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "content-length is not a number")
    if len(length) > _MAX_LENGTH_DIGITS:
        raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "content-length is larger than any body accepted")
    return int(length)


def _is_keep_alive(headers: dict[bytes, bytes], http_version: str) -> bool:
    value = headers.get(b"connection")
    if value is None:
        return http_version == "1.1"
    options = {option.strip() for option in value.lower().split(b",")}
    return b"close" not in options and (http_version == "1.1" or b"keep-alive" in options)


def _expects_continue(headers: dict[bytes, bytes], http_version: str) -> bool:
    expectation = headers.get(b"expect")
    if expectation is None or http_version == "1.0":
        return False
    if expectation.lower() != b"100-continue":
        raise RefusedError(HTTPStatus.EXPECTATION_FAILED, "the only expectation that can be met is 100-continue")
    return True
