"""A connection without a network: the server's protocol on a transport that is a list, and a clock that is set."""

import asyncio
import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from libs.metrics import Metrics
from services.gateway.http import AsgiApp, Connections, Exchange
from services.gateway.settings import HttpSettings

JSON = (b"content-type", b"application/json")
MAX_BODY_BYTES = 1_000_000

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [ -~]*")
_FIELD = re.compile(rb"([a-z0-9-]+): ([ -~]*)")


class Echo:
    """An application that tells what it was asked; ``later`` keeps the exchanges instead."""

    def __init__(self, *, later: bool = False, wants: Any = MAX_BODY_BYTES) -> None:
        self.later = later
        self.wants = wants
        self.admitted: list[Exchange] = []
        self.handled: list[Exchange] = []

    def admit(self, exchange: Exchange) -> int | AsgiApp | None:
        self.admitted.append(exchange)
        return self.wants(exchange) if callable(self.wants) and not asyncio.iscoroutinefunction(self.wants) else self.wants

    def handle(self, exchange: Exchange) -> None:
        self.handled.append(exchange)
        if not self.later:
            echo(exchange)


def echo(exchange: Exchange) -> None:
    """Answer with what was asked."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.headers.items()}
    asked = {
        "method": exchange.method,
        "path": exchange.raw_path.decode(),
        "query": exchange.query.decode(),
        "version": exchange.http_version,
        "headers": headers,
        "body": bytes(exchange.body).decode("latin-1"),
    }
    exchange.respond(200, [JSON], orjson.dumps(asked))


@dataclass
class Answer:
    """An answer as a client reads it."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def closes(self) -> bool:
        return self.headers.get(b"connection") == b"close"


def read_answers(data: bytes, methods: list[str] | None = None) -> list[Answer]:
    """Read a whole stream of answers, strictly; fails on anything that is not HTTP."""
    return list(_answers(data, methods or []))


def _answers(data: bytes, methods: list[str]) -> Iterator[Answer]:
    number = 0
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, f"an answer without the end of its head: {head[:200]!r}"
        first, *lines = head.split(b"\r\n")
        match = _STATUS_LINE.fullmatch(first)
        assert match, f"not a status line: {first!r}"
        status = int(match[1])
        headers: dict[bytes, bytes] = {}
        for line in lines:
            found = _FIELD.fullmatch(line)
            assert found, f"not a header field: {line!r}"
            assert found[1] not in headers
            headers[found[1]] = found[2]
        if status == 100:
            yield Answer(status, headers, b"")
            continue
        method = methods[number] if number < len(methods) else "GET"
        number += 1
        body, data = _body(headers, data) if method != "HEAD" and status not in (204, 304) else (b"", data)
        yield Answer(status, headers, body)


def _body(headers: dict[bytes, bytes], data: bytes) -> tuple[bytes, bytes]:
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while True:
            size, end, data = data.partition(b"\r\n")
            assert end
            length = int(size, 16)
            body, tail, data = body + data[:length], data[length : length + 2], data[length + 2 :]
            assert tail == b"\r\n"
            if length == 0:
                return body, data
    if b"content-length" not in headers:
        return data, b""
    length = int(headers[b"content-length"])
    assert len(data) >= length
    return data[:length], data[length:]


class Clock:
    """As much of an event loop as ``Connections`` needs, its time set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._soon: list[Callable[[], None]] = []
        self._count = 0

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        self._count += 1
        heapq.heappush(self._later, (self.now + delay, self._count, callback))
        return asyncio.Handle(callback, (), self)  # type: ignore[arg-type]

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def get_debug(self) -> bool:
        return False

    def run_soon(self) -> int:
        """Run what was put off; the value is how much that was."""
        ran = 0
        while self._soon:
            self._soon.pop(0)()
            ran += 1
        return ran

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._later and self._later[0][0] <= end:
            self.now, _, callback = heapq.heappop(self._later)
            callback()
        self.now = end


@dataclass
class Wire(asyncio.Transport):
    """The transport, and the client's end of it."""

    address: tuple[str, int] = ("127.0.0.1", 50_000)
    sent: bytearray = field(default_factory=bytearray)
    is_reading: bool = True
    is_ended: bool = False
    is_closed: bool = False
    is_aborted: bool = False
    unsent: int = 0
    writes: int = 0
    on_abort: Callable[[], Any] | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self.address, "sockname": ("127.0.0.1", 8080)}.get(name, default)

    def write(self, data: Any) -> None:
        assert not self.is_ended, "written after the end"
        assert not self.is_closed, "written to a closed connection"
        self.sent += data
        self.writes += 1

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self.is_ended = True

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = self.is_aborted = True
        if self.on_abort is not None:
            self.on_abort()

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        assert self.is_reading
        self.is_reading = False

    def resume_reading(self) -> None:
        assert not self.is_reading
        self.is_reading = True

    def get_write_buffer_size(self) -> int:
        return self.unsent


class Line:
    """One client's connection to an application: what the client does, and what it sees."""

    def __init__(
        self,
        application: Any = None,
        connections: Connections | None = None,
        address: tuple[str, int] = ("127.0.0.1", 50_000),
        **limits: Any,
    ) -> None:
        self.application = application or Echo()
        self.clock: Any = Clock() if connections is None else connections.loop
        self.connections = connections or Connections(self.application, HttpSettings(**limits), self.clock, Metrics())
        self.wire = Wire(address)
        self.protocol = self.connections.make()
        self.protocol.connection_made(self.wire)
        self._is_lost = False

    def send(self, *pieces: bytes) -> "Line":
        for piece in pieces:
            if self.wire.is_closed:
                break
            assert self.wire.is_reading
            self.protocol.data_received(piece)
        self.settle()
        return self

    def end(self) -> "Line":
        """The client ends its sending side."""
        if not self.wire.is_closed and not self.protocol.eof_received():
            self.wire.close()
        return self.settle()

    def lose(self) -> "Line":
        """The client is gone."""
        self.wire.is_closed = True
        return self.settle()

    def settle(self) -> "Line":
        while isinstance(self.clock, Clock) and self.clock.run_soon():
            pass
        if self.wire.is_closed and not self._is_lost:
            self._is_lost = True
            self.protocol.connection_lost(None)
        return self

    def wait(self, seconds: float) -> "Line":
        self.clock.advance(seconds)
        return self.settle()

    @property
    def answers(self) -> list[Answer]:
        return read_answers(bytes(self.wire.sent), [exchange.method for exchange in self.application.admitted])

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]

    @property
    def refused(self) -> dict[int, float]:
        """What the server itself refused, on all its connections, by status."""
        return {int(sample.labels[0]): sample.value for sample in self.connections._metrics.samples()}

    @property
    def is_over(self) -> bool:
        """Whether the client reads the end of the stream after the answers."""
        return self.wire.is_ended or self.wire.is_closed
