"""A load generator of our own: HTTP/1.1 requests with one body, from a single process.

    python -m benchmarks.generator closed --connections 32 --seconds 5 --body FILE URL "name: value" …
    python -m benchmarks.generator open --rate 600 --seconds 5 --body FILE URL "name: value" …

``closed`` keeps each connection busy with one request at a time, as ``wrk`` does, and stands in for it where it is not to be had.
``open`` sends at a constant rate whatever the server does; the time of a request counts from when it was due, not from when it could
be sent, so a server that stalls is charged for all who would have come meanwhile (coordinated omission). Prints one line of JSON.
"""

import argparse
import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from benchmarks.figures import percentile

_MOST_CONNECTIONS = 2_000
"""An open loop that needs more at once is refused by whoever is loaded; requests beyond wait here, and their time runs."""

_LEFT_S = 5.0
"""How long answers are waited for after the last request was due."""

_FILLING = 0.3
"""Share of an open loop in which queues may fill before goodput is counted."""

_LAST_CHUNK = b"0\r\n\r\n"
_STATUS = len(b"HTTP/1.1 ")

Answered = Callable[[int], None]


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time; an answer has a content-length, is chunked, or has no body.

    ``answered`` is told the status, or 0 when the connection broke.
    """

    def __init__(self) -> None:
        self.is_open = True
        self._transport: asyncio.Transport
        self._received = b""
        self._answered: Answered | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def ask(self, request: bytes, answered: Answered) -> None:
        """Send a request."""
        self._answered = answered
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._received[:end].lower()
        if _is_whole(head, self._received, end + 4):
            status = int(head[_STATUS : _STATUS + 3])
            self._received = b""
            if b"connection: close" in head:
                self.is_open = False
                self._transport.close()
            self._tell(status)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.is_open = False
        self._tell(0)

    def _tell(self, status: int) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(status)


class Target:
    """Where requests go: the bytes of one, and connections."""

    def __init__(self, url: str, body: bytes, headers: Sequence[str]) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        lines = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}", f"content-length: {len(body)}", *headers]
        self.request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    async def connect(self) -> Connection:
        """A new connection; raises ``OSError``."""
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return connection


class Tally:
    """Answers by status, and the times of those with success, in seconds.

    Parameters
    ----------
    begin_s, end_s
        Answers with success between them, by the monotonic clock, are the goodput: neither the filling of queues nor their draining.
    """

    def __init__(self, begin_s: float, end_s: float) -> None:
        self.statuses: dict[int, int] = {}
        self.times_s: list[float] = []
        self._begin_s, self._end_s, self._good = begin_s, end_s, 0
        self._answers = 0
        self._awaited: tuple[int, asyncio.Event] | None = None

    def add(self, status: int, from_s: float, now_s: float) -> None:
        """Count an answer to a request that was sent, or due, at ``from_s``."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.times_s.append(now_s - from_s)
            self._good += self._begin_s <= now_s <= self._end_s
        self._answers += 1
        if self._awaited is not None and self._answers >= self._awaited[0]:
            self._awaited[1].set()

    async def reached(self, answers: int) -> None:
        """Wait for so many answers."""
        self._awaited = (answers, asyncio.Event())
        if self._answers < answers:
            await self._awaited[1].wait()

    def summary(self, duration_s: float, unanswered: int) -> dict[str, object]:
        """What ``wrk.lua`` prints, and the count of each status (0: the connection broke)."""
        times = sorted(self.times_s)
        requests = sum(self.statuses.values())
        broken = self.statuses.get(0, 0)
        return {
            "requests": requests,
            "duration_us": round(duration_s * 1e6),
            "status_errors": requests - len(times) - broken,
            "socket_errors": broken,
            "timeouts": unanswered,
            "goodput_per_s": self._good / (self._end_s - self._begin_s),
            **{f"{name}_us": 1e6 * percentile(times, percent) if times else 0.0 for name, percent in _PERCENTILES},
            "max_us": 1e6 * times[-1] if times else 0.0,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
        }


_PERCENTILES = (("p50", 50), ("p90", 90), ("p99", 99), ("p999", 99.9))


async def closed_loop(target: Target, connections: int, seconds: float) -> dict[str, object]:
    """Load from so many connections, each with one request at a time."""
    began = time.monotonic()
    end = began + seconds
    tally = Tally(began, end)

    async def client() -> None:
        connection = await target.connect()
        while (sent := time.monotonic()) < end and connection.is_open:
            tally.add(await _asked(connection, target.request), sent, time.monotonic())

    await asyncio.gather(*(client() for _ in range(connections)))
    return tally.summary(time.monotonic() - began, 0)


async def open_loop(target: Target, rate_per_s: float, seconds: float) -> dict[str, object]:
    """Load at a constant rate; what was not answered five seconds after the end counts as unanswered."""
    loop = asyncio.get_running_loop()
    free: deque[Connection] = deque()
    due: deque[float] = deque()
    opened = 0
    began = time.monotonic()
    tally = Tally(began + _FILLING * seconds, began + seconds)

    def dispatch() -> None:
        while due and free:
            connection = free.pop()
            if connection.is_open:
                send(connection, due.popleft())

    def send(connection: Connection, due_s: float) -> None:
        def answered(status: int) -> None:
            tally.add(status, due_s, time.monotonic())
            if connection.is_open:
                free.append(connection)
            dispatch()

        connection.ask(target.request, answered)

    async def open_another() -> None:
        nonlocal opened
        try:
            free.append(await target.connect())
        except OSError:
            opened -= 1
            if due:
                tally.add(0, due.popleft(), time.monotonic())
        dispatch()

    total = int(rate_per_s * seconds)
    opening: set[asyncio.Task[None]] = set()
    for number in range(total):
        due_s = began + number / rate_per_s
        if due_s > time.monotonic():
            await asyncio.sleep(due_s - time.monotonic())
        due.append(due_s)
        dispatch()
        if due and opened < _MOST_CONNECTIONS:
            opened += 1
            task = loop.create_task(open_another())
            opening.add(task)
            task.add_done_callback(opening.discard)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(tally.reached(total), _LEFT_S)
    return tally.summary(seconds, total - sum(tally.statuses.values()))


async def _asked(connection: Connection, request: bytes) -> int:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    connection.ask(request, answer.set_result)
    return await answer


def _is_whole(head: bytes, received: bytes, body: int) -> bool:
    if b"\r\ntransfer-encoding: chunked" in head:
        return received.endswith(_LAST_CHUNK, body)
    _, found, rest = head.partition(b"\r\ncontent-length:")
    return not found or len(received) - body >= int(rest.split(b"\r\n", 1)[0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse options, load, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=["closed", "open"])
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second of the open loop")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--body", type=Path, required=True)
    parser.add_argument("url")
    parser.add_argument("headers", nargs="*", help="'name: value'")
    options = parser.parse_args(arguments)
    target = Target(options.url, options.body.read_bytes(), options.headers)
    if options.loop == "closed":
        summary = uvloop.run(closed_loop(target, options.connections, options.seconds))
    else:
        summary = uvloop.run(open_loop(target, options.rate, options.seconds))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
