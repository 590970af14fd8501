"""One connection to each runner, for whoever asks."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libs.errors import ConfigurationError, NotReadyError
from libs.inference.errors import RunnerGoneError
from libs.inference.pool import RunnerPool
from libs.inference.requests import InferRequest
from libs.inference.routing import Route
from libs.inference.spans import RunnerSpans
from schemas.inference import Signature, TensorSpec
from schemas.registry import Replica
from tests.unit.runners import KEY, FakeRunner

TENSOR = TensorSpec(name="input", datatype="FP64", shape=(-1, 2))
ROUTE = Route("shop", "shop.iris.1", "iris", 1, Signature(inputs=(TENSOR,), outputs=(TENSOR,)), ())
REQUEST = InferRequest({"input": np.array([[1.0, 2.0]])})


@pytest.fixture
async def runner(tmp_path: Path) -> Any:
    made = FakeRunner("r", tmp_path / "r.sock")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def pool(tmp_path: Path) -> Any:
    (tmp_path / "runner.key").write_bytes(KEY + b"\n")
    made = RunnerPool(tmp_path / "runner.key", RunnerSpans(None))
    made.open()
    yield made
    await made.close()


@pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), (b"\n", "is empty")])
def test_without_a_key_nothing_starts(tmp_path, content, says):
    if content is not None:
        (tmp_path / "runner.key").write_bytes(content)
    with pytest.raises(ConfigurationError, match=says):
        RunnerPool(tmp_path / "runner.key", RunnerSpans(None)).open()


async def test_one_connection_serves_everybody(pool, runner):
    answers = await asyncio.gather(*(pool.infer(ROUTE, runner.replica, REQUEST) for _ in range(5)))
    assert [answer.outputs["predict"].tolist() for answer in answers] == [[3.0]] * 5
    assert len(runner._writers) == 1


async def test_a_ping_says_for_how_long_the_model_is_busy(pool, runner):
    assert await pool.ping(runner.replica, timeout_s=1) == 0
    runner.busy_s = 7.5
    assert await pool.ping(runner.replica, timeout_s=1) == 7.5


async def test_a_runner_that_refuses_the_key_is_not_ready(pool, runner):
    stranger = Replica(replica_id="other", address=runner.replica.address)
    for asked in (pool.infer(ROUTE, stranger, REQUEST), pool.ping(stranger, timeout_s=1)):
        with pytest.raises(NotReadyError, match="does not accept"):
            await asked


async def test_a_runner_that_is_forgotten_still_answers_what_it_was_asked(pool, runner):
    answer = asyncio.Event()
    runner.behave = lambda number: _after(answer)
    asked = asyncio.create_task(pool.infer(ROUTE, runner.replica, REQUEST))
    while not runner.asked:  # noqa: ASYNC110 (the fake is looked at)
        await asyncio.sleep(0.001)
    pool.keep([])
    answer.set()
    assert (await asked).outputs["predict"].tolist() == [3.0]
    async with asyncio.timeout(2):
        while runner._writers:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_an_idle_connection_to_a_forgotten_runner_is_closed_and_a_known_one_is_kept(pool, runner):
    await pool.infer(ROUTE, runner.replica, REQUEST)
    pool.keep([runner.replica])
    assert runner._writers
    pool.keep([])
    async with asyncio.timeout(2):
        while runner._writers:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert (await pool.infer(ROUTE, runner.replica, REQUEST)).outputs["predict"].tolist() == [3.0]


async def test_a_runner_that_is_gone_says_so(pool, runner):
    await runner.stop()
    with pytest.raises(RunnerGoneError, match="no runner answers"):
        await pool.infer(ROUTE, runner.replica, REQUEST)


@pytest.mark.parametrize(
    "span",
    [
        "none",
        {"span_id": "zz"},
        {"span_id": "zz" * 8, "start_ns": 1, "end_ns": 2},
        {"span_id": "aa" * 8, "start_ns": 1, "end_ns": 2**70},
        {"span_id": "aa" * 8, "start_ns": 2, "end_ns": 1},
    ],
)
async def test_a_span_that_makes_no_sense_is_passed_over(pool, runner, span):
    runner.span = span
    assert (await pool.infer(ROUTE, runner.replica, REQUEST)).span is None


async def test_a_span_is_read(pool, runner):
    runner.span = {"span_id": "00000000000000aa", "start_ns": 1, "end_ns": 2, "more": True}
    assert (await pool.infer(ROUTE, runner.replica, REQUEST)).span.span_id == "00000000000000aa"


async def _after(event: asyncio.Event) -> None:
    await event.wait()
