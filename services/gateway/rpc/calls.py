"""Calls: from a stream of HTTP/2 to a method, and from what the method says to messages, metadata and a status.

References
----------
gRPC, "gRPC over HTTP2".
"""

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol as Interface

from opentelemetry.trace import Span

from libs.errors import DeadlineExceededError, InvalidArgumentError, MillraceError, OverloadedError
from services.gateway.access import AccessControl, Principal
from services.gateway.errors import ClientGoneError, InternalError, v2_message
from services.gateway.routes import HttpRoute
from services.gateway.rpc import framing, spans
from services.gateway.rpc.hpack import encode
from services.gateway.rpc.http2 import Receiver, Stream
from services.gateway.rpc.statuses import Status, UnimplementedError, status_of
from services.gateway.tracing import Tracing, traceparent_of

log = logging.getLogger(__name__)

RETRY_AFTER_MS = 1_000
"""What a client is told to wait before it tries again what may succeed then."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_STATUS_200 = b"\x88"
_OK = encode([(b"grpc-status", b"0")])
_HEAD = _STATUS_200 + encode([(b"content-type", b"application/grpc")])
_HEAD_OF_REQUEST = _HEAD + b"\x00\x0cx-request-id"
_NOT_GRPC = encode([(b":status", b"415")])
_NOT_POST = encode([(b":status", b"405"), (b"allow", b"POST")])
_ACCEPTED = (b"grpc-accept-encoding", ",".join(framing.ENCODINGS).encode())


@dataclass(slots=True)
class Head:
    """What a call begins with.

    Attributes
    ----------
    headers
        Metadata by lower-case name, the pseudo-headers and ``host`` among it.
    deadline_s
        When the caller's patience ends, by the event loop's clock, in seconds; None: it never does.
    encoding
        How messages are compressed, in both directions.
    """

    path: str
    request_id: str
    headers: dict[bytes, bytes]
    principal: Principal
    deadline_s: float | None
    encoding: str | None
    span: Span | None = None

    @property
    def traceparent(self) -> str | None:
        """Context of the call's span; None when it is not traced."""
        return None if self.span is None else traceparent_of(self.span)

    def block(self) -> bytes:
        """The header block that a good answer begins with."""
        request_id = self.request_id.encode()
        if len(request_id) < 127:
            block = b"%b%c%b" % (_HEAD_OF_REQUEST, len(request_id), request_id)
        else:
            block = _HEAD + encode([(b"x-request-id", request_id)])
        return block if self.encoding is None else block + encode([(b"grpc-encoding", self.encoding.encode())])


class Budget:
    """Memory for messages that are not complete yet, all connections together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def take(self, size: int) -> None:
        """Raise ``OverloadedError`` when there is no room for so many bytes more."""
        if self.held_bytes + size > self._max_bytes:
            raise OverloadedError("too much is being received at the moment")
        self.held_bytes += size

    def give(self, size: int) -> None:
        """Give room back."""
        self.held_bytes -= size


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Largest message, before and after decompression, and where memory for unfinished ones comes from."""

    message_bytes: int
    budget: Budget


Open = Callable[[Stream, Head, CallLimits], Receiver]
"""Begins a call."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method: its path as a row of the table of routes, which says who may use it, and what a call of it begins with.

    ``limits`` are its own; None: those that the server has for all. ``refused`` is told when a call is turned away before it begins.
    """

    route: HttpRoute
    open: Open
    limits: CallLimits | None = None
    refused: Callable[[MillraceError], None] | None = None


class Router:
    """Takes every stream: finds its method, checks who asks, and begins the call."""

    def __init__(self, access: AccessControl, methods: Sequence[Method], limits: CallLimits, tracing: Tracing) -> None:
        self._access = access
        self._tracing = tracing
        self._methods: Mapping[bytes, Method] = {method.route.template.encode(): method for method in methods}
        self._limits = limits

    def accept(self, stream: Stream, headers: dict[bytes, bytes]) -> Receiver | None:
        """Begin a call, or refuse it."""
        if headers[b":method"] != b"POST":
            stream.send_head(_NOT_POST, is_last=True)
            return None
        if not headers.get(b"content-type", b"").startswith(b"application/grpc"):
            stream.send_head(_NOT_GRPC, is_last=True)
            return None
        given = headers.get(b"x-request-id")
        request_id = given.decode() if given is not None and _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        try:
            return self._begin(stream, headers, request_id)
        except MillraceError as error:
            method = self._methods.get(headers[b":path"])
            if method is not None and method.refused is not None:
                method.refused(error)
            refuse(stream, headers[b":path"].decode("latin-1"), request_id, error)
            return None

    def _begin(self, stream: Stream, headers: dict[bytes, bytes], request_id: str) -> Receiver:
        path = headers[b":path"]
        method = self._methods.get(path)
        headers.setdefault(b"host", headers.get(b":authority", b""))
        principal = self._access.admit(None if method is None else method.route, headers)
        if method is None:
            raise UnimplementedError(f"there is no method {path[:200].decode('latin-1')}")
        timeout = headers.get(b"grpc-timeout")
        deadline_s = None if timeout is None else stream.opened_s + framing.timeout_s(timeout)
        encoding = framing.encoding_of(headers.get(b"grpc-encoding"))
        template, peer = method.route.template, stream.connection.peer
        span = spans.start(self._tracing, template, headers.get(b"traceparent"), peer, request_id)
        head = Head(template, request_id, headers, principal, deadline_s, encoding, span)
        return method.open(stream, head, method.limits or self._limits)


