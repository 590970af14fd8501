"""One request run through an ASGI application, both bodies streaming."""

import asyncio
import logging
from collections.abc import MutableMapping
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from services.gateway.http import answers
from services.gateway.http.exchange import AsgiApp, Exchange, Header, Link

log = logging.getLogger(__name__)

BUFFER_BYTES = 262_144
"""When so much of a body waits for the application, reading pauses."""

_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding"})
_DISCONNECT = "http.disconnect"


class StreamLink(Link, Protocol):
    """The connection, as far as streaming needs it."""

    @property
    def is_write_paused(self) -> bool: ...

    def stays_open(self, exchange: Exchange) -> bool: ...

    def say_continue(self) -> None: ...

    def update_reading(self) -> None: ...

    def write(self, data: bytes) -> None: ...

    def end_answer(self, exchange: Exchange, stays: bool) -> None: ...

    def abort(self) -> None: ...


class AsgiRun:
    """``receive`` and ``send`` of one request, and the task that runs the application.

    Attributes
    ----------
    has_started
        Whether a part of the answer has been written.
    awaits_continue
        Whether the client sends the body only when told to, which it has not been.
    """

    __slots__ = (
        "_exchange",
        "_is_chunked",
        "_is_ended",
        "_is_gone",
        "_is_received",
        "_is_whole",
        "_left_bytes",
        "_link",
        "_pieces",
        "_readable",
        "_stays",
        "_top",
        "_waiting_bytes",
        "_writable",
        "awaits_continue",
        "has_started",
    )

    def __init__(self, link: StreamLink, exchange: Exchange, *, is_whole: bool, awaits_continue: bool) -> None:
        self._link = link
        self._exchange = exchange
        self._pieces: list[bytes | bytearray] = [exchange.body] if exchange.body else []
        self._waiting_bytes = len(exchange.body)
        self._is_whole = is_whole
        self._is_received = False
        self.awaits_continue = awaits_continue
        self._is_gone = False
        self._is_ended = False
        self._is_chunked = False
        self._left_bytes: int | None = None
        self._stays = False
        self._top = b""
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self.has_started = False

    @property
    def is_full(self) -> bool:
        """Whether more of the body would be too much for now."""
        return self._waiting_bytes >= BUFFER_BYTES and not self._is_ended

    async def run(self, app: AsgiApp) -> None:
        """Run the application to its end."""
        try:
            await app(self._scope(), self.receive, self.send)
        except asyncio.CancelledError:
            self._break_off(answers.request_id_for(self._exchange.headers))
            raise
        except Exception as error:  # noqa: BLE001 - logged there
            self._fail("a bug: the application failed at %s %s", error)
        else:
            if not self._is_ended and not self._is_gone:
                self._fail("a bug: the application did not finish its answer to %s %s", None)

    def feed(self, content: bytes, is_whole: bool) -> None:
        """More of the body has come."""
        self.awaits_continue = False
        if content and not self._is_ended:
            self._pieces.append(content)
            self._waiting_bytes += len(content)
        self._is_whole = is_whole
        _set(self._readable)

    def disconnect(self) -> None:
        """The client is gone, or is treated as if it were."""
        self._is_gone = True
        _set(self._readable)
        _set(self._writable)

    def wake(self) -> None:
        """The client has taken enough of the answer for more to be written."""
        _set(self._writable)

    async def receive(self) -> MutableMapping[str, Any]:
        """ASGI's ``receive``."""
        if self.awaits_continue and not self._is_gone:
            self.awaits_continue = False
            self._link.say_continue()
        while not (self._is_gone or self._is_ended or self._pieces or (self._is_whole and not self._is_received)):
            self._readable = asyncio.get_running_loop().create_future()
            await self._readable
        if self._is_gone or self._is_ended:
            return {"type": _DISCONNECT}
        body = bytes(self._pieces[0]) if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._waiting_bytes = 0
        self._is_received = self._is_whole
        self._link.update_reading()
        return {"type": "http.request", "body": body, "more_body": not self._is_whole}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """ASGI's ``send``."""
        while self._link.is_write_paused and not self._is_gone:
            self._writable = asyncio.get_running_loop().create_future()
            await self._writable
        if self._is_gone:
            return
        kind = message["type"]
        if kind == "http.response.start" and not self.has_started:
            self._start(message["status"], list(message.get("headers", ())))
        elif kind == "http.response.body" and self.has_started and not self._is_ended:
            self._body(message.get("body", b""), more=message.get("more_body", False))
        else:
            raise RuntimeError(f"{kind} is not what comes next in an answer")

    def _start(self, status: int, headers: list[Header]) -> None:
        fields = [(name.lower(), value) for name, value in headers]
        closes = any(name == b"connection" and b"close" in value.lower() for name, value in fields)
        fields = [field for field in fields if field[0] not in _HOP_BY_HOP]
        lengths = [int(value) for name, value in fields if name == b"content-length"]
        is_bodiless = self._exchange.method == "HEAD" or status in answers.WITHOUT_BODY
        self._left_bytes = 0 if is_bodiless else lengths[0] if lengths else None
        if self._left_bytes is None and self._exchange.http_version == "1.1":
            self._is_chunked = True
            fields.append((b"transfer-encoding", b"chunked"))
        closes = closes or (self._left_bytes is None and not self._is_chunked)
        self._stays = not closes and self._link.stays_open(self._exchange)
        self._top = answers.STATUS_LINES[status] + answers.rendered(fields) + answers.ending(self._exchange.http_version, self._stays)
        self.has_started = True
        if self._exchange.method == "HEAD":  # that is all of it, also of a stream that would never end
            self._flush(b"")
            self._end()
            self._is_gone = True
        elif self._left_bytes is None:
            self._flush(b"")

    def _body(self, body: bytes, *, more: bool) -> None:
        if self._is_chunked:
            framed = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            self._flush(framed if more else framed + b"0\r\n\r\n")
        else:
            if self._left_bytes is not None:
                self._left_bytes -= len(body)
                if self._left_bytes < 0 or (self._left_bytes and not more):
                    raise RuntimeError("the body of an answer does not have its content-length")
            self._flush(body)
        if not more:
            self._end()

    def _end(self) -> None:
        self._is_ended = True
        self._pieces.clear()
        self._waiting_bytes = 0
        _set(self._readable)
        self._link.end_answer(self._exchange, self._stays)

    def _flush(self, data: bytes) -> None:
        if self._top or data:
            self._link.write(self._top + data)
            self._top = b""

    def _fail(self, message: str, error: Exception | None) -> None:
        request_id = answers.request_id_for(self._exchange.headers)
        log.error(message, self._exchange.method, self._path(), exc_info=error, extra={"fields": {"request_id": request_id}})
        self._break_off(request_id)

    def _break_off(self, request_id: str) -> None:
        """The application will not finish: say so, or close before it looks finished."""
        if self._is_gone or self._is_ended:
            return
        self._is_ended = True
        if self.has_started:
            self._link.abort()
        else:
            self._link.answer(self._exchange, 500, answers.own_headers(500, request_id), answers.error_body(answers.BUG))

    def _path(self) -> str:
        return self._exchange.raw_path[:200].decode("latin-1")

    def _scope(self) -> MutableMapping[str, Any]:
        exchange = self._exchange
        return {
            "type": "http",
            # 2.3: an application that watches for http.disconnect does so by receive(), as starlette's streaming answers do
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": exchange.http_version,
            "method": exchange.method,
            "scheme": exchange.scheme,
            "path": unquote_to_bytes(exchange.raw_path).decode("utf-8", "replace"),
            "raw_path": exchange.raw_path,
            "query_string": exchange.query,
            "root_path": "",
            "headers": list(exchange.headers.items()),
            "client": exchange.client,
            "server": exchange.server,
        }


def _set(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
