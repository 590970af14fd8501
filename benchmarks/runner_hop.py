"""What the hop between the platform and a model's runner costs, beside the model's own predict in this process.

    python -m benchmarks.runner_hop [--seconds 3] [--transport unix|tcp] [--loop asyncio|uvloop]

A real runner in its cage, one client. ``serial``: one row, the next request when the answer is there. ``pipelined``: 32 requests of one row
on their way at any time. ``batches``: 1000 rows of 30 numbers each, one after the other. Figures in brackets are the same calls of
``predict`` without a runner. The goal: a serial round trip costs at most 60 µs more than the model's own predict.

Two lines say how much of the difference is the machine's. ``bare echo`` is a round trip of the same bytes to a process that is busy for as
long as the model and does nothing else, less that time: two wake-ups. ``predict after a pause`` is the model in this process when it had to
wait 100 µs for each request, as it does behind a socket (cold caches, a sleeping core).
"""

import argparse
import asyncio
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LogisticRegression

from benchmarks.tables import show
from libs.errors import MillraceError
from libs.inference.client import RunnerClient
from libs.inference.requests import InferResponse
from libs.inference.supervisor import RunnerProcess, RunnerSpec
from libs.runner.cage import CageSpec, platform_layers

GOAL_US = 60.0
PAUSE_S = 0.0001
FRAME_BYTES = 180
"""A request of one 1x4 row; its answer has about as many."""

ECHO = """
import select, socket, sys, time
busy_s = float(sys.argv[2])
connection, _ = socket.socket(fileno=int(sys.argv[1])).accept()
poll = select.epoll()
poll.register(connection.fileno(), select.EPOLLIN)
while poll.poll() and (data := connection.recv(65536)):
    end = time.perf_counter() + busy_s
    while time.perf_counter() < end:
        pass
    connection.send(data)
"""
PIPELINED = 32
BATCH_ROWS = 1000


def _models(folder: Path) -> dict[str, tuple[Any, Path, Any]]:
    """A name -> the estimator, its file, and the rows it is asked."""
    made = {}
    for name, (x, y), rows in (
        ("iris", load_iris(return_X_y=True), 1),
        ("cancer", load_breast_cancer(return_X_y=True), BATCH_ROWS),
    ):
        model = LogisticRegression(max_iter=5000).fit(x, y)
        path = folder / f"{name}.pkl"
        path.write_bytes(pickle.dumps(model))
        made[name] = (model, path, np.ascontiguousarray(np.resize(x, (rows, x.shape[1]))))
    return made


def _own(call: Callable[[], object], seconds: float, pause_s: float = 0.0) -> list[float]:
    """Seconds of each call, one after the other."""
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        if pause_s:
            time.sleep(pause_s)
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return sorted(taken)


class _Echoed(asyncio.Protocol):
    """Sends the same bytes again as soon as they are back."""

    def __init__(self, seconds: float) -> None:
        self.taken: list[float] = []
        self.over = asyncio.get_running_loop().create_future()
        self._end = time.perf_counter() + seconds
        self._started = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:  # noqa: ARG002 (asyncio.Protocol)
        now = time.perf_counter()
        self.taken.append(now - self._started)
        if now < self._end:
            self._ask()
        elif not self.over.done():
            self.over.set_result(None)

    def _ask(self) -> None:
        self._started = time.perf_counter()
        self._transport.write(bytes(FRAME_BYTES))


