"""Client of one runner: requests go out as they come, answers come back by id."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from libs.errors import DeadlineExceededError, MillraceError, UnauthenticatedError
from libs.inference.errors import InvalidInputError, ModelError, RunnerGoneError, printable
from libs.inference.requests import InferResponse, Span
from libs.inference.tensors import Array
from libs.runner.wire import Buffer, Frame, FrameReader, WireError, decode_tensors, encode_frame, encode_tensors

_SPAN_ID = re.compile("[0-9a-f]{16}")


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
        self._closed = False

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
        descriptions, tail = encode_tensors(inputs)
        document: dict[str, Any] = {"inputs": descriptions}
        if outputs:
            document["outputs"] = [{"name": name} for name in outputs]
        meta = {"op": "infer"} if traceparent is None else {"op": "infer", "traceparent": traceparent}
        frame = await self._request(meta, orjson.dumps(document), tail, timeout_s)
        return _response(frame)

    async def metadata(self, *, timeout_s: float | None = 10.0) -> dict[str, Any]:
        """Return the runner's signature (``signature``) and peak memory (``memory_peak_bytes``)."""
        frame = await self._request({"op": "metadata"}, timeout_s=timeout_s)
        document: dict[str, Any] = orjson.loads(frame.head)
        return document

    async def ping(self, *, timeout_s: float | None = 5.0) -> float:
        """Return when the runner answers, which it does also while its model is busy.

        The value is for how many seconds the model has been busy with one request; 0 when it is idle or the runner does not say.
        """
        frame = await self._request({"op": "ping"}, timeout_s=timeout_s)
        busy_s = frame.meta.get("busy_s")
        return float(busy_s) if isinstance(busy_s, int | float) else 0.0

    async def stop(self, *, timeout_s: float | None = 5.0) -> None:
        """Ask the runner to finish what it was asked and end."""
        await self._request({"op": "stop"}, timeout_s=timeout_s)

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

    async def _request(
        self, meta: Mapping[str, Any], head: bytes = b"", tail: Sequence[Buffer] = (), timeout_s: float | None = None
    ) -> Frame:
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._connection
                if connection is None or connection.lost:
                    connection = await self._connect()
                return await connection.request(meta, head, tail)
        except TimeoutError as error:
            raise DeadlineExceededError(f"the runner did not answer within {timeout_s} s") from error

    async def _connect(self) -> "_Connection":
        async with self._connecting:
            if self._closed:
                raise RunnerGoneError("the client of the runner is closed")
            if self._connection is not None and not self._connection.lost:
                return self._connection
            connection = await self._open()
            try:
                await connection.request({"op": "hello", "token": self._token})
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
        self._reader = FrameReader()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = asyncio.Event()
        self._reason = "the runner closed the connection"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio.Protocol)
        self.lost = True
        self._writable.set()
        self._ended.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RunnerGoneError(self._reason))
        self._waiting.clear()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            frames = self._reader.feed(data)
        except WireError as error:
            self._reason = f"the runner's answer cannot be read: {error}"
            self.abort()
            return
        for frame in frames:
            future = self._waiting.pop(frame.meta.get("id", 0), None)
            if future is not None and not future.done():
                future.set_result(frame)
            elif frame.meta.get("id") == 0 and not frame.meta.get("ok"):
                self._reason = f"the runner refused the connection: {_message(frame)}"

    async def request(self, meta: Mapping[str, Any], head: bytes = b"", tail: Sequence[Buffer] = ()) -> Frame:
        """Send one frame and wait for its answer.

        Raises
        ------
        MillraceError
            What the runner answered, as an exception.
        """
        await self._writable.wait()
        if self.lost or self._transport is None:
            raise RunnerGoneError(self._reason)
        request_id = next(self._ids)
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            for part in encode_frame({"id": request_id, **meta}, head, tail):
                self._transport.write(part)
            frame = await future
        finally:
            self._waiting.pop(request_id, None)
            if self._retired:
                self.retire()
        if frame.meta.get("ok") is not True:
            raise _as_error(frame)
        return frame

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


def _response(frame: Frame) -> InferResponse:
    try:
        document = orjson.loads(frame.head)
        outputs = decode_tensors(document["outputs"], frame.tail)
    except (WireError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"the runner's answer cannot be read: {error}") from error
    return InferResponse(outputs, _span(frame.meta.get("span")))


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
    }
    return kinds.get(kind, MillraceError)(_message(frame))
