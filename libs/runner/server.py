"""The loop: one thread reads sockets, the main thread predicts, one request after the other.

Handshakes, pings and metadata are answered by the reading thread, so a runner whose model is busy still answers
those. Requests may be pipelined; a connection with too many unanswered ones is not read from until some are.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import queue
import random
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any

from .errors import InvalidInputError, first_sentence
from .formats import Model
from .wire import Arrays, Buffer, Frame, FrameReader, WireError, decode_tensors, encode_frame, encode_tensors, parse_json_object

MAX_UNANSWERED = 256
_RECEIVE_BYTES = 256 * 1024
_FLUSH_S = 2.0

# Trace flags in a traceparent: bit 0 is "sampled"; other bits may be set beside it.
_SAMPLED = 1


class Connection:
    """One client: its socket, what is half read and what is not yet written."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = FrameReader(trusted=False)
        self.unanswered = 0
        self.paused = False
        self.closed = False
        self.lock = threading.Lock()
        self.outgoing: deque[memoryview] = deque()

    def count(self, change: int) -> int:
        """Add to the number of unanswered requests and return it."""
        with self.lock:
            self.unanswered += change
            return self.unanswered

    def write(self, parts: Sequence[Buffer]) -> bool:
        """Write what the socket takes and keep the rest; return whether something is kept."""
        with self.lock:
            if self.closed:
                return False
            self.outgoing.extend(memoryview(part) for part in parts)
            return self._flush()

    def flush(self) -> bool:
        """Write what was kept; return whether something is still kept."""
        with self.lock:
            return False if self.closed else self._flush()

    def _flush(self) -> bool:
        try:
            while self.outgoing:
                part = self.outgoing[0]
                sent = self.sock.send(part)
                if sent == len(part):
                    self.outgoing.popleft()
                else:
                    self.outgoing[0] = part[sent:]
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            # The peer is gone: the reading thread sees it too and closes.
            self.outgoing.clear()
        return bool(self.outgoing)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.outgoing.clear()
            self.sock.close()


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
    """

    def __init__(self, model: Model, signature: dict[str, Any], token: str, listener: socket.socket) -> None:
        self._model = model
        self._signature = signature
        self._inputs = {spec["name"]: spec for spec in signature["inputs"]}
        self._outputs = [spec["name"] for spec in signature["outputs"]]
        self._token = token.encode()
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = os.pipe()
        self._changed: deque[Connection] = deque()
        self._requests: queue.SimpleQueue[tuple[Connection, Frame] | None] = queue.SimpleQueue()
        self._connections: set[Connection] = set()
        self._stopping = False
        self._busy_since: float | None = None
        self._buffer = bytearray(_RECEIVE_BYTES)

    def start(self) -> None:
        """Start reading; call from the main thread."""
        signal.signal(signal.SIGTERM, lambda *_: self._requests.put(None))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._listener.setblocking(False)
        os.set_blocking(self._wake_receiver, False)
        os.set_blocking(self._wake_sender, False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._apply_changes)
        threading.Thread(target=self._read_loop, name="sockets", daemon=True).start()

    def run(self) -> int:
        """Predict until told to stop, then finish what was asked before; the value is the exit status."""
        while True:
            request = self._requests.get()
            if request is None:
                break
            connection, frame = request
            if not connection.closed:
                self._busy_since = time.monotonic()
                answer = self._predict(frame)
                self._busy_since = None
                self._answer(connection, answer)
            unanswered = connection.count(-1)
            if connection.paused and unanswered <= MAX_UNANSWERED // 2:
                self._notify(connection)
        self._finish()
        return 0

    def _finish(self) -> None:
        """Write out the answers and leave at once: exit handlers are the model's code."""
        self._stopping = True
        deadline = time.monotonic() + _FLUSH_S
        while time.monotonic() < deadline and any(connection.flush() for connection in list(self._connections)):
            time.sleep(0.005)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)

    # The reading thread -----------------------------------------------------------------------------------------

    def _read_loop(self) -> None:
        try:
            while True:
                for key, events in self._selector.select():
                    if isinstance(key.data, Connection):
                        self._serve(key.data, events)
                    else:
                        key.data()
        except BaseException:  # noqa: BLE001 (a runner that cannot read is of no use: die, so that the supervisor sees it)
            traceback.print_exc()
            os._exit(70)

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

    def _notify(self, connection: Connection) -> None:
        """Have the reading thread look at a connection again."""
        self._changed.append(connection)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_sender, b"\0")

    def _apply_changes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_receiver, 4096)
        while self._changed:
            self._register(self._changed.popleft())

    def _register(self, connection: Connection) -> None:
        if connection.closed:
            return
        # Set before it is tested: the other thread counts down first and looks at the flag then.
        connection.paused = True
        connection.paused = connection.unanswered >= MAX_UNANSWERED
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
            size = connection.sock.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            size = 0
        if size == 0:
            self._drop(connection)
            return
        try:
            # A stranger's bytes are read frame by frame: what follows the handshake is trusted only after it.
            view = memoryview(self._buffer)[:size]
            for frame in self._frames(connection, view):
                self._take(connection, frame)
        except WireError as error:
            self._answer(connection, _failure(0, "protocol", str(error)))
            self._drop(connection)
            return
        if connection.unanswered >= MAX_UNANSWERED:
            self._register(connection)

    def _frames(self, connection: Connection, view: memoryview) -> Any:
        while view and not connection.closed:
            size = len(view) if connection.reader.trusted else 1
            yield from connection.reader.feed(view[:size])
            view = view[size:]

    def _drop(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(connection.sock)
            connection.close()

    def _take(self, connection: Connection, frame: Frame) -> None:
        request_id, operation = frame.meta.get("id"), frame.meta.get("op")
        if not isinstance(request_id, int) or isinstance(request_id, bool):
            raise WireError("a frame's id is not an integer")
        if not connection.reader.trusted:
            self._handshake(connection, frame, request_id)
        elif self._stopping:
            self._answer(connection, _failure(request_id, "stopping", "the runner is stopping"))
        elif operation == "infer":
            connection.count(1)
            self._requests.put((connection, frame))
        elif operation in ("ping", "hello"):
            self._answer(connection, encode_frame({"id": request_id, "ok": True, "busy_s": self._busy_s()}))
        elif operation == "metadata":
            self._answer(connection, encode_frame({"id": request_id, "ok": True}, json.dumps(self._metadata()).encode()))
        elif operation == "stop":
            self._answer(connection, encode_frame({"id": request_id, "ok": True}))
            self._requests.put(None)
        else:
            self._answer(connection, _failure(request_id, "protocol", f"the runner has no operation {operation!r}"))

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

    # The main thread --------------------------------------------------------------------------------------------

    def _predict(self, frame: Frame) -> list[Buffer]:
        started_ns = time.time_ns()
        request_id = frame.meta["id"]
        meta: dict[str, Any] = {"id": request_id, "ok": True}
        head = b""
        tail: list[Buffer] = []
        try:
            inputs, outputs, name = self._parse(frame)
            answers = self._model.predict(inputs, outputs)
            descriptions, tail = encode_tensors(answers)
            head = json.dumps({"id": name, "outputs": descriptions}, separators=(",", ":")).encode()
        except (InvalidInputError, WireError) as error:
            meta.update(_error("invalid_input", str(error)))
        except BaseException as error:  # noqa: BLE001 (the model's code may raise anything, SystemExit too)
            traceback.print_exc()
            meta.update(_error("model_error", _sentence(error)))
        span = _span(frame.meta.get("traceparent"), started_ns)
        if span is not None:
            meta["span"] = span
        return encode_frame(meta, head, tail) if meta["ok"] else encode_frame(meta)

    def _parse(self, frame: Frame) -> tuple[Arrays, list[str], Any]:
        head = parse_json_object(frame.head, "head")
        descriptions = head.get("inputs")
        if not isinstance(descriptions, list):
            raise InvalidInputError("the request has no list 'inputs'")
        arrays = decode_tensors(descriptions, frame.tail)
        self._check_inputs(arrays, descriptions)
        return arrays, self._requested(head.get("outputs")), head.get("id")

    def _check_inputs(self, arrays: Arrays, descriptions: list[dict[str, Any]]) -> None:
        for name in self._inputs:
            if name not in arrays:
                raise InvalidInputError(f"input '{name}' is missing")
        for description in descriptions:
            name, shape = description["name"], description["shape"]
            spec = self._inputs.get(name)
            if spec is None:
                raise InvalidInputError(f"the model has no input '{name}'; it has {', '.join(sorted(self._inputs))}")
            if description["datatype"] != spec["datatype"]:
                raise InvalidInputError(f"input '{name}' expects {spec['datatype']}, got {description['datatype']}")
            if not fits(shape, spec["shape"]):
                raise InvalidInputError(f"input '{name}' expects shape {spec['shape']}, got {shape}")

    def _requested(self, requested: Any) -> list[str]:
        if not requested:
            return self._outputs[:1]
        names: dict[str, None] = {}
        for item in requested if isinstance(requested, list) else [requested]:
            name = str(item.get("name")) if isinstance(item, dict) else ""
            if name not in self._outputs:
                raise InvalidInputError(f"the model has no output {name!r}; it has {', '.join(self._outputs)}")
            names[name] = None
        return list(names)


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


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"ok": False, "error": {"kind": kind, "message": message}}


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