async def _echo(folder: Path, seconds: float, busy_s: float) -> list[float]:
    """Seconds of each round trip of as many bytes as a request has, less those that the other side is busy."""
    path = str(folder / "echo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        command = [sys.executable, "-c", ECHO, str(listener.fileno()), str(busy_s)]
        process = await asyncio.create_subprocess_exec(*command, pass_fds=(listener.fileno(),))
        transport, protocol = await asyncio.get_running_loop().create_unix_connection(lambda: _Echoed(seconds), path)
        await protocol.over
        transport.close()
        await process.wait()
    return sorted(taken - busy_s for taken in protocol.taken)


async def _serial(client: RunnerClient, rows: Any, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each round trip, and those that the runner says the model took."""
    taken, inside, end = [], [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        answer = await client.infer({"input": rows})
        taken.append(time.perf_counter() - started)
        inside.append(answer.model_s)
    return sorted(taken), sorted(inside)


async def _sent(client: RunnerClient, rows: Any, seconds: float) -> list[float]:
    """As ``_serial``, by callbacks."""
    taken: list[float] = []
    over = asyncio.get_running_loop().create_future()
    end = time.perf_counter() + seconds
    started = 0.0

    def ask() -> None:
        nonlocal started
        started = time.perf_counter()
        client.send({"input": rows}, done=answered)

    def answered(value: InferResponse | MillraceError) -> None:
        now = time.perf_counter()
        taken.append(now - started)
        if isinstance(value, MillraceError):
            over.set_exception(value)
        elif now < end:
            ask()
        else:
            over.set_result(None)

    ask()
    await over
    return sorted(taken)


async def _pipelined(client: RunnerClient, rows: Any, seconds: float) -> float:
    """Requests answered in a second."""
    count, end = 0, time.perf_counter() + seconds

    async def ask() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await client.infer({"input": rows})
            count += 1

    await asyncio.gather(*(ask() for _ in range(PIPELINED)))
    return count / seconds


def _spec(artifact: Path, folder: Path, transport: str) -> RunnerSpec:
    (folder / "scratch").mkdir(exist_ok=True)
    return RunnerSpec(
        python=Path(sys.executable),
        artifact=artifact,
        format="sklearn",
        runner_id="benchmark",
        token="benchmark",
        address=f"unix:{folder}/s" if transport == "unix" else "tcp:127.0.0.1:0",
        scratch=folder / "scratch",
        log=folder / "log",
        cage=CageSpec(memory_bytes=4 << 30, file_size_bytes=1 << 20, required=platform_layers()),
    )


def _at(ordered: list[float], quantile: float) -> float:
    """A quantile in microseconds."""
    return ordered[min(int(len(ordered) * quantile), len(ordered) - 1)] * 1e6


async def _measure(folder: Path, seconds: float, transport: str) -> None:
    rows: list[list[object]] = []
    for name, (model, path, x) in _models(folder).items():
        runner = await RunnerProcess.start(_spec(path, folder, transport))
        client = runner.client()
        try:
            await _serial(client, x, seconds / 4)
            own = _own(lambda model=model, x=x: model.predict(x), seconds)
            serial, inside = await _serial(client, x, seconds)
            if name == "iris":
                rows += _one_row(serial, inside, await _sent(client, x, seconds), own)
                echo = await _echo(folder, seconds, _at(own, 0.5) / 1e6)
                rows.append(["bare echo, p50", f"{_at(echo, 0.5):.0f} µs", "", ""])
                waiting = _own(lambda model=model, x=x: model.predict(x), seconds, PAUSE_S)
                rows.append(["predict after a pause, p50", "", f"({_at(waiting, 0.5):.0f})", ""])
                rate = await _pipelined(client, x, seconds)
                rows.append([f"pipelined 1x4, {PIPELINED} at once", f"{rate:,.0f} requests/s", f"({1 / (sum(own) / len(own)):,.0f})", ""])
            else:
                rates = [BATCH_ROWS * len(taken) / sum(taken) for taken in (serial, own)]
                rows.append([f"batches {BATCH_ROWS}x30", f"{rates[0]:,.0f} rows/s", f"({rates[1]:,.0f})", ""])
        finally:
            await client.close()
            await runner.stop()
    show(f"Runner hop ({transport}, {type(asyncio.get_running_loop()).__module__})", ["what", "with a runner", "(predict)", "goal"], rows)


def _one_row(serial: list[float], inside: list[float], sent: list[float], own: list[float]) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, taken in (("serial 1x4", serial), ("serial 1x4, by callbacks", sent)):
        extra = _at(taken, 0.5) - _at(own, 0.5)
        verdict = f"predict + {extra:.0f} µs: {'met' if extra <= GOAL_US else 'MISSED'}"
        rows.append([f"{name}, p50", f"{_at(taken, 0.5):.0f} µs", f"({_at(own, 0.5):.0f})", verdict])
        rows.append([f"{name}, p99", f"{_at(taken, 0.99):.0f} µs", f"({_at(own, 0.99):.0f})", ""])
    rows.append(["of it inside the model, p50", f"{_at(inside, 0.5):.0f} µs", f"({_at(own, 0.5):.0f})", ""])
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--transport", choices=["unix", "tcp"], default="unix")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="uvloop", help="event loop of the client; the gateway's is uvloop")
    options = parser.parse_args(arguments)
    run = uvloop.run if options.loop == "uvloop" else asyncio.run
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        run(_measure(Path(folder), options.seconds, options.transport))


if __name__ == "__main__":
    main()