class _Call:
    """What all calls have in common: how they end."""

    __slots__ = ("head", "stream")

    def __init__(self, stream: Stream, head: Head) -> None:
        self.stream = stream
        self.head = head

    def fail(self, error: MillraceError) -> None:
        """End the call with an error, unless it has ended."""
        if self.stream.is_open:
            refuse(self.stream, self.head.path, self.head.request_id, error)
            self.trace_end(error)

    def trace_end(self, error: MillraceError | None) -> None:
        """End the call's span, if it is traced."""
        if self.head.span is not None:
            spans.end(self.head.span, error)


def refuse(stream: Stream, path: str, request_id: str, error: MillraceError) -> None:
    """End a call that has not sent anything with an error."""
    log.info("%s", path[:200], extra={"fields": {"status": status_of(error).name, "request_id": request_id, "error": error.message}})
    stream.send_head(_HEAD + encode(_error(error, request_id)), is_last=True)


def _error(error: MillraceError, request_id: str) -> list[tuple[bytes, bytes]]:
    status = status_of(error)
    fields = [(b"grpc-status", b"%d" % status), (b"grpc-message", framing.told(v2_message(error))), (b"x-request-id", request_id.encode())]
    if status is Status.UNIMPLEMENTED:
        fields.append(_ACCEPTED)
    if error.retryable:
        fields.append((b"grpc-retry-pushback-ms", b"%d" % RETRY_AFTER_MS))
    return fields


@lru_cache(maxsize=1024)
def _encoded(metadata: tuple[tuple[bytes, bytes], ...]) -> bytes:
    return encode(metadata)


Answer = Callable[["UnaryCall", bytes], None]
"""Answers a call with one message, now or later, by ``reply`` or ``fail``; may raise ``MillraceError``, which fails it."""


