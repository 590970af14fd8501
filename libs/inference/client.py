"""Client of one runner: requests go out as they come, answers come back by id."""

import asyncio
import contextlib
import itertools
import math
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import orjson

from libs.errors import DeadlineExceededError, MillraceError, UnauthenticatedError
from libs.inference.errors import InvalidInputError, ModelError, RunnerGoneError, RunnerHungError, printable
from libs.inference.requests import InferResponse, Span
from libs.inference.tensors import Array
from libs.runner.wire import (
    REMEMBERED_HEAD_BYTES,
    REMEMBERED_HEADS,
    Buffer,
    Frame,
    FrameReader,
    Rows,
    TensorSpec,
    WireError,
    decode_tensors,
    describe_tensors,
    encode_tensors,
    join_frame,
    read_descriptions,
)

Done = Callable[[InferResponse | MillraceError], None]
"""Is told what came of a request, on the event loop; must not raise."""

T = TypeVar("T")

_SEND_BUFFER_BYTES = 2**20
"""A batch of 1000 x 30 numbers leaves in one piece instead of two, which takes 7 % less time; the kernel may give less."""

_SPAN_ID = re.compile("[0-9a-f]{16}")


class Asked:
    """One request on its way; ``done`` is called once, unless it is cancelled before."""

    __slots__ = ("_connection", "_done", "_read", "_request_id")

    def __init__(self, done: Callable[[Any], None], read: Callable[[Frame], Any]) -> None:
        self._done: Callable[[Any], None] | None = done
        self._read = read
        self._connection: _Connection | None = None
        self._request_id = 0

    @property
    def is_over(self) -> bool:
        """Whether it was answered, failed or cancelled."""
        return self._done is None

    def cancel(self) -> None:
        """Forget the request: ``done`` is not called, and a runner that has not begun on it drops it."""
        if self._done is not None:
            self._done = None
            if self._connection is not None:
                self._connection.forget(self._request_id)

    def sent(self, connection: "_Connection", request_id: int) -> None:
        self._connection, self._request_id = connection, request_id

    def answer(self, frame: Frame) -> None:
        """Tell what the runner answered."""
        if frame.meta.get("ok") is not True:
            self.end(_as_error(frame))
            return
        try:
            value = self._read(frame)
        except ModelError as error:
            value = error
        self.end(value)

    def end(self, value: Any) -> None:
        """Tell what came of it."""
        done, self._done = self._done, None
        if done is not None:
            done(value)


