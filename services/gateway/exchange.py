"""One HTTP request and its answer, without a framework."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

from libs.errors import PayloadTooLargeError

Headers = Mapping[bytes, bytes]

TOLD = "millrace.error"
"""Key of an ASGI scope under which an application leaves the error that it answered, for the log and the trace."""


@dataclass(slots=True)
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


@dataclass(slots=True)
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
