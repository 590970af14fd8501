"""One HTTP request and its answer, without a framework."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

from libs.errors import InvalidArgumentError, MillraceError, PayloadTooLargeError
from services.gateway.errors import MethodNotAllowedError

Headers = Mapping[bytes, bytes]

TOLD = "millrace.error"
"""Key of an ASGI scope under which an application leaves the error that it answered, for the log and the trace."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request: the parameters of its path, its headers (lower-case names), its body,
    the query as it stands in the request line, the id that the answer carries, and who asks."""

    parameters: Mapping[str, str]
    headers: Headers
    body: bytes | bytearray = b""
    query: bytes = b""
    request_id: str = ""
    principal: str = "local"

    def header(self, name: bytes) -> str | None:
        """A header as text."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An answer; the headers are those beside length and type."""

    body: bytes
    status: int = 200
    media_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())

    async def send(self, send: Send) -> None:
        """Send the whole answer."""
        headers = [(b"content-type", self.media_type), (b"content-length", b"%d" % len(self.body)), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def json_answer(content: Any, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Outgoing:
    """An answer in JSON."""
    return Outgoing(orjson.dumps(content), status, headers=headers)


def error_answer(error: MillraceError) -> Outgoing:
    """What an error is in HTTP: its status and ``{"error": sentence}``."""
    headers: list[tuple[bytes, bytes]] = []
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    if error.retryable:
        headers.append((b"retry-after", b"1"))
    return json_answer({"error": error.message}, int(error.http_status), tuple(headers))


async def read_body(receive: Receive, headers: Headers, max_bytes: int) -> bytearray:
    """The whole body of a request.

    Raises
    ------
    PayloadTooLargeError
        It is, or says it is, larger than ``max_bytes``.
    ClientDisconnect
        The client went away before the end.
    """
    if content_length(headers) > max_bytes:
        raise PayloadTooLargeError(f"the request body is larger than the {max_bytes} bytes accepted")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise PayloadTooLargeError(f"the request body is larger than the {max_bytes} bytes accepted")
        if not message.get("more_body", False):
            return body


def content_length(headers: Headers) -> int:
    """What the header says; 0 when it says nothing."""
    value = headers.get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0


def decompressed(body: bytes | bytearray, encoding: str | None, max_bytes: int) -> bytes | bytearray:
    """The body as it was before ``Content-Encoding`` (gzip, or deflate, which means a zlib stream).

    Raises
    ------
    InvalidArgumentError
        Another encoding, or a body that is not in it.
    PayloadTooLargeError
        It grows beyond ``max_bytes``.
    """
    if encoding is None or encoding.strip().lower() in ("", "identity"):
        return body
    window = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}.get(encoding.strip().lower())
    if window is None:
        raise InvalidArgumentError(f"content-encoding {encoding[:40]!r} is not supported; gzip and deflate are")
    stream = zlib.decompressobj(window)
    try:
        content = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise InvalidArgumentError(f"the request body is not {encoding.strip().lower()} data: {error}") from error
    if len(content) > max_bytes:
        raise PayloadTooLargeError(f"the decompressed request body is larger than the {max_bytes} bytes accepted")
    if not stream.eof:
        raise InvalidArgumentError(f"the request body is not complete {encoding.strip().lower()} data")
    return content
