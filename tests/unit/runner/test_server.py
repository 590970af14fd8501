"""The serving loop in a thread of this process: who reads when, what is dropped, and that nothing is ever left lying."""

import asyncio
import random
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libs.errors import DeadlineExceededError
from libs.inference.client import RunnerClient
from libs.inference.errors import RunnerGoneError
from libs.inference.requests import InferResponse
from libs.runner import server, wire

TOKEN = "secret-token"
SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP64", "shape": [-1, 1]}],
    "outputs": [{"name": "y", "datatype": "FP64", "shape": [-1, 1]}],
    "feature_names": None,
}
HEAD = wire.encode_json({"inputs": wire.describe_tensors(wire.encode_tensors({"x": np.zeros((1, 1))})[0])})


class Gate:
    """A model that doubles; a negative number waits until the gate is opened, and the thread that predicts is noted."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.is_busy = threading.Event()
        self.open = threading.Event()

    def describe(self) -> dict[str, Any]:
        return SIGNATURE

    def predict(self, inputs: wire.Arrays, outputs: Any) -> wire.Arrays:
        first = float(inputs["x"][0, 0])
        self.begun.append(first)
        if first < 0:
            self.is_busy.set()
            assert self.open.wait(30)
        return {"y": inputs["x"] * 2}


class Sleeper:
    """A model that is busy for as many milliseconds as the row says, without the interpreter if that is even, else with it."""

    def describe(self) -> dict[str, Any]:
        return SIGNATURE

    def predict(self, inputs: wire.Arrays, outputs: Any) -> wire.Arrays:
        busy_ms = float(inputs["x"][0, 0]) % 10
        end = time.perf_counter() + busy_ms / 1000
        if int(busy_ms) % 2 == 0:
            time.sleep(busy_ms / 1000)
        while time.perf_counter() < end:
            pass
        return {"y": inputs["x"] * 2}


class Served:
    """A server at work on a socket of its own."""

    def __init__(self, model: Any, path: str, predict_timeout_s: float | None = None) -> None:
        self.address = f"unix:{path}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(16)
        self.listener = listener
        self.server = server.Server(model, SIGNATURE, TOKEN, listener, predict_timeout_s)
        self.server.start()
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def client(self) -> RunnerClient:
        return RunnerClient(self.address, TOKEN)

    def stop(self) -> None:
        self.server.end()
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.server.close()
        self.listener.close()


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mr-") as made:
        yield made


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def served(gate: Gate, folder: str) -> AsyncIterator[Served]:
    made = Served(gate, str(Path(folder, "s")))
    yield made
    gate.open.set()
    await asyncio.to_thread(made.stop)


@pytest.fixture
async def client(served: Served) -> AsyncIterator[RunnerClient]:
    made = served.client()
    yield made
    await made.close()


def row(value: float) -> dict[str, Any]:
    return {"x": np.array([[float(value)]])}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (another thread is looked at)
            await asyncio.sleep(0.001)


async def busy(client: RunnerClient, gate: Gate) -> "asyncio.Task[InferResponse]":
    """Keep the model busy; the value is the request that does so."""
    task = asyncio.create_task(client.infer(row(-1), timeout_s=30))
    assert await asyncio.to_thread(gate.is_busy.wait, 30)
    return task


async def test_while_the_model_is_busy_strangers_are_refused_pings_answered_and_new_clients_taken(served, client, gate):
    first = await busy(client, gate)
    assert await client.ping(timeout_s=30) > 0
    other = served.client()
    assert (await other.metadata(timeout_s=30))["signature"] == SIGNATURE
    queued = asyncio.create_task(other.infer(row(2)))
    assert await other.ping(timeout_s=30) > 0
    gate.open.set()
    assert ((await first).outputs["y"].tolist(), (await queued).outputs["y"].tolist()) == ([[-2]], [[4]])
    assert await client.ping(timeout_s=30) == 0
    await other.close()


async def test_a_runner_that_has_been_idle_for_long_still_answers_pings_while_its_model_is_busy(served, client, gate, monkeypatch):
    monkeypatch.setattr(server, "_REST_AFTER_LOOKS", 1)
    await client.ping()
    await until(lambda: served.server._resting)
    first = await busy(client, gate)
    assert await client.ping(timeout_s=30) > 0
    gate.open.set()
    await first


async def test_the_guard_is_put_off_whether_the_model_is_idle_or_busy(gate, folder, monkeypatch):
    put_off: list[float] = []
    monkeypatch.setattr(server.faulthandler, "dump_traceback_later", lambda after_s, **_: put_off.append(after_s))
    monkeypatch.setattr(server, "_REST_AFTER_LOOKS", 1)
    monkeypatch.setattr(server, "_GUARD_EVERY", 0.0001)
    served = Served(gate, str(Path(folder, "s")), predict_timeout_s=60)
    await until(lambda: served.server._resting and len(put_off) > 3)
    client = served.client()
    first = await busy(client, gate)
    before = len(put_off)
    await until(lambda: len(put_off) > before + 3)
    assert set(put_off) == {91.0}
    gate.open.set()
    await first
    await client.close()
    await asyncio.to_thread(served.stop)


async def test_a_request_whose_time_is_over_before_the_model_begins_is_not_run(client, gate):
    first = await busy(client, gate)
    over = asyncio.get_running_loop().create_future()
    client.send(row(7), timeout_s=0.001, done=over.set_result)
    kept = asyncio.create_task(client.infer(row(8), timeout_s=30))
    await client.ping(timeout_s=30)
    await asyncio.sleep(0.005)
    gate.open.set()
    assert isinstance(await over, DeadlineExceededError)
    await asyncio.gather(first, kept)
    assert gate.begun == [-1, 8]


async def test_a_cancelled_request_that_waits_is_dropped_and_its_neighbours_are_answered(client, gate):
    first = await busy(client, gate)
    asked = [asyncio.create_task(client.infer(row(value))) for value in (1, 2, 3)]
    await asyncio.sleep(0)
    asked[1].cancel()
    await asyncio.wait({asked[1]})
    await client.ping(timeout_s=30)
    gate.open.set()
    assert [(await task).outputs["y"].tolist() for task in (first, asked[0], asked[2])] == [[[-2]], [[2]], [[6]]]
    assert gate.begun == [-1, 1, 3]


async def test_a_cancelled_request_that_has_begun_disturbs_nobody(client, gate):
    first = await busy(client, gate)
    first.cancel()
    queued = asyncio.create_task(client.infer(row(1)))
    await client.ping(timeout_s=30)
    gate.open.set()
    assert (await queued).outputs["y"].tolist() == [[2]]


async def test_requests_of_a_client_that_went_away_are_not_run(served, client, gate):
    first = await busy(client, gate)
    other = served.client()
    gone = asyncio.create_task(other.infer(row(1)))
    await other.ping(timeout_s=30)
    await other.close()
    with pytest.raises(RunnerGoneError):
        await gone
    await client.ping(timeout_s=30)
    gate.open.set()
    await first
    await client.infer(row(2))
    assert gate.begun == [-1, 2]


async def test_what_was_sent_before_the_end_is_answered_and_what_comes_later_is_not(served, client, gate):
    first = await busy(client, gate)
    queued = asyncio.create_task(client.infer(row(1)))
    await asyncio.sleep(0)
    await client.stop(timeout_s=30)
    gate.open.set()
    assert ((await first).outputs["y"].tolist(), (await queued).outputs["y"].tolist()) == ([[-2]], [[2]])
    await asyncio.to_thread(served.thread.join, 30)
    assert not served.thread.is_alive()


async def test_the_time_inside_the_model_is_told(client, gate):
    gate.open.set()
    assert 0 < (await client.infer(row(1))).model_s < 30


async def test_a_client_that_asks_for_too_much_at_once_is_read_again_when_some_is_answered(client, gate):
    first = await busy(client, gate)
    asked = [asyncio.create_task(client.infer(row(value))) for value in range(3 * server.MAX_UNANSWERED)]
    await asyncio.sleep(0.05)
    gate.open.set()
    async with asyncio.timeout(30):
        assert [(await task).outputs["y"][0, 0] for task in asked] == [2 * value for value in range(len(asked))]
    await first


async def test_answers_that_the_client_does_not_read_yet_are_kept(served, gate):
    """More than a socket takes, so that the rest is written when the socket takes more."""
    gate.open.set()
    rows = np.ones((200_000, 1))
    specs, tail = wire.encode_tensors({"x": rows})
    head = wire.encode_json({"inputs": wire.describe_tensors(specs)})

    def ask() -> list[wire.Frame]:
        reader, frames = wire.FrameReader(), []
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(served.address.removeprefix("unix:"))
            sock.sendall(b"".join(wire.encode_frame({"id": 0, "op": "hello", "token": TOKEN})))
            for number in (1, 2, 3):
                for part in wire.encode_frame({"id": number, "op": "infer"}, head, tail):
                    sock.sendall(part)
            while len(frames) < 4:
                frames += reader.feed(sock.recv(65_536))
        return frames

    frames = await asyncio.to_thread(ask)
    assert [frame.meta["id"] for frame in frames] == [0, 1, 2, 3]
    for frame in frames[1:]:
        assert np.frombuffer(frame.tail).sum() == 2 * len(rows)


@pytest.mark.parametrize("meta", [b'{"id":1,"op":"infer","timeout_ms":true}', b'{"id":1,"op":"infer","timeout_ms":-1}', b'{"id":true}'])
async def test_a_frame_that_makes_no_sense_ends_the_connection_and_no_other(served, client, gate, meta):
    gate.open.set()
    await client.ping()
    reader, writer = await asyncio.open_unix_connection(served.address.removeprefix("unix:"))
    writer.write(b"".join([*wire.encode_frame({"id": 0, "op": "hello", "token": TOKEN}), *wire.join_frame(meta)]))
    assert b"protocol" in await reader.read()
    writer.close()
    assert (await client.infer(row(1))).outputs["y"].tolist() == [[2]]


@pytest.mark.parametrize(
    ("head", "tail", "message"),
    [
        (b"{", b"", "head part of a frame is not JSON"),
        (b"{}", b"", "no list 'inputs'"),
        (b'{"inputs":[],"id":[]}', b"", "id is not a string"),
        (HEAD, b"\0" * 7, "only 7 are left"),
        (HEAD, b"\0" * 9, "1 bytes follow"),
        (HEAD.replace(b"FP64", b"FP32"), b"\0" * 8, "takes 4"),
        (HEAD.replace(b'"x"', b'"z"'), b"\0" * 8, "'x' is missing"),
    ],
)
async def test_a_head_or_tail_that_makes_no_sense_is_the_callers_fault_also_when_the_head_is_remembered(served, gate, head, tail, message):
    gate.open.set()
    good = wire.join_frame(b'{"id":1,"op":"infer"}', HEAD, [b"\0" * 8])
    bad = wire.join_frame(b'{"id":2,"op":"infer"}', head, [tail])
    stream = [*wire.encode_frame({"id": 0, "op": "hello", "token": TOKEN}), *good, *bad, *good, *bad, *good]
    reader, writer = await asyncio.open_unix_connection(served.address.removeprefix("unix:"))
    writer.write(b"".join(stream))
    frames: list[wire.Frame] = []
    cutter = wire.FrameReader()
    while len(frames) < 6:
        frames += cutter.feed(await reader.read(65_536))
    writer.close()
    assert [frame.meta["ok"] for frame in frames] == [True, True, False, True, False, True]
    for frame in (frames[2], frames[4]):
        assert frame.meta["error"]["kind"] == "invalid_input"
        assert message in frame.meta["error"]["message"]


@pytest.mark.parametrize("seed", range(3))
async def test_no_wake_up_is_lost_however_reading_passes_between_the_threads(folder, monkeypatch, seed):
    """Quick and slow requests, pings and cancellations, from several clients, with a stand-in that is always about to act."""
    monkeypatch.setattr(server, "STAND_IN_AFTER_S", 0.0002)
    monkeypatch.setattr(server, "_REST_AFTER_LOOKS", 1)
    served = Served(Sleeper(), str(Path(folder, "s")))
    chance = random.Random(seed)

    async def use(client: RunnerClient) -> None:
        for _ in range(60):
            value = chance.choice([0, 0, 0, 0.3, 1, 2, 3]) + 10 * chance.randrange(100)
            match chance.randrange(10):
                case 0:
                    await client.ping(timeout_s=30)
                case 1:
                    task = asyncio.create_task(client.infer(row(value)))
                    await asyncio.sleep(chance.choice([0, 0.001]))
                    task.cancel()
                    await asyncio.wait({task})
                case 2:
                    await asyncio.sleep(chance.choice([0, 0.0005, 0.003]))
                case _:
                    values = [value + 10 * number for number in range(chance.randrange(1, 4))]
                    answers = await asyncio.gather(*(client.infer(row(each), timeout_s=30) for each in values))
                    assert [answer.outputs["y"][0, 0] for answer in answers] == [2 * each for each in values]
        await client.close()

    async with asyncio.timeout(60):
        await asyncio.gather(*(use(served.client()) for _ in range(3)))
    await asyncio.to_thread(served.stop)
