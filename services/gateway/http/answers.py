"""Answers as bytes."""

import random
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import orjson

from services.gateway.http.exchange import Header

BUG = "something went wrong in the gateway; its log tells more under this request's x-request-id"

KEEP = b"\r\n"
KEEP_1_0 = b"connection: keep-alive\r\n\r\n"
CLOSE = b"connection: close\r\n\r\n"
"""How a head ends: what becomes of the connection."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

WITHOUT_BODY = frozenset({204, 304})
JSON = (b"content-type", b"application/json")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b""


STATUS_LINES = {status: b"HTTP/1.1 %d %b\r\n" % (status, _phrase(status)) for status in range(200, 600)}
_BEGINNINGS = {status: line + b"content-length: " for status, line in STATUS_LINES.items()}


def head_of(status: int, headers: Sequence[Header], length: int, ending: bytes) -> bytes:
    """The head of an answer whose body has ``length`` bytes.

    Raises
    ------
    ValueError
        A header has a line break: it would be read as another header.
    """
    fields = rendered(headers)
    if status in WITHOUT_BODY:
        return STATUS_LINES[status] + fields + ending
    return b"%b%d\r\n%b%b" % (_BEGINNINGS[status], length, fields, ending)


def rendered(headers: Sequence[Header]) -> bytes:
    """Header fields as they are written; raises as ``head_of``."""
    fields = b"".join([b"%b: %b\r\n" % header for header in headers])
    if fields.count(b"\n") != len(headers) or fields.count(b"\r") != len(headers):
        raise ValueError(f"a header of an answer has a line break: {headers!r}")
    return fields


def error_body(message: str) -> bytes:
    """``{"error": sentence}``."""
    return orjson.dumps({"error": message})


def ending(http_version: str, stays_open: bool) -> bytes:
    """How the head of an answer ends."""
    if not stays_open:
        return CLOSE
    return KEEP if http_version == "1.1" else KEEP_1_0


def given_request_id(headers: Mapping[bytes, bytes]) -> str | None:
    """The caller's ``x-request-id``, if it is one that may be repeated."""
    given = headers.get(b"x-request-id")
    return given.decode("latin-1") if given is not None and _REQUEST_ID.fullmatch(given) else None


def request_id_for(headers: Mapping[bytes, bytes]) -> str:
    """The id of a request that the server answers by itself: the caller's, else a new one."""
    return given_request_id(headers) or f"{random.getrandbits(128):032x}"


def own_headers(status: int, request_id: str) -> tuple[Header, ...]:
    """The headers of an error that the server itself answers."""
    headers = (JSON, (b"x-request-id", request_id.encode()))
    return (*headers, (b"retry-after", b"1")) if status == HTTPStatus.SERVICE_UNAVAILABLE else headers
