"""The loop: the main thread reads sockets and predicts, one request after the other.

Nothing is handed from thread to thread while the model is quick, because that costs more than a small model's
predict. A second thread, the stand-in, reads the sockets while the model has been busy with one request for
longer than ``STAND_IN_AFTER_S``: a runner whose model is busy still answers handshakes, pings and metadata, takes
requests in, and drops those that are cancelled. It also ends the process when the model hangs.

**Who reads.** Whoever holds ``_reading``. The main thread holds it while it waits for requests; the stand-in takes it
only while the main thread is busy, and gives it back when that is over: at once if the main thread has nothing else
to do, else with the next frame. No wake-up is lost: the main thread first says that it is not busy and then writes
to the wake pipe, and the stand-in looks whether it is busy before each wait. Writing is anybody's, under the
connection's lock.

Requests may be pipelined; a connection with too many unanswered ones is not read from until some are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hmac
import os
import random
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from .errors import InvalidInputError, first_sentence, own_line
from .formats import Model
from .wire import (
    REMEMBERED_HEAD_BYTES,
    REMEMBERED_HEADS,
    Buffer,
    Frame,
    FrameReader,
    TensorSpec,
    WireError,
    decode_tensors,
    describe_tensors,
    encode_frame,
    encode_json,
    encode_tensors,
    join_frame,
    parse_json_object,
    read_descriptions,
)

MAX_UNANSWERED = 256
STAND_IN_AFTER_S = 0.01
"""The stand-in looks this often, so it reads once the model has been busy with one request for one to two of these."""

HUNG_STATUS = 75
"""Exit status of a runner whose model hung; the number is ``EX_TEMPFAIL``: another runner may do better."""

_LOOK_AFTER_S = 0.001
_GUARD_EVERY, _GUARD_AFTER = 0.25, 1.5
"""Parts of the limit: how often the guard is put off, and when it ends the process that did not."""

_REST_AFTER_LOOKS = 100
_RECEIVE_BYTES = 64 * 1024
_FLUSH_S = 2.0
_LONGEST_TIMEOUT_MS = 2**53

# Trace flags in a traceparent: bit 0 is "sampled"; other bits may be set beside it.
_SAMPLED = 1


class Connection:
    """One client: its socket, what is half read, what is not yet answered and what is not yet written."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = FrameReader(trusted=False)
        self.unanswered: dict[int, Request] = {}
        self.paused = False
        self.closed = False
        self.lock = threading.Lock()
        self.outgoing: deque[Buffer] = deque()

    def write(self, parts: Sequence[Buffer]) -> bool:
        """Write what the socket takes and keep the rest; return whether something is kept."""
        with self.lock:
            if self.closed:
                return False
            self.outgoing.extend(parts)
            return self._flush()

    def flush(self) -> bool:
        """Write what was kept; return whether something is still kept."""
        with self.lock:
            return False if self.closed else self._flush()

    def _flush(self) -> bool:
        outgoing = self.outgoing
        try:
            while outgoing:
                part = outgoing[0]
                sent = self.sock.send(part)
                if sent == len(part):
                    outgoing.popleft()
                else:
                    outgoing[0] = memoryview(part)[sent:]
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            # The peer is gone: whoever reads sees it too and closes.
            outgoing.clear()
        return False

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.outgoing.clear()
            self.sock.close()


class Request:
    """One request that waits or is being answered; ``deadline_s`` is on the monotonic clock."""

    __slots__ = ("connection", "deadline_s", "frame", "is_cancelled", "request_id")

    def __init__(self, connection: Connection, frame: Frame, request_id: int, deadline_s: float | None) -> None:
        self.connection = connection
        self.frame = frame
        self.request_id = request_id
        self.deadline_s = deadline_s
        self.is_cancelled = False


