"""One connection to each runner, for whoever asks."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs.errors import ConfigurationError, DeadlineExceededError, NotReadyError
from libs.inference.errors import InvalidInputError, RunnerGoneError
from libs.inference.pool import RunnerPool
from libs.inference.requests import InferRequest, Span
from libs.inference.routing import Route
from libs.inference.spans import RunnerSpans
from schemas.inference import Signature, TensorSpec
from schemas.registry import Replica
from tests.unit.runners import KEY, FakeRunner

TENSOR = TensorSpec(name="input", datatype="FP64", shape=(-1, 2))
ROUTE = Route("shop", "shop.iris.1", "iris", 1, Signature(inputs=(TENSOR,), outputs=(TENSOR,)), ())
REQUEST = InferRequest({"input": np.array([[1.0, 2.0]])})
TRACEPARENT = f"00-{'a' * 32}-{'b' * 16}-01"


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


@pytest.mark.parametrize(("said", "read"), [(0.25, 0.25), (3, 3.0), (None, 0.0), (-1, 0.0), ("1", 0.0)])
async def test_seconds_inside_the_model_are_read_if_they_make_sense(pool, runner, said, read):
    runner.model_s = said
    assert (await pool.infer(ROUTE, runner.replica, REQUEST)).model_s == read


async def test_what_is_sent_is_answered_by_a_call_with_or_without_a_connection(pool, runner):
    for _ in range(2):
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        pool.send(ROUTE, runner.replica, REQUEST.inputs, None, None, answered.set_result)
        assert not answered.done()
        assert (await answered).outputs["predict"].tolist() == [3.0]


async def test_what_is_sent_says_outputs_trace_and_time_to_the_runner(pool, runner):
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    pool.send(ROUTE, runner.replica, REQUEST.inputs, ("predict",), TRACEPARENT, answered.set_result, timeout_s=1.2345)
    assert (await answered).span is not None
    (meta,) = runner.asked
    assert (meta["traceparent"], meta["timeout_ms"]) == (TRACEPARENT, 1235)


async def test_what_is_sent_and_cannot_be_asked_fails_by_a_call(pool, runner):
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    runner.behave = lambda _: ("expired", "too late")
    pool.send(ROUTE, runner.replica, REQUEST.inputs, None, None, answered.set_result)
    assert isinstance(await answered, DeadlineExceededError)
    stranger = Replica(replica_id="other", address=runner.replica.address)
    nobody = Replica(replica_id="nobody", address=f"{runner.replica.address}x")
    for replica, inputs, expected in (
        (stranger, REQUEST.inputs, NotReadyError),
        (nobody, REQUEST.inputs, RunnerGoneError),
        (runner.replica, {"input": np.array([1j])}, InvalidInputError),
    ):
        failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        pool.send(ROUTE, replica, inputs, None, None, failed.set_result)
        assert not failed.done()
        assert isinstance(await failed, expected)


async def test_what_was_sent_to_a_runner_that_then_goes_away_fails_by_a_call(pool, runner):
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    runner.behave = lambda _: "drop"
    pool.send(ROUTE, runner.replica, REQUEST.inputs, None, None, answered.set_result)
    assert isinstance(await answered, RunnerGoneError)


async def test_what_is_cancelled_is_called_off_at_the_runner_and_never_answered(pool, runner):
    answer = asyncio.Event()
    runner.behave = lambda number: _after(answer) if number == 1 else None
    answers: list[Any] = []
    asked = pool.send(ROUTE, runner.replica, REQUEST.inputs, None, None, answers.append)
    await until(lambda: runner.asked)
    asked.cancel()
    asked.cancel()
    answer.set()
    await pool.infer(ROUTE, runner.replica, REQUEST)
    assert (answers, asked.is_over, runner.cancelled) == ([], True, [runner.asked[0]["id"]])


async def test_what_is_cancelled_before_there_is_a_connection_is_never_sent(pool, runner):
    answers: list[Any] = []
    pool.send(ROUTE, runner.replica, REQUEST.inputs, None, None, answers.append).cancel()
    await pool.infer(ROUTE, runner.replica, REQUEST)
    assert (answers, len(runner.asked), runner.cancelled) == ([], 1, [])


async def test_a_cancelled_caller_calls_its_request_off(pool, runner):
    runner.behave = lambda number: "hang" if number == 1 else None
    asked = asyncio.create_task(pool.infer(ROUTE, runner.replica, REQUEST))
    await until(lambda: runner.asked)
    asked.cancel()
    await asyncio.wait({asked})
    await pool.infer(ROUTE, runner.replica, REQUEST)
    assert runner.cancelled == [runner.asked[0]["id"]]


async def test_a_runners_span_becomes_the_child_of_each_caller_that_is_traced(tmp_path, runner):
    exporter = InMemorySpanExporter()
    spans = RunnerPool(tmp_path / "runner.key", RunnerSpans(SimpleSpanProcessor(exporter)))
    for parent in (TRACEPARENT, "nonsense"):
        spans.export_span(Span("00000000000000aa", 1, 2), parent, ROUTE, runner.replica)
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.start_time, span.end_time) == ("infer iris", 1, 2)
    assert format(span.parent.span_id, "016x") == TRACEPARENT.split("-")[2]


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (the fake is looked at)
            await asyncio.sleep(0.001)


async def _after(event: asyncio.Event) -> None:
    await event.wait()