class RunnerClient:
    """Asks one runner; connects when first needed and again after a loss.

    Parameters
    ----------
    address
        ``unix:/path`` or ``tcp:host:port``.
    token
        The runner's token (``libs.inference.tokens.runner_token``).

    Notes
    -----
    Safe for many concurrent callers on one event loop. A cancelled or timed-out request is forgotten: its late answer is dropped and
    disturbs nobody. Nothing is retried here: a request may have been answered by a runner whose connection then broke, and only the
    caller knows whether asking twice is harmless.
    """

    def __init__(self, address: str, token: str, *, connect_timeout_s: float = 5.0) -> None:
        self.address = address
        self._token = token
        self._connect_timeout_s = connect_timeout_s
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def is_connected(self) -> bool:
        """Whether ``send`` writes at once."""
        return self._connection is not None and not self._connection.lost

    def send(
        self,
        inputs: Mapping[str, Rows],
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        traceparent: str | None = None,
        done: Done,
    ) -> Asked:
        """Ask for predictions and return at once; ``outputs=None`` asks for the first output of the signature.

        When connected the request is written before this returns; else a task connects first. Nothing is raised: errors are given to
        ``done``, which is never called before this returns.

        Parameters
        ----------
        timeout_s
            Seconds after which the runner does not begin on the request any more; it then answers ``DeadlineExceededError``. The clock
            runs from when it reads the request. The caller keeps a clock of its own: a model that is slow or hangs is not interrupted.
        done
            Given the answer, or one of the errors of :meth:`infer`, or ``UnauthenticatedError``.
        """
        asked = Asked(done, _response)
        try:
            specs, tail = encode_tensors(inputs)
        except WireError as error:
            asyncio.get_running_loop().call_soon(asked.end, InvalidInputError(str(error)))
            return asked
        self._send(asked, _infer_meta(timeout_s, traceparent), _request_head(specs, tuple(outputs or ())), tail)
        return asked

    async def infer(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> InferResponse:
        """Ask for predictions; ``outputs=None`` asks for the first output of the signature.

        Raises
        ------
        InvalidInputError
            The runner says that the tensors do not fit the model.
        ModelError
            The model raised.
        RunnerGoneError
            The runner cannot be reached or went away.
        DeadlineExceededError
            No answer within ``timeout_s`` seconds.
        """
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        asked = self.send(inputs, outputs=outputs, timeout_s=timeout_s, traceparent=traceparent, done=partial(_settle, future))
        return await _answer(future, asked, timeout_s)

    async def metadata(self, *, timeout_s: float | None = 10.0) -> dict[str, Any]:
        """Return the runner's signature (``signature``) and peak memory (``memory_peak_bytes``)."""
        frame = await self._request({"op": "metadata"}, timeout_s)
        document: dict[str, Any] = orjson.loads(frame.head)
        return document

    async def ping(self, *, timeout_s: float | None = 5.0) -> float:
        """Return when the runner answers, which it does also while its model is busy.

        The value is for how many seconds the model has been busy with one request; 0 when it is idle or the runner does not say.
        """
        frame = await self._request({"op": "ping"}, timeout_s)
        busy_s = frame.meta.get("busy_s")
        return float(busy_s) if isinstance(busy_s, int | float) else 0.0

    async def stop(self, *, timeout_s: float | None = 5.0) -> None:
        """Ask the runner to finish what it was asked and end."""
        await self._request({"op": "stop"}, timeout_s)

    async def close(self) -> None:
        """Close the connection; requests that wait fail with ``RunnerGoneError``."""
        self._closed = True
        if self._connection is not None:
            await self._connection.close()

    def retire(self) -> None:
        """Close the connection once nobody waits for an answer any more; for a client that gets no new requests."""
        self._closed = True
        if self._connection is not None:
            self._connection.retire()

    async def _request(self, meta: Mapping[str, Any], timeout_s: float | None) -> Frame:
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        asked = Asked(partial(_settle, future), _unread)
        self._send(asked, _meta(meta))
        return await _answer(future, asked, timeout_s)

    def _send(self, asked: Asked, meta: bytes, head: bytes = b"", tail: Sequence[Buffer] = ()) -> None:
        connection = self._connection
        if connection is not None and not connection.lost:
            connection.send(asked, meta, head, tail)
            return
        task = asyncio.get_running_loop().create_task(self._connect_and_send(asked, meta, head, tail))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect_and_send(self, asked: Asked, meta: bytes, head: bytes, tail: Sequence[Buffer]) -> None:
        try:
            connection = await self._connect()
        except MillraceError as error:
            asked.end(error)
            return
        if not asked.is_over:
            connection.send(asked, meta, head, tail)

    async def _connect(self) -> "_Connection":
        async with self._connecting:
            if self._closed:
                raise RunnerGoneError("the client of the runner is closed")
            if self._connection is not None and not self._connection.lost:
                return self._connection
            connection = await self._open()
            try:
                await connection.greet(self._token)
            except BaseException:
                connection.abort()
                raise
            self._connection = connection
            if self._closed:
                connection.retire()
            return connection

    async def _open(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        kind, _, rest = self.address.partition(":")
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if kind == "unix":
                    _, connection = await loop.create_unix_connection(_Connection, rest)
                else:
                    host, _, port = rest.rpartition(":")
                    _, connection = await loop.create_connection(_Connection, host, int(port))
        except (OSError, ValueError, TimeoutError) as error:
            reason = str(error) or "no connection in time"
            raise RunnerGoneError(f"no runner answers at {self.address}: {reason}") from error
        return connection


class _Connection(asyncio.Protocol):
    """One authenticated stream; answers are matched to requests by id."""

    def __init__(self) -> None:
        self.lost = False
        self._retired = False
        self._reader = FrameReader(loads=orjson.loads)
        self._ids = itertools.count(1)
        self._waiting: dict[int, Asked] = {}
        self._transport: asyncio.Transport | None = None
        self._ended = asyncio.Event()
        self._reason = "the runner closed the connection"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio.Protocol)
        self.lost = True
        self._ended.set()
        waiting, self._waiting = self._waiting, {}
        for asked in waiting.values():
            asked.end(RunnerGoneError(self._reason))

    def data_received(self, data: bytes) -> None:
        try:
            frames = self._reader.feed(data)
        except WireError as error:
            self._reason = f"the runner's answer cannot be read: {error}"
            self.abort()
            return
        for frame in frames:
            asked = self._waiting.pop(frame.meta.get("id", 0), None)
            if asked is not None:
                asked.answer(frame)
            elif frame.meta.get("id") == 0 and not frame.meta.get("ok"):
                self._reason = f"the runner refused the connection: {_message(frame)}"
        if self._retired:
            self.retire()

    def send(self, asked: Asked, meta: bytes, head: bytes = b"", tail: Sequence[Buffer] = ()) -> None:
        """Write one frame; what is asked is told its answer, or that the runner went away. ``meta`` has everything but the id."""
        if self.lost or self._transport is None:
            asyncio.get_running_loop().call_soon(asked.end, RunnerGoneError(self._reason))
            return
        request_id = next(self._ids)
        self._waiting[request_id] = asked
        asked.sent(self, request_id)
        for part in join_frame(b'{"id":%d,%b' % (request_id, meta), head, tail):
            self._transport.write(part)

    def forget(self, request_id: int) -> None:
        """Wait for an answer no longer."""
        if self._waiting.pop(request_id, None) is not None and self._transport is not None and not self.lost:
            self._transport.write(join_frame(b'{"id":%d,"op":"cancel"}' % request_id)[0])
        if self._retired:
            self.retire()

    async def greet(self, token: str) -> None:
        """Say who we are; raises what the runner answers."""
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        asked = Asked(partial(_settle, future), _unread)
        self.send(asked, _meta({"op": "hello", "token": token}))
        await _answer(future, asked, None)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def retire(self) -> None:
        self._retired = True
        if not self._waiting and self._transport is not None:
            self._reason = "the client of the runner is closed"
            self._transport.close()

    async def close(self) -> None:
        if self._transport is not None:
            self._reason = "the client of the runner is closed"
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ended.wait()


async def _answer(future: "asyncio.Future[T]", asked: Asked, timeout_s: float | None) -> T:
    """Wait for what comes of a request; forget it when the time is over or the caller is cancelled."""
    timer = None if timeout_s is None else asyncio.get_running_loop().call_later(timeout_s, _expire, future, timeout_s)
    try:
        return await future
    finally:
        asked.cancel()
        if timer is not None:
            timer.cancel()


def _expire(future: "asyncio.Future[Any]", timeout_s: float) -> None:
    _settle(future, DeadlineExceededError(f"the runner did not answer within {timeout_s} s"))


def _settle(future: "asyncio.Future[Any]", value: Any) -> None:
    if not future.done():
        if isinstance(value, MillraceError):
            future.set_exception(value)
        else:
            future.set_result(value)


def _unread(frame: Frame) -> Frame:
    return frame


def _meta(fields: Mapping[str, Any]) -> bytes:
    """The meta part without its first field, the id, and the brace before it."""
    return orjson.dumps(fields)[1:]


def _infer_meta(timeout_s: float | None, traceparent: str | None) -> bytes:
    timeout = b"" if timeout_s is None else b',"timeout_ms":%d' % max(0, math.ceil(timeout_s * 1000))
    trace = b"" if traceparent is None else b',"traceparent":%b' % orjson.dumps(traceparent)
    return b'"op":"infer"%b%b}' % (timeout, trace)


@lru_cache(maxsize=REMEMBERED_HEADS)
def _request_head(specs: tuple[TensorSpec, ...], outputs: tuple[str, ...]) -> bytes:
    document: dict[str, Any] = {"inputs": describe_tensors(specs)}
    if outputs:
        document["outputs"] = [{"name": name} for name in outputs]
    return orjson.dumps(document)


def _response(frame: Frame) -> InferResponse:
    head = frame.head
    try:
        specs = _remembered_head(head) if len(head) <= REMEMBERED_HEAD_BYTES else _read_head(head)
        outputs = decode_tensors(specs, frame.tail, may_miss=None)
    except (WireError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"the runner's answer cannot be read: {error}") from error
    span = frame.meta.get("span")
    return InferResponse(outputs, None if span is None else _span(span), _seconds(frame.meta.get("model_s")))


def _read_head(head: bytes) -> tuple[TensorSpec, ...]:
    return read_descriptions(orjson.loads(head)["outputs"])


_remembered_head = lru_cache(maxsize=REMEMBERED_HEADS)(_read_head)


def _seconds(value: Any) -> float:
    """The seconds that a runner says; 0 when they make no sense: the model's code could have made them."""
    return float(value) if isinstance(value, int | float) and 0 <= value < math.inf else 0.0


def _span(span: Any) -> Span | None:
    """The runner's span; None when there is none or it makes no sense: the model's code could have made it."""
    match span:
        case {"span_id": str(span_id), "start_ns": int(start_ns), "end_ns": int(end_ns)}:
            makes_sense = _SPAN_ID.fullmatch(span_id) is not None and 0 < start_ns <= end_ns < 2**63
            return Span(span_id, start_ns, end_ns) if makes_sense else None
        case _:
            return None


def _message(frame: Frame) -> str:
    error = frame.meta.get("error")
    return printable(error.get("message")) if isinstance(error, dict) else "no reason given"


def _as_error(frame: Frame) -> MillraceError:
    error = frame.meta.get("error")
    kind = error.get("kind") if isinstance(error, dict) else None
    kinds: dict[Any, type[MillraceError]] = {
        "invalid_input": InvalidInputError,
        "model_error": ModelError,
        "unauthenticated": UnauthenticatedError,
        "stopping": RunnerGoneError,
        "expired": DeadlineExceededError,
        "hung": RunnerHungError,
    }
    found = kinds.get(kind, MillraceError)(_message(frame))
    if isinstance(found, InvalidInputError | ModelError) and isinstance(error, dict):
        found.exception, found.line = (
            printable(text) if isinstance(text, str) else None for text in (error.get("exception"), error.get("line"))
        )
    return found