class UnaryCall(_Call):
    """A call with one message and one answer.

    Attributes
    ----------
    on_gone
        What is to be done when the caller gives up before it is answered.
    """

    __slots__ = ("_answer", "_body", "_limits", "_refused", "on_gone")

    def __init__(
        self, stream: Stream, head: Head, limits: CallLimits, answer: Answer, refused: Callable[[MillraceError], None] | None
    ) -> None:
        super().__init__(stream, head)
        self._limits = limits
        self._answer = answer
        self._refused = refused
        self._body: bytearray | None = None
        self.on_gone: Callable[[], None] | None = None

    def data(self, chunk: bytes, is_last: bool) -> None:
        try:
            body = self._gathered(chunk, is_last)
            if body is None:
                return
            message = framing.only_message(body, self.head.encoding, self._limits.message_bytes)
        except MillraceError as error:
            self._refuse(error)
            return
        try:
            self._answer(self, message)
        except MillraceError as error:
            self.fail(error)
        except Exception:
            log.exception("a bug: %s failed", self.head.path)
            self.fail(InternalError("something went wrong in the gateway; its log tells more under this request's x-request-id"))

    def _gathered(self, chunk: bytes, is_last: bool) -> bytes | bytearray | None:
        """The whole body once it is there."""
        if self._body is None:
            if is_last:
                return chunk
            self._body = bytearray()
        self._limits.budget.take(len(chunk))
        self._body += chunk
        framing.only_announced(self._body, self._limits.message_bytes)
        if not is_last:
            return None
        body = self._body
        self._release()
        return body

    def _release(self) -> None:
        if self._body is not None:
            self._limits.budget.give(len(self._body))
            self._body = None

    def expire(self, error: DeadlineExceededError) -> None:
        """Give up on a request that does not become complete."""
        self._refuse(error)

    def _refuse(self, error: MillraceError) -> None:
        self._release()
        if self._refused is not None:
            self._refused(error)
        self.fail(error)

    def drained(self) -> None:
        """Nothing more is to be sent."""

    def gone(self) -> None:
        self._release()
        self.trace_end(ClientGoneError("the caller gave up before it was answered"))
        if self.on_gone is not None:
            self.on_gone()

    def reply(self, message: bytes, metadata: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Answer, unless the call has ended."""
        if not self.stream.is_open:
            return
        head = self.head
        self.stream.respond(head.block() + _encoded(metadata), framing.framed(message, head.encoding), _OK)
        self.trace_end(None)


class Session(Interface):
    """One side of a call with many messages."""

    def message(self, message: bytes) -> None:
        """One came; raises ``MillraceError`` to end the call."""
        ...

    def ended(self) -> None:
        """No more will come."""
        ...

    def drained(self) -> None:
        """What was sent has left; messages that were held back may be asked for again."""
        ...

    def gone(self) -> None:
        """The call is over; nobody hears any answer."""
        ...


class StreamCall(_Call):
    """A call with many messages: in, out, or both. While ``is_full`` is true, no message is handed over; ``resume`` hands over the rest."""

    __slots__ = ("_body", "_has_ended", "_is_feeding", "_is_over", "_limits", "_session", "_timer", "is_full")

    def __init__(self, stream: Stream, head: Head, limits: CallLimits, open_session: "Callable[[StreamCall], Session]") -> None:
        super().__init__(stream, head)
        self._limits = limits
        self._body = bytearray()
        self._has_ended = False
        self._is_feeding = False
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None
        self.is_full = False
        self._session = open_session(self)
        stream.send_head(head.block())
        if head.deadline_s is not None:
            self._timer = asyncio.get_running_loop().call_at(head.deadline_s, self._expire)

    def data(self, chunk: bytes, is_last: bool) -> None:
        if self._is_over:
            return
        try:
            self._limits.budget.take(len(chunk))
        except MillraceError as error:
            self.fail(error)
            return
        if not self._body:
            self.stream.begin_message(len(chunk))
        self._body += chunk
        self._has_ended = self._has_ended or is_last
        self.resume()

    def resume(self) -> None:
        """Hand over what is complete, as far as there is room."""
        if self._is_feeding:
            return
        self._is_feeding = True
        try:
            self._feed()
        except MillraceError as error:
            self.fail(error)
        except Exception:
            log.exception("a bug: %s failed", self.head.path)
            self.fail(InternalError("something went wrong in the gateway; its log tells more under this request's x-request-id"))
        finally:
            self._is_feeding = False

    def _feed(self) -> None:
        max_bytes, body = self._limits.message_bytes, self._body
        while not self._is_over and not self.is_full:
            end = framing.announced(body, max_bytes)
            if end is None or end > len(body):
                break
            flag, message = body[0], bytes(memoryview(body)[framing.PREFIX.size : end])
            del body[:end]
            self._limits.budget.give(end)
            self.stream.consumed(end)
            if body:
                self.stream.begin_message(len(body))
            self._session.message(framing.opened(flag, message, self.head.encoding, max_bytes))
        if self._has_ended and not self._is_over and not self.is_full:
            if body:
                raise InvalidArgumentError("the request ended before its last message was complete")
            self._session.ended()

    def send(self, message: bytes) -> None:
        """Send a message."""
        self.stream.send(framing.framed(message, self.head.encoding))

    def finish(self) -> None:
        """End the call well, once all that was sent has left."""
        if not self._is_over:
            self._close(None)
            self.stream.end(_OK)

    def fail(self, error: MillraceError) -> None:
        """End the call with an error, unless it has ended; whatever is still asked for it is given up."""
        if self.stream.is_open and not self._is_over:
            fields = {"status": status_of(error).name, "request_id": self.head.request_id, "error": error.message}
            log.info("%s", self.head.path, extra={"fields": fields})
            self._close(error)
            self._session.gone()
            self.stream.end(encode(_error(error, self.head.request_id)), at_once=True)

    def expire(self, error: DeadlineExceededError) -> None:
        """Give up if it is a message that does not become complete; between messages, and while none is taken, a stream may be silent."""
        if self._body and not self.is_full:
            self.fail(error)

    def drained(self) -> None:
        self._session.drained()

    def gone(self) -> None:
        if not self._is_over:
            self._close(ClientGoneError("the caller gave up before all was answered"))
            self._session.gone()

    def _expire(self) -> None:
        self.fail(DeadlineExceededError("the deadline of the call passed"))

    def _close(self, error: MillraceError | None) -> None:
        self._is_over = True
        self.trace_end(error)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._limits.budget.give(len(self._body))
        self._body = bytearray()


def unary(answer: Answer, refused: Callable[[MillraceError], None] | None = None) -> Open:
    """What begins a call with one message, answered by a callback; ``refused`` is told when its message cannot be taken."""
    return lambda stream, head, limits: UnaryCall(stream, head, limits, answer, refused)


def told(answer: Callable[[bytes], Awaitable[bytes]]) -> Open:
    """What begins a call with one message, answered by a coroutine."""

    def ask(call: UnaryCall, message: bytes) -> None:
        task = asyncio.ensure_future(answer(message))
        call.on_gone = lambda: _cancel(task)
        task.add_done_callback(lambda task: _settle(call, task))

    return unary(ask)


def _cancel(task: "asyncio.Future[bytes]") -> None:
    task.cancel()


def _settle(call: UnaryCall, task: "asyncio.Future[bytes]") -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        call.reply(task.result())
    elif isinstance(error, MillraceError):
        call.fail(error)
    else:
        log.error("a bug: %s failed", call.head.path, exc_info=error)
        call.fail(InternalError("something went wrong in the gateway; its log tells more under this request's x-request-id"))


def streaming(open_session: Callable[[StreamCall], Session]) -> Open:
    """What begins a call with many messages."""
    return lambda stream, head, limits: StreamCall(stream, head, limits, open_session)
