"""One client's connection: requests out of bytes, answers into bytes, and what becomes of it when the client does not keep its part.

A connection is in one phase at a time:

HEAD
    between two requests, or in the middle of a head
BODY
    the head has been admitted, its body is on the way
ANSWER
    the body is there, the answer is not; what else comes is kept as bytes, and reading pauses when that is too much
LINGER
    the last answer has been written and the sending side closed; what still comes is thrown away, so that the client reads the answer
    and not a reset
CLOSED
    nothing more will happen

There is no timer here. ``deadline`` says when something must have happened; ``Connections`` looks at all deadlines at once.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, Protocol, cast

from services.gateway.http import answers
from services.gateway.http.asgi import AsgiRun
from services.gateway.http.chunks import ChunkReader
from services.gateway.http.exchange import AsgiApp, Exchange, Header
from services.gateway.http.heads import MAX_REPEATED_BYTES, Head, RefusedError, check_partial, parse_head
from services.gateway.settings import HttpSettings

log = logging.getLogger(__name__)

HEAD, BODY, ANSWER, LINGER, CLOSED = range(5)
NEVER = float("inf")

NEW_WAIT_S = 1.0
"""How long a connection that has brought no request yet may be silent while the server drains: it was taken, so it is answered."""

TURN_REQUESTS = 32
"""Pipelined requests that are answered in one go; then other connections have their turn."""

LINGER_S = 2.0
LINGER_BYTES = 64 * 2**20
"""What a client still sends after its request was refused is read for a while, or it would see a broken connection, not the reason."""

JOINED_BYTES = 65_536
"""A body up to this size is copied behind its head and written in one piece; a larger one is handed over beside it."""

_FAILED = "a bug: the application failed at %s %r"
_SILENT = "admit returned None and has not answered"


class Home(Protocol):
    """What all connections have in common; see ``Connections``."""

    admit: Callable[[Exchange], int | AsgiApp | None]
    handle: Callable[[Exchange], None]
    limits: HttpSettings
    loop: asyncio.AbstractEventLoop
    now: Callable[[], float]
    idle_deadline: float
    is_draining: bool
    held_bytes: int
    unsent_bytes: int

    def enter(self, connection: "Connection") -> RefusedError | None: ...

    def leave(self, connection: "Connection") -> None: ...

    def run(self, work: Coroutine[Any, Any, None]) -> None: ...

    def count_refusal(self, status: int) -> None: ...


class Connection(asyncio.Protocol):
    """The server's side of one connection.

    Attributes
    ----------
    client
        Address and port of the client.
    key
        What the connections of one client are counted by; None: not counted.
    deadline
        When ``expire`` shall be called, on the loop's clock.
    """

    __slots__ = (
        "_asgi",
        "_body",
        "_buffer",
        "_chunks",
        "_counted_bytes",
        "_exchange",
        "_head",
        "_held_bytes",
        "_home",
        "_is_advancing",
        "_is_half_closed",
        "_is_read_paused",
        "_is_resuming",
        "_is_write_paused",
        "_limit_bytes",
        "_phase",
        "_received_bytes",
        "_todo_bytes",
        "_transport",
        "_unsent_bytes",
        "client",
        "deadline",
        "key",
    )

    def __init__(self, home: Home) -> None:
        self._home = home
        self._phase = HEAD
        self._buffer: bytes | bytearray = b""
        self._head: Head | None = None
        self._exchange: Exchange | None = None
        self._asgi: AsgiRun | None = None
        self._chunks: ChunkReader | None = None
        self._body: bytearray | None = None
        self._todo_bytes = 0
        self._limit_bytes = 0
        self._received_bytes = 0
        self._held_bytes = 0
        self._unsent_bytes = 0
        self._counted_bytes = 0
        self._is_advancing = False
        self._is_resuming = False
        self._is_half_closed = False
        self._is_read_paused = False
        self._is_write_paused = False
        self.client: tuple[str, int] | None = None
        self.key: str | None = None
        self.deadline = NEVER

    @property
    def server(self) -> tuple[str, int] | None:
        """Address and port that the client connected to."""
        address = self._transport.get_extra_info("sockname")
        return address[:2] if isinstance(address, tuple) else None

    @property
    def is_write_paused(self) -> bool:
        """Whether the client takes its answer too slowly for more to be written now."""
        return self._is_write_paused

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        address = transport.get_extra_info("peername")
        self.client = address[:2] if isinstance(address, tuple) else None
        self.deadline = self._home.now() + (NEW_WAIT_S if self._home.is_draining else self._home.limits.first_byte_timeout_s)
        refusal = self._home.enter(self)
        if refusal is not None:
            self._refuse(refusal)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._phase = CLOSED
        self.deadline = NEVER
        self._buffer = b""
        self._chunks = self._body = None
        self._count_unsent(0)
        self._home.leave(self)
        self._lose_exchange()

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase == HEAD:
            if self._buffer or self._is_write_paused:
                self._continue_head(data)
            else:
                self._advance(data)
        elif phase == BODY:
            self._receive(data)
        elif phase == ANSWER:
            self._keep(data)
        elif phase == LINGER:
            self._received_bytes += len(data)
            if self._received_bytes > LINGER_BYTES:
                self._transport.abort()

    def eof_received(self) -> bool:
        """The client ended its sending side, or went away: it looks the same. True: the answer is still to be written."""
        phase = self._phase
        self._is_half_closed = True
        if phase == HEAD and self._buffer and not self._is_resuming and not self._is_write_paused:
            self._refuse(RefusedError(HTTPStatus.BAD_REQUEST, "the request ended within its head"))
        elif phase == BODY:
            self._refuse_body(RefusedError(HTTPStatus.BAD_REQUEST, "the request body ended before its announced end"))
        elif phase == ANSWER:
            if not self._is_write_paused:
                self.deadline = self._usual_deadline()
            return True
        return self._is_resuming or self._is_write_paused

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._watch_writing()
        if self._home.unsent_bytes > self._home.limits.max_buffered_bytes:
            self._home.count_refusal(HTTPStatus.SERVICE_UNAVAILABLE)
            self._transport.abort()
        self.update_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._count_unsent(0)
        self.deadline = self._usual_deadline()
        if self._asgi is not None:
            self._asgi.wake()
        self._resume()

    def expire(self) -> None:
        """The deadline has passed: renew it if there was progress, else see to the end of the connection."""
        unsent = self._transport.get_write_buffer_size()
        if unsent:
            self._expire_writing(unsent)
        elif self._transport.is_closing():
            self.deadline = NEVER
            self._transport.abort()
        elif self._phase == BODY:
            self._expire_body()
        elif self._phase == HEAD and self._buffer:
            self._refuse(RefusedError(HTTPStatus.REQUEST_TIMEOUT, "the head of the request took too long to come"))
        elif self._phase == HEAD:
            self._transport.close()
        elif self._phase == ANSWER and self._asgi is not None and self._asgi.has_started:
            self.deadline = NEVER
        else:
            self._transport.abort()

    def drain(self) -> None:
        """Take no further request: close now, or when what was begun has been answered. A new one may be about to bring its first."""
        if self._phase != HEAD or self._buffer or self._is_write_paused:
            return
        if self._head is None:
            self.deadline = min(self.deadline, self._home.now() + NEW_WAIT_S)
        else:
            self._transport.close()

    def abort(self) -> None:
        """Break off."""
        self._transport.abort()

    def answer(self, exchange: Exchange, status: int, headers: Sequence[Header], body: bytes) -> None:
        """Write the answer to the current exchange; see ``Exchange.respond``."""
        if exchange is not self._exchange:
            if not exchange.is_gone:
                log.error("a bug: a request was answered twice", stack_info=True)
            return
        if self._transport.is_closing():
            self._exchange = None
            exchange.is_gone = True
            return
        stays = self.stays_open(exchange)
        try:
            top = answers.head_of(status, headers, len(body), answers.ending(exchange.http_version, stays))
        except ValueError as error:
            request_id = answers.request_id_for(exchange.headers)
            log.error("a bug: an answer cannot be written", exc_info=error, extra={"fields": {"request_id": request_id}})
            body = answers.error_body(answers.BUG)
            top = answers.head_of(500, answers.own_headers(500, request_id), len(body), answers.ending(exchange.http_version, stays))
        self._exchange = None
        if self._held_bytes:
            self._release()
        if stays:
            self._phase = HEAD
            self.deadline = self._home.idle_deadline
        if exchange.method == "HEAD" or status in answers.WITHOUT_BODY:
            body = b""
        if len(body) <= JOINED_BYTES:
            self._transport.write(top + body)
        else:
            self._transport.writelines((top, body))
        if not stays:
            self._finish()
        elif not self._is_advancing and (self._buffer or self._is_read_paused):
            self._resume()

    def stays_open(self, exchange: Exchange) -> bool:
        """Whether the connection goes on after an answer that is given now."""
        return (
            self._phase == ANSWER
            and exchange.head.is_keep_alive
            and not self._home.is_draining
            and not (self._is_half_closed and not self._buffer)
        )

    def write(self, data: bytes) -> None:
        """Write a part of an answer."""
        self._transport.write(data)

    def say_continue(self) -> None:
        """Tell the client to send the body it has announced; it has as long as any for that."""
        self._transport.write(answers.CONTINUE)
        self.deadline = self._usual_deadline()

    def end_answer(self, exchange: Exchange, stays: bool) -> None:
        """The ASGI application's answer is complete."""
        if exchange is not self._exchange:
            return
        self._exchange = self._asgi = None
        if stays and self._phase == ANSWER:
            self._phase = HEAD
            if not self._is_write_paused:
                self.deadline = self._usual_deadline()
            self._resume()
        else:
            self._finish()

    def update_reading(self) -> None:
        """Read, or do not, as the state wants it."""
        wants = self._phase == LINGER or not (
            self._is_write_paused
            or self._is_resuming
            or (self._phase == ANSWER and len(self._buffer) > self._home.limits.max_ahead_bytes)
            or (self._asgi is not None and self._asgi.is_full)
        )
        if wants != self._is_read_paused or self._transport.is_closing():
            return
        self._is_read_paused = not wants
        if wants:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _advance(self, data: bytes) -> None:
        """Take requests out of what came, one after another as long as each is answered at once."""
        self._is_advancing = True
        for _ in range(TURN_REQUESTS):
            if not self._take(data):
                break
            if not self._buffer or self._phase != HEAD or self._is_write_paused:
                break
            data, self._buffer = bytes(self._buffer), b""
        else:
            self._buffer = data
            self._is_resuming = True
            self._home.loop.call_soon(self._resume)
            self.update_reading()
        self._is_advancing = False

    def _take(self, data: bytes) -> bool:
        """Begin with the first request; False if there is none whose head is whole and good."""
        head = self._head
        if head is None or not data.startswith(head.raw):
            head = self._read_head(data)
            if head is None:
                return False
        start = head.size_bytes
        end = start + head.content_length
        if end < start or end > len(data):
            self._open(head, data[start:])
            return True
        exchange = Exchange(self, head, data[start:end])
        self._buffer = data[end:]
        self._exchange = exchange
        self._phase = ANSWER
        self.deadline = NEVER
        try:
            wants = self._home.admit(exchange)
            if isinstance(wants, int):
                if end - start <= wants:
                    self._home.handle(exchange)
                else:
                    self._refuse_body(_too_large(wants))
            elif wants is not None:
                self._run(exchange, wants, is_whole=True)
            elif exchange is self._exchange:
                raise TypeError(_SILENT)
        except Exception as error:  # noqa: BLE001 - logged there
            self._fail(exchange, error)
        return True

    def _read_head(self, data: bytes) -> Head | None:
        end = data.find(b"\r\n\r\n")
        try:
            if end >= 0:
                head = parse_head(data[: end + 4], self._home.limits)
                self._head = head if head.size_bytes <= MAX_REPEATED_BYTES else None
                return head
            check_partial(data, 0, self._home.limits)
        except RefusedError as error:
            self._refuse(error)
        else:
            self._buffer = data
            self.deadline = self._home.now() + self._home.limits.head_timeout_s
        return None

    def _continue_head(self, data: bytes) -> None:
        if self._is_resuming or self._is_write_paused:
            self._keep(data)
            return
        start = len(self._buffer)
        buffer = self._append(data)
        if buffer.find(b"\r\n\r\n", max(0, start - 3)) >= 0:
            self._buffer = b""
            self._advance(bytes(buffer))
            return
        try:
            check_partial(buffer, start, self._home.limits)
        except RefusedError as error:
            self._refuse(error)

    def _keep(self, data: bytes) -> None:
        """Put by what belongs to later requests."""
        self._append(data)
        self.update_reading()

    def _append(self, data: bytes) -> bytearray:
        buffer = self._buffer if isinstance(self._buffer, bytearray) else bytearray(self._buffer)
        buffer += data
        self._buffer = buffer
        return buffer

    def _resume(self) -> None:
        """Go on with what was put by."""
        self._is_resuming = False
        if self._phase == HEAD and not self._is_write_paused and not self._is_advancing:
            data, self._buffer = bytes(self._buffer), b""
            if data:
                self._advance(data)
            if self._is_half_closed and self._phase == HEAD and not self._is_resuming and not self._is_write_paused:
                self._transport.close()
        self.update_reading()

    def _open(self, head: Head, data: bytes) -> None:
        """Begin with a request whose body has not come in whole."""
        exchange = Exchange(self, head)
        self._exchange = exchange
        self._phase = BODY
        self._todo_bytes = head.content_length
        self._chunks = ChunkReader() if head.is_chunked else None
        self._received_bytes = 0
        self.deadline = self._home.now() + self._home.limits.body_timeout_s
        try:
            wants = self._home.admit(exchange)
            if exchange is not self._exchange:
                return
            if isinstance(wants, int):
                self._collect(head, wants, data)
            elif wants is not None:
                self._run(exchange, wants, is_whole=False, awaits_continue=head.expects_continue and not data)
            else:
                raise TypeError(_SILENT)
        except Exception as error:  # noqa: BLE001 - logged there
            self._fail(exchange, error)
        if data and self._phase == BODY:
            self._receive(data)

    def _collect(self, head: Head, limit_bytes: int, data: bytes) -> None:
        if head.content_length > limit_bytes:
            self._refuse_body(_too_large(limit_bytes))
            return
        self._limit_bytes = limit_bytes
        self._body = bytearray()
        if head.expects_continue and not data:
            self.say_continue()

    def _receive(self, data: bytes) -> None:
        """Take what came of a body."""
        self._received_bytes += len(data)
        try:
            content, is_whole = self._content(data)
            if self._asgi is None:
                self._hold(content)
        except RefusedError as error:
            self._refuse_body(error)
            return
        if is_whole:
            self._phase = ANSWER
            self._chunks = None
            self.deadline = NEVER
        if self._asgi is not None:
            self._asgi.feed(content, is_whole)
            self.update_reading()
        elif is_whole:
            self._hand_over()

    def _content(self, data: bytes) -> tuple[bytes, bool]:
        """What of it is the body, and whether that is complete; what comes after is put by."""
        if self._chunks is not None:
            content = self._chunks.feed(data)
            self._buffer = self._chunks.rest
            return content, self._chunks.is_complete
        content = data[: self._todo_bytes]
        self._buffer = data[self._todo_bytes :]
        self._todo_bytes -= len(content)
        return content, self._todo_bytes == 0

    def _hold(self, content: bytes) -> None:
        body = self._body
        if body is None:
            return
        body += content
        if len(body) > self._limit_bytes:
            raise _too_large(self._limit_bytes)
        self._held_bytes += len(content)
        self._home.held_bytes += len(content)
        if self._home.held_bytes > self._home.limits.max_buffered_bytes:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many request bodies are being received at the moment")

    def _release(self) -> None:
        self._home.held_bytes -= self._held_bytes
        self._held_bytes = 0

    def _hand_over(self) -> None:
        exchange, body = self._exchange, self._body
        self._body = None
        if exchange is None or body is None:
            return
        exchange.body = body
        try:
            self._home.handle(exchange)
        except Exception as error:  # noqa: BLE001 - logged there
            self._fail(exchange, error)

    def _run(self, exchange: Exchange, app: AsgiApp, *, is_whole: bool, awaits_continue: bool = False) -> None:
        self._asgi = AsgiRun(self, exchange, is_whole=is_whole, awaits_continue=awaits_continue)
        self._home.run(self._asgi.run(app))

    def _fail(self, exchange: Exchange, error: Exception) -> None:
        """Answer for an application that could not."""
        request_id = answers.request_id_for(exchange.headers)
        log.error(_FAILED, exchange.method, exchange.raw_path[:200], exc_info=error, extra={"fields": {"request_id": request_id}})
        self.answer(exchange, 500, answers.own_headers(500, request_id), answers.error_body(answers.BUG))

    def _refuse(self, error: RefusedError) -> None:
        """Answer what is no request."""
        self._home.count_refusal(error.status)
        request_id = answers.request_id_for({})
        log.debug("refused: %s", error.message, extra={"fields": {"request_id": request_id}})
        body = answers.error_body(error.message)
        self._transport.write(answers.head_of(error.status, answers.own_headers(error.status, request_id), len(body), answers.CLOSE) + body)
        self._phase = BODY
        self._finish()

    def _refuse_body(self, error: RefusedError) -> None:
        """Answer a request whose body is not as it should be; first choice: the application does it in its own form."""
        exchange = self._exchange
        if exchange is None:
            return
        self._home.count_refusal(error.status)
        self._phase = BODY
        run, self._asgi = self._asgi, None
        if run is not None and run.has_started:
            self._transport.abort()
        elif exchange.on_refused is not None:
            try:
                exchange.on_refused(error.status, error.message)
            except Exception:
                log.exception("a bug: the application could not refuse a request")
        if exchange is self._exchange:
            headers = answers.own_headers(error.status, answers.request_id_for(exchange.headers))
            self.answer(exchange, error.status, headers, answers.error_body(error.message))
            _tell_gone(exchange)
        if run is not None:
            run.disconnect()

    def _finish(self) -> None:
        """Nothing more is answered: let the client read what was written, then close."""
        lingers = (self._phase == BODY or bool(self._buffer)) and not self._is_half_closed
        self._phase = LINGER
        self._buffer = b""
        self._chunks = self._body = None
        self._received_bytes = 0
        if self._transport.get_write_buffer_size():
            self._watch_writing()
        else:
            self.deadline = self._home.now() + LINGER_S
        if self._transport.is_closing():
            return
        if lingers:
            self._transport.write_eof()
            self.update_reading()
        else:
            self._transport.close()

    def _lose_exchange(self) -> None:
        exchange, self._exchange = self._exchange, None
        run, self._asgi = self._asgi, None
        if self._held_bytes:
            self._release()
        if exchange is not None:
            _tell_gone(exchange)
        if run is not None:
            run.disconnect()

    def _usual_deadline(self) -> float:
        limits = self._home.limits
        if self._phase == HEAD:
            return self._home.now() + (limits.head_timeout_s if self._buffer else limits.idle_timeout_s)
        if self._phase == BODY:
            self._received_bytes = 0
            return self._home.now() + limits.body_timeout_s
        if self._phase == ANSWER:
            # an answer that has begun to stream shows by itself whether somebody takes it
            is_alive = not self._is_half_closed or (self._asgi is not None and self._asgi.has_started)
            return NEVER if is_alive else self._home.now() + limits.half_closed_timeout_s
        return self._home.now() + LINGER_S

    def _watch_writing(self) -> None:
        self._unsent_bytes = self._transport.get_write_buffer_size()
        if self._is_write_paused:
            self._count_unsent(self._unsent_bytes)
        self.deadline = self._home.now() + self._home.limits.write_timeout_s

    def _count_unsent(self, size_bytes: int) -> None:
        """Account for what is written and not taken by the client, while that is much."""
        self._home.unsent_bytes += size_bytes - self._counted_bytes
        self._counted_bytes = size_bytes

    def _expire_writing(self, unsent: int) -> None:
        limits = self._home.limits
        if self._unsent_bytes - unsent < limits.min_bytes_per_s * limits.write_timeout_s:
            self._transport.abort()
        else:
            self._watch_writing()

    def _expire_body(self) -> None:
        limits = self._home.limits
        is_waiting = self._is_read_paused or (self._asgi is not None and self._asgi.awaits_continue)
        if is_waiting or self._received_bytes >= limits.min_bytes_per_s * limits.body_timeout_s:
            self.deadline = self._usual_deadline()
        else:
            self._refuse_body(
                RefusedError(HTTPStatus.REQUEST_TIMEOUT, f"the request body came at less than {limits.min_bytes_per_s} bytes per second")
            )


def _too_large(limit_bytes: int) -> RefusedError:
    return RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request body is larger than the {limit_bytes} bytes accepted")


def _tell_gone(exchange: Exchange) -> None:
    exchange.is_gone = True
    if exchange.on_gone is not None:
        try:
            exchange.on_gone()
        except Exception:
            log.exception("a bug: the application could not let go of a request")