class Call(NamedTuple):
    """What the head of a request means."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    name: Any


class Server:
    """Answers the frames of authenticated connections with one model.

    Parameters
    ----------
    signature
        What ``model.describe()`` returned.
    token
        What the first frame of a connection must carry.
    listener
        The listening socket that the supervisor made.
    predict_timeout_s
        A model that is busy with one request for longer hangs, and the process ends with ``HUNG_STATUS``; None: never.
    code
        The folder of the modules that came with the model.
    """

    def __init__(
        self,
        model: Model,
        signature: dict[str, Any],
        token: str,
        listener: socket.socket,
        predict_timeout_s: float | None = None,
        code: str | None = None,
    ) -> None:
        self._model = model
        self._code = code
        self._signature = signature
        self._inputs = {spec["name"]: spec for spec in signature["inputs"]}
        self._columns = {spec["name"] for spec in signature["inputs"] if spec.get("dtype")}
        self._outputs = [spec["name"] for spec in signature["outputs"]]
        self._token = token.encode()
        self._listener = listener
        self._predict_timeout_s = predict_timeout_s
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = os.pipe()
        self._connections: set[Connection] = set()
        self._changed: deque[Connection] = deque()
        self._requests: deque[Request] = deque()
        self._remembered = lru_cache(maxsize=REMEMBERED_HEADS)(self._understand)
        self._ending = False
        self._stopping = False
        self._finished = False
        self._reading = threading.Lock()
        self._looked_s = 0.0
        self._current: Request | None = None
        self._sequence = 0
        self._busy_since: float | None = None
        self._resting = False
        self._rouse = threading.Event()
        self._guard_due_s = 0.0

    def start(self) -> None:
        """Take note of connections from now on."""
        self._listener.setblocking(False)
        os.set_blocking(self._wake_receiver, False)
        os.set_blocking(self._wake_sender, False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._drain)
        threading.Thread(target=self._stand_by, name="stand-in", daemon=True).start()

    def obey_signals(self) -> None:
        """End on SIGTERM; call from the main thread."""
        # Whichever thread the kernel hands a signal to, the one that waits in select() must look.
        signal.set_wakeup_fd(self._wake_sender, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end(self) -> None:
        """Have ``run`` finish what was asked and return; from any thread or signal handler."""
        self._ending = True
        self._wake()

    def run(self) -> None:
        """Predict until told to end, then finish what was asked before and write out the answers."""
        while (request := self._next()) is not None:
            self._work(request)
        self._finish()

    def close(self) -> None:
        """Free what a server that has run holds; a process that ends then need not."""
        faulthandler.cancel_dump_traceback_later()
        for connection in list(self._connections):
            self._drop(connection)
        self._selector.close()
        os.close(self._wake_receiver)
        os.close(self._wake_sender)

    # The main thread --------------------------------------------------------------------------------------------

    def _next(self) -> Request | None:
        """Return what to do next, or None when all that was asked before the end is done."""
        while True:
            if self._ending and not self._stopping:
                # What had been sent before we were told to stop is still answered.
                self._look()
                self._stopping = True
            elif not self._requests or time.monotonic() - self._looked_s > _LOOK_AFTER_S:
                self._look()
            if self._requests:
                return self._requests.popleft()
            if self._stopping:
                return None

    def _look(self) -> None:
        """Read what there is, and if nothing is left to do wait for more; the stand-in may be reading at the moment."""
        if not self._reading.acquire(blocking=False):
            if self._requests:
                return
            self._wake()
            self._reading.acquire()
        try:
            self._poll(0 if self._requests or self._ending else None)
            while not self._requests and not self._ending:
                self._poll(None)
        finally:
            self._reading.release()

    def _work(self, request: Request) -> None:
        connection = request.connection
        if not connection.closed and not request.is_cancelled:
            self._current = request
            self._sequence += 1
            self._busy_since = time.monotonic()
            # In this order, and the stand-in looks in the other: it never rests while there is something to watch.
            if self._resting:
                self._rouse.set()
            answer = self._predict(request)
            self._busy_since = self._current = None
            if not request.is_cancelled:
                self._answer(connection, answer)
        connection.unanswered.pop(request.request_id, None)
        if connection.paused and len(connection.unanswered) <= MAX_UNANSWERED // 2:
            self._notify(connection)

    def _finish(self) -> None:
        deadline = time.monotonic() + _FLUSH_S
        while time.monotonic() < deadline and sum(connection.flush() for connection in list(self._connections)):
            time.sleep(0.005)
        self._finished = True
        self._rouse.set()

    # The stand-in -----------------------------------------------------------------------------------------------

    def _stand_by(self) -> None:
        try:
            seen, idle_looks = -1, 0
            while not self._finished:
                idle_looks = idle_looks + 1 if seen == self._sequence else 0
                seen = self._sequence
                self._guard()
                if idle_looks >= _REST_AFTER_LOOKS:
                    self._rest(seen)
                time.sleep(STAND_IN_AFTER_S)
                if self._is_busy_with(seen):
                    self._stand_in(seen)
        except BaseException:  # noqa: BLE001 (a runner that cannot be watched is of no use: die, so that the supervisor sees it)
            traceback.print_exc()
            os._exit(70)

    def _is_busy_with(self, sequence: int) -> bool:
        return self._sequence == sequence and self._busy_since is not None

    def _rest(self, seen: int) -> None:
        """Wait until the main thread begins on a request; at a few looks a second an idle runner would keep a machine awake."""
        self._rouse.clear()
        self._resting = True
        if self._sequence == seen and self._busy_since is None and not self._finished:
            self._rouse.wait(None if self._predict_timeout_s is None else self._predict_timeout_s * _GUARD_EVERY)
        self._resting = False

    def _stand_in(self, sequence: int) -> None:
        """Read while the model is busy with this request."""
        if not self._reading.acquire(blocking=False):
            return
        try:
            while self._is_busy_with(sequence):
                self._guard()
                self._poll(self._left_s())
                self._end_if_hung(sequence)
        finally:
            self._reading.release()

    def _guard(self) -> None:
        """Put off the end that comes without this thread: a model that keeps the interpreter to itself lets nobody else run.

        ``faulthandler`` waits in a thread that needs no interpreter; it then writes where the model is and ends the process with status 1.
        """
        limit_s, now_s = self._predict_timeout_s, time.monotonic()
        if limit_s is not None and now_s >= self._guard_due_s:
            self._guard_due_s = now_s + limit_s * _GUARD_EVERY
            faulthandler.dump_traceback_later(limit_s * _GUARD_AFTER + 1.0, exit=True, file=2)

    def _left_s(self) -> float | None:
        """Seconds until there is something to do: the model is taken for hung, or the guard is due."""
        limit_s = self._predict_timeout_s
        return None if limit_s is None else max(0.0, min(limit_s - self._busy_s(), limit_s * _GUARD_EVERY))

    def _end_if_hung(self, sequence: int) -> None:
        limit_s, request = self._predict_timeout_s, self._current
        if limit_s is None or request is None or self._busy_s() < limit_s or not self._is_busy_with(sequence):
            return
        message = f"the model has been busy with one request for more than {limit_s:g} s"
        # Its caller is told, so that nobody tries the same elsewhere; the others are, as the connection ends.
        request.connection.write(_failure(request.request_id, "hung", message))
        with contextlib.suppress(OSError):
            os.write(2, f"{message}: the runner ends itself\n".encode())
        os._exit(HUNG_STATUS)

    # Whoever reads ----------------------------------------------------------------------------------------------

    def _poll(self, timeout_s: float | None) -> None:
        while self._changed:
            self._register(self._changed.popleft())
        for key, events in self._selector.select(timeout_s):
            if isinstance(key.data, Connection):
                self._serve(key.data, events)
            else:
                key.data()
        self._looked_s = time.monotonic()

    def _wake(self) -> None:
        """Have whoever waits for sockets look again; also called by a signal handler."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_sender, b"\0")

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_receiver, 4096)

    def _notify(self, connection: Connection) -> None:
        """Have whoever reads look at a connection again."""
        self._changed.append(connection)
        self._wake()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock)
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _register(self, connection: Connection) -> None:
        if connection.closed:
            return
        # Set before it is tested: the main thread counts down first and looks at the flag then.
        connection.paused = True
        connection.paused = len(connection.unanswered) >= MAX_UNANSWERED
        events = 0 if connection.paused else selectors.EVENT_READ
        if connection.flush():
            events |= selectors.EVENT_WRITE
        registered = connection.sock in self._selector.get_map()
        if events and registered:
            self._selector.modify(connection.sock, events, connection)
        elif events:
            self._selector.register(connection.sock, events, connection)
        elif registered:
            self._selector.unregister(connection.sock)

    def _serve(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._register(connection)
        if events & selectors.EVENT_READ and not connection.closed:
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            for frame in self._receive(connection):
                self._take(connection, frame)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(connection)
            return
        except WireError as error:
            self._answer(connection, _failure(0, "protocol", str(error)))
            self._drop(connection)
            return
        if len(connection.unanswered) >= MAX_UNANSWERED:
            self._register(connection)

    def _receive(self, connection: Connection) -> Iterable[Frame]:
        """Return what is complete with the next bytes; the rest of a large tail is received in its place."""
        reader = connection.reader
        room = reader.room
        if room is not None:
            size = connection.sock.recv_into(room)
            if size == 0:
                raise ConnectionResetError
            return reader.fill(size)
        data = connection.sock.recv(_RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError
        return reader.feed(data) if reader.trusted else self._frames_of_a_stranger(connection, data)

    @staticmethod
    def _frames_of_a_stranger(connection: Connection, data: bytes) -> Iterator[Frame]:
        """Read frame by frame: what follows the handshake is trusted only after it."""
        while data and not connection.closed:
            size = len(data) if connection.reader.trusted else 1
            yield from connection.reader.feed(data[:size])
            data = data[size:]

    def _drop(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(connection.sock)
            connection.close()

    def _take(self, connection: Connection, frame: Frame) -> None:
        request_id, operation = frame.meta.get("id"), frame.meta.get("op")
        if type(request_id) is not int:
            raise WireError("a frame's id is not an integer")
        if not connection.reader.trusted:
            self._handshake(connection, frame, request_id)
        elif operation == "infer":
            self._enqueue(connection, frame, request_id)
        elif operation == "cancel":
            request = connection.unanswered.get(request_id)
            if request is not None:
                request.is_cancelled = True
        elif operation in ("ping", "hello"):
            self._answer(connection, encode_frame({"id": request_id, "ok": True, "busy_s": self._busy_s()}))
        elif operation == "metadata":
            self._answer(connection, encode_frame({"id": request_id, "ok": True}, encode_json(self._metadata())))
        elif operation == "stop":
            self._answer(connection, encode_frame({"id": request_id, "ok": True}))
            self.end()
        else:
            self._answer(connection, _failure(request_id, "protocol", f"the runner has no operation {operation!r}"))

    def _enqueue(self, connection: Connection, frame: Frame, request_id: int) -> None:
        if self._stopping:
            self._answer(connection, _failure(request_id, "stopping", "the runner is stopping"))
            return
        request = Request(connection, frame, request_id, _deadline_s(frame.meta.get("timeout_ms")))
        connection.unanswered[request_id] = request
        self._requests.append(request)

    def _handshake(self, connection: Connection, frame: Frame, request_id: int) -> None:
        given = frame.meta.get("token")
        accepted = isinstance(given, str) and hmac.compare_digest(given.encode("utf-8", "replace"), self._token)
        if frame.meta.get("op") != "hello" or not accepted:
            self._answer(connection, _failure(request_id, "unauthenticated", "the first frame must be hello with this runner's token"))
            self._drop(connection)
            return
        connection.reader.trusted = True
        self._answer(connection, encode_frame({"id": request_id, "ok": True}))

    def _busy_s(self) -> float:
        """For how many seconds the model has been busy with one request; 0 when it is idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _metadata(self) -> dict[str, Any]:
        return {"signature": self._signature, "memory_peak_bytes": memory_peak_bytes()}

    def _answer(self, connection: Connection, parts: Sequence[Buffer]) -> None:
        if connection.write(parts):
            self._notify(connection)

    # One request ------------------------------------------------------------------------------------------------

    def _predict(self, request: Request) -> list[Buffer]:
        if request.deadline_s is not None and time.monotonic() >= request.deadline_s:
            return _failure(request.request_id, "expired", "the request's time was over before the model could begin on it")
        started_ns = time.time_ns()
        model_s = 0.0
        head = b""
        tail: list[Buffer] = []
        failure: dict[str, Any] | None = None
        try:
            call = self._call(request.frame.head)
            inputs = decode_tensors(call.inputs, request.frame.tail, self._columns)
            began = time.perf_counter()
            try:
                answers = self._model.predict(inputs, call.outputs)
            finally:
                model_s = time.perf_counter() - began
            specs, tail = encode_tensors(answers)
            head = _answer_head(call.name, specs)
        except (InvalidInputError, WireError) as error:
            failure = _error("invalid_input", str(error), error.__cause__, self._code)
        except BaseException as error:  # noqa: BLE001 (the model's code may raise anything, SystemExit too)
            traceback.print_exc()
            failure = _error("model_error", _sentence(error), error, self._code)
        span = _span(request.frame.meta.get("traceparent"), started_ns)
        if failure is None and span is None:
            return join_frame(b'{"id":%d,"ok":true,"model_s":%.9f}' % (request.request_id, model_s), head, tail)
        meta: dict[str, Any] = {"id": request.request_id, "ok": True, "model_s": model_s}
        if span is not None:
            meta["span"] = span
        return encode_frame(meta, head, tail) if failure is None else encode_frame({**meta, **failure})

    def _call(self, head: bytes) -> Call:
        return self._remembered(head) if len(head) <= REMEMBERED_HEAD_BYTES else self._understand(head)

    def _understand(self, data: bytes) -> Call:
        head = parse_json_object(data, "head")
        descriptions, name = head.get("inputs"), head.get("id")
        if not isinstance(descriptions, list):
            raise InvalidInputError("the request has no list 'inputs'")
        if not isinstance(name, (str, type(None))):
            raise InvalidInputError("the request's id is not a string")
        specs = read_descriptions(descriptions)
        self._check_inputs(specs)
        return Call(specs, self._requested(head.get("outputs")), name)

    def _check_inputs(self, specs: Sequence[TensorSpec]) -> None:
        given = {spec.name for spec in specs}
        for name in self._inputs:
            if name not in given:
                raise InvalidInputError(f"input '{name}' is missing")
        for name, datatype, shape, _ in specs:
            wanted = self._inputs.get(name)
            if wanted is None:
                raise InvalidInputError(f"the model has no input '{name}'; it has {', '.join(sorted(self._inputs))}")
            if datatype != wanted["datatype"]:
                raise InvalidInputError(f"input '{name}' expects {wanted['datatype']}, got {datatype}")
            if not fits(shape, wanted["shape"]):
                raise InvalidInputError(f"input '{name}' expects shape {wanted['shape']}, got {list(shape)}")

    def _requested(self, requested: Any) -> tuple[str, ...]:
        if not requested:
            return tuple(self._outputs[:1])
        names: dict[str, None] = {}
        for item in requested if isinstance(requested, list) else [requested]:
            name = str(item.get("name")) if isinstance(item, dict) else ""
            if name not in self._outputs:
                raise InvalidInputError(f"the model has no output {name!r}; it has {', '.join(self._outputs)}")
            names[name] = None
        return tuple(names)


@lru_cache(maxsize=REMEMBERED_HEADS)
def _answer_head(name: str | None, specs: tuple[TensorSpec, ...]) -> bytes:
    return encode_json({"id": name, "outputs": describe_tensors(specs)})


def _deadline_s(timeout_ms: Any) -> float | None:
    if timeout_ms is None:
        return None
    if type(timeout_ms) is not int or not 0 <= timeout_ms <= _LONGEST_TIMEOUT_MS:
        raise WireError("a frame's timeout_ms is not a whole number of milliseconds")
    return time.monotonic() + timeout_ms / 1000


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Tell whether a shape has the wanted dimensions; -1 stands for any."""
    return len(shape) == len(wanted) and all(size in (got, -1) for got, size in zip(shape, wanted))


def memory_peak_bytes() -> int:
    """Return the largest resident size of this process; unlike ``ru_maxrss`` it owes nothing to the parent's."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _failure(request_id: int, kind: str, message: str) -> list[Buffer]:
    return encode_frame({"id": request_id, **_error(kind, message)})


def _error(kind: str, message: str, exception: BaseException | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the answer that says what went wrong, with the type of what the model raised and the line of its own code."""
    error = {"kind": kind, "message": message}
    if exception is not None:
        error["exception"] = type(exception).__name__
        line = own_line(exception, code)
        if line is not None:
            error["line"] = line
    return {"ok": False, "error": error}


def _sentence(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "the model needs more memory than it is allowed"
    text = first_sentence(error)
    return f"the model raised {type(error).__name__}: {text}" if text else f"the model raised {type(error).__name__}"


def _span(traceparent: Any, started_ns: int) -> dict[str, Any] | None:
    """Return our own span when the caller's trace is sampled: the caller exports it on our behalf."""
    if not isinstance(traceparent, str):
        return None
    try:
        sampled = int(traceparent.rsplit("-", 1)[-1], 16) & _SAMPLED
    except ValueError:
        return None
    if not sampled:
        return None
    span_id = f"{random.getrandbits(64) or 1:016x}"
    return {"span_id": span_id, "start_ns": started_ns, "end_ns": time.time_ns()}
