"""Records in, results out: what happens to each of them, and when it counts as done."""

import asyncio
import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs import reports, telemetry
from libs.inference import v2_grpc
from libs.inference.requests import InferRequest
from libs.inference.spans import RunnerSpans
from libs.messaging.records import Record
from libs.metrics.definitions import STREAM_FAILING, STREAM_FAILURES, STREAM_IN_FLIGHT, STREAM_LAG, STREAM_RECORDS
from libs.reports import StreamReport
from schemas.inference import InferenceResult
from schemas.registry import EndpointSnapshot, Replica
from schemas.topics import DLQ, STATE_ENDPOINTS, inference_requests, inference_results
from services.streaming import answering, reporting, streams
from services.streaming.answering import AnswerLimits
from services.streaming.batches import Item
from services.streaming.errors import SessionLostError
from services.streaming.memory import MemoryStreamLog
from services.streaming.streams import StreamLimits
from tests.unit.streaming.conftest import GROUP, ID, NOW, REQUESTS, RESULTS, World, deployment, signature

POISON = [-1.0, -1.0]


def rows(*sums: float) -> list[dict[str, Any]]:
    return [{"instances": [[value, 0]]} for value in sums]


async def nothing_after(event: asyncio.Event) -> None:
    await event.wait()


def hang(timeout_s: float) -> str:
    """Never answer; by the loop's clock the time for it is over at once, however long all the others may take."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + timeout_s
    return "hang"


def predicted(results: list[dict[str, Any]]) -> list[Any]:
    return [result.get("predictions", [result.get("error")])[0] for result in results]


def sums(runner: Any) -> list[list[float]]:
    """What a runner was asked, batch by batch."""
    return [[row[0] for row in batch] for batch in runner.rows]


async def test_every_record_gets_one_result_in_order(world, run):
    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(*range(500)))
    async with run(world.streams()):
        assert predicted(await world.results(500)) == list(range(500))
    assert len(world.broker.records(RESULTS)) == 500
    assert world.created == [REQUESTS, RESULTS]


async def test_records_are_asked_together(world, run):
    runner = await world.runner()
    await world.endpoint(runner.replica)
    await world.ask(*rows(*range(400)))
    async with run(world.streams()):
        await world.results(400)
    assert len(runner.asked) <= 12


async def test_the_order_stands_also_when_answers_come_out_of_order(world, run):
    slow, quick = await world.runner(), await world.runner()
    quick_was_asked = asyncio.Event()
    slow.behave = lambda number: nothing_after(quick_was_asked)
    quick.behave = lambda number: quick_was_asked.set()
    await world.endpoint(slow.replica, quick.replica)
    await world.ask(*rows(*range(80)))
    async with run(world.streams()):
        assert predicted(await world.results(80)) == list(range(80))
    assert slow.asked
    assert quick.asked


async def test_a_record_of_many_rows_is_asked_piece_by_piece(world, run):
    runner = await world.runner()
    await world.endpoint(runner.replica)
    await world.ask({"instances": [[number, 0] for number in range(1000)]}, {"instances": [[7, 0]]})
    async with run(world.streams()):
        large, small = await world.results(2)
    assert large["predictions"] == list(range(1000))
    assert small["predictions"] == [7]
    assert max(map(len, runner.rows)) <= 256


async def test_records_of_a_model_whose_rows_depend_on_each_other_are_neither_joined_nor_cut(world, run):
    runner = await world.runner()
    await world.endpoint(runner.replica, signature=signature().model_copy(update={"batchable": False}))
    await world.ask({"instances": [[number, 0] for number in range(1000)]}, {"instances": [[7, 0]]}, {"instances": [[8, 0]]})
    async with run(world.streams()):
        await world.results(3)
    assert sorted(map(len, runner.rows)) == [1, 1, 1000]


async def test_a_slow_model_is_asked_fewer_rows_at_once(world, run):
    runner = await world.runner()
    runner.behave = lambda number: setattr(runner, "model_s", 0.01 * len(runner.rows[-1]))
    await world.endpoint(runner.replica)
    await world.ask(*rows(*range(300)))
    async with run(world.streams()):
        assert predicted(await world.results(300)) == list(range(300))
    assert max(map(len, runner.rows[-5:])) <= 5


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"{", "not valid JSON"),
        (None, "has no value"),
        ({"instances": [[1, 2, 3]]}, "expects rows of 2 numbers"),
        ({"instances": []}, "non-empty list"),
        ({"instances": [["a", 2]]}, "expects FP64"),
        ({"rows": 1}, "exactly one of"),
        ({"inputs": [{"name": "other", "datatype": "FP64", "shape": [1, 2], "data": [1, 2]}] * 2}, "no input 'other'"),
    ],
)
async def test_a_record_that_cannot_be_read_fails_alone_and_is_kept(world, run, bad, says):
    await world.endpoint((await world.runner()).replica)
    await world.ask(rows(1)[0], bad, rows(2)[0])
    async with run(world.streams()):
        results = await world.results(3)
    assert [result["status"] for result in results] == ["completed", "failed", "completed"]
    assert says in results[1]["error"]
    (letter,) = world.dead_letters()
    assert (letter.origin_topic, letter.origin_offset, letter.consumer) == (REQUESTS, 1, "streaming")
    assert says in letter.cause


async def test_records_on_which_the_model_raises_fail_alone(world, run):
    runner = await world.runner()
    runner.behave = lambda number: ("model_error", "the model raised ValueError: no") if POISON in runner.rows[-1] else None
    await world.endpoint(runner.replica)
    bad = {3, 40, 41}
    await world.ask(*({"instances": [POISON]} if number in bad else rows(number)[0] for number in range(60)))
    async with run(world.streams()):
        results = await world.results(60)
    expected = ["the model raised ValueError: no" if number in bad else number for number in range(60)]
    assert predicted(results) == expected
    assert len(world.dead_letters()) == 3
    assert len(runner.asked) < 40


async def test_a_model_that_does_not_answer_row_by_row_is_asked_one_record_at_a_time(world, run, monkeypatch):
    runner = await world.runner()
    await world.endpoint(runner.replica)
    split = answering.split

    def uneven(outputs: Any, counts: Any) -> Any:
        return split({"predict": np.zeros(1)}, counts)

    monkeypatch.setattr(answering, "split", uneven)
    await world.ask(*rows(1, 2, 3))
    async with run(world.streams()):
        assert predicted(await world.results(3)) == [1, 2, 3]
    assert sums(runner) == [[1, 2, 3], [1], [2], [3]]


@pytest.mark.parametrize("where", ["read", "parse"])
async def test_a_record_over_which_we_have_a_bug_fails_alone(world, run, monkeypatch, where):
    original = getattr(Item, where)

    def buggy(self: Any, *arguments: Any) -> Any:
        if self.request.id == "cursed":
            raise ZeroDivisionError
        return original(self, *arguments)

    monkeypatch.setattr(Item, where, buggy)
    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(1))
    await world.ask({"instances": [[2, 0]], "outputs": ["predict"]}, ce_id="cursed")
    await world.ask(*rows(3))
    async with run(world.streams()):
        results = await world.results(3)
    assert [result["status"] for result in results] == ["completed", "failed", "completed"]
    assert "something went wrong in Millrace" in results[1]["error"]
    assert len(world.dead_letters()) == 1


async def test_without_a_runner_records_wait_and_nothing_is_lost(world, run):
    await world.endpoint()
    await world.ask(*rows(1, 2))
    async with run(world.streams()):
        await world.until(lambda: world.logs and world.logs[0].stays > 3)
        assert world.broker.committed(GROUP, REQUESTS) == 0
        assert world.metrics.gauge(STREAM_LAG, "shop", "0").value == 2
        await world.publish(deployment(replicas=((await world.runner()).replica,)))
        assert predicted(await world.results(2)) == [1, 2]
    assert world.dead_letters() == []


async def test_a_runner_that_goes_away_in_the_middle_costs_no_record(world, run):
    gone, other = await world.runner(), await world.runner()
    gone.behave = lambda number: "hang" if number > 2 else None
    await world.endpoint(gone.replica)
    await world.ask(*rows(*range(400)))
    async with run(world.streams()):
        await world.until(lambda: len(gone.asked) > 2)
        await gone.stop()
        await world.publish(deployment(replicas=(other.replica,)))
        assert predicted(await world.results(400)) == list(range(400))
    assert world.dead_letters() == []


async def test_a_replica_that_is_gone_but_still_listed_costs_no_record(world, run):
    gone, other = await world.runner(), await world.runner()
    await gone.stop()
    await world.endpoint(gone.replica, other.replica)
    await world.ask(*rows(*range(200)))
    async with run(world.streams()):
        assert predicted(await world.results(200)) == list(range(200))
    assert world.dead_letters() == []


async def test_a_record_that_kills_its_runner_is_found_out_and_its_neighbours_are_not_blamed(world, run):
    runner = await world.runner()

    def behave(number: int) -> str | None:
        if POISON in runner.rows[-1]:
            for writer in runner._writers:
                writer.close()
            return "drop"
        return None

    runner.behave = behave
    await world.endpoint(runner.replica)
    await world.ask(*rows(1, 2), {"instances": [POISON]}, *rows(4, 5))
    async with run(world.streams()):
        results = await world.results(5)
    assert [result["status"] for result in results] == ["completed", "completed", "failed", "completed", "completed"]
    assert "3 runners were lost" in results[2]["error"]
    assert sum(POISON in batch for batch in runner.rows) == answering.MOST_LOST_RUNNERS
    assert len(world.dead_letters()) == 1


async def test_a_record_on_which_the_model_hangs_is_given_up_and_its_neighbours_are_answered(world, run):
    world.answer_limits = AnswerLimits(timeout_s=2.0)
    runner = await world.runner()
    runner.behave = lambda number: hang(2.0) if POISON in runner.rows[-1] else None
    await world.endpoint(runner.replica)
    await world.ask(*rows(1), {"instances": [POISON]}, *rows(3))
    async with run(world.streams()):
        assert predicted(await world.results(3)) == [1, "the model did not answer within 2 s", 3]
    assert world.metrics.counter(STREAM_RECORDS, "shop", "expired").value == 1
    assert world.metrics.counter(STREAM_RECORDS, "shop", "completed").value == 2


async def test_nobody_is_asked_alone_of_a_runner_that_is_stuck(world, run):
    world.answer_limits = AnswerLimits(timeout_s=2.0)
    stuck, fresh = await world.runner(), await world.runner()
    await world.endpoint(stuck.replica)
    await world.ask(*rows(1, 2))

    def behave(number: int) -> str:
        stuck.busy_s = 31.0
        return hang(2.0)

    stuck.behave = behave
    async with run(world.streams()):
        await world.until(lambda: stuck.asked)
        await asyncio.sleep(0.15)
        assert world.broker.records(RESULTS) == ()
        await world.publish(deployment(replicas=(fresh.replica,)))
        assert predicted(await world.results(2)) == [1, 2]
    assert len(stuck.asked) == 1


async def test_a_runner_that_refuses_the_key_is_no_fault_of_the_record(world, run):
    runner, other = await world.runner(), await world.runner()
    await world.endpoint(Replica(replica_id="somebody else", address=runner.replica.address))
    await world.ask(*rows(1))
    async with run(world.streams()):
        await asyncio.sleep(0.05)
        assert world.broker.records(RESULTS) == ()
        await world.publish(deployment(replicas=(other.replica,)))
        assert predicted(await world.results(1)) == [1]
    assert runner.asked == []


async def test_only_so_many_batches_are_asked_at_once(world, run, monkeypatch):
    world.answer_limits = AnswerLimits(in_flight=3, batch_rows=1, timeout_s=5.0)
    now: list[int] = []
    most, infer = 0, answering._Runners.infer

    async def counted(self: Any, *args: Any) -> Any:
        nonlocal most
        now.append(1)
        most = max(most, len(now))
        try:
            return await infer(self, *args)
        finally:
            now.pop()

    monkeypatch.setattr(answering._Runners, "infer", counted)
    await world.endpoint((await world.runner()).replica, (await world.runner()).replica)
    await world.ask(*rows(*range(40)))
    async with run(world.streams()):
        await world.results(40)
    assert most == 3


async def test_what_is_in_memory_is_bounded_while_a_model_takes_its_time(world, run):
    world.limits = StreamLimits(chunk_records=10)
    runner, answer = await world.runner(), asyncio.Event()
    runner.behave = lambda number: nothing_after(answer)
    await world.endpoint(runner.replica)
    await world.ask(*rows(*range(500)))
    async with run(world.streams()):
        await world.until(lambda: world.logs and world.logs[0].stays > 2)
        assert world.metrics.gauge(STREAM_IN_FLIGHT, "shop").value == 30
        answer.set()
        assert predicted(await world.results(500)) == list(range(500))


async def test_small_requests_with_large_answers_are_taken_a_few_at_a_time(world, run, monkeypatch):
    world.limits = StreamLimits(chunk_records=1000, chunk_bytes=5_000)
    taken: list[int] = []
    take = MemoryStreamLog.take

    async def counted(self: Any, *arguments: Any) -> Any:
        chunk = await take(self, *arguments)
        taken.append(len(chunk.records))
        return chunk

    monkeypatch.setattr(MemoryStreamLog, "take", counted)
    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(*range(1000)))
    async with run(world.streams()):
        assert predicted(await world.results(1000)) == list(range(1000))
    assert max(taken) <= 64
    assert 16 in taken


async def test_a_chunk_ends_with_the_record_that_makes_it_too_large(world, run):
    world.limits = StreamLimits(chunk_records=100, chunk_bytes=1)
    runner = await world.runner()
    await world.endpoint(runner.replica)
    await world.ask(*rows(1, 2, 3))
    async with run(world.streams()):
        assert predicted(await world.results(3)) == [1, 2, 3]
    assert sums(runner) == [[1], [2], [3]]


async def test_a_transaction_in_doubt_is_followed_by_a_new_session_that_asks_the_log(world, run, monkeypatch):
    commit, failures = MemoryStreamLog.commit, iter([True, True])

    async def lost(self: Any, *arguments: Any) -> bool:
        if next(failures, False):
            raise SessionLostError("the broker did not say whether it committed")
        return await commit(self, *arguments)

    monkeypatch.setattr(MemoryStreamLog, "commit", lost)
    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(*range(50)))
    async with run(world.streams()):
        assert predicted(await world.results(50)) == list(range(50))
    assert len(world.logs) == 3
    assert len(world.broker.records(RESULTS)) == 50


async def test_a_transaction_in_doubt_that_was_committed_is_not_repeated(world, run, monkeypatch):
    commit, failures = MemoryStreamLog.commit, iter([True])

    async def lost(self: Any, *arguments: Any) -> bool:
        await commit(self, *arguments)
        if next(failures, False):
            raise SessionLostError("the broker did not say whether it committed")
        return True

    monkeypatch.setattr(MemoryStreamLog, "commit", lost)
    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(*range(50)))
    async with run(world.streams()):
        assert predicted(await world.results(50)) == list(range(50))
        await world.until(lambda: len(world.logs) == 2)
        await world.ask(*rows(50))
        assert predicted(await world.results(51)) == list(range(51))


async def test_what_was_taken_before_a_rebalance_is_left_to_the_new_reader(world, run):
    runner, answer = await world.runner(), asyncio.Event()
    runner.behave = lambda number: nothing_after(answer)
    await world.endpoint(runner.replica)
    await world.ask(*rows(1, 2))
    async with run(world.streams()):
        await world.until(lambda: runner.asked)
        world.logs[0].assignment += 1
        answer.set()
        await world.until(lambda: world.metrics.gauge(STREAM_IN_FLIGHT, "shop").value == 0)
        assert world.broker.records(RESULTS) == ()
        assert world.broker.committed(GROUP, REQUESTS) == 0


async def test_smaller_results_are_sent_to_a_broker_that_found_one_too_large(world, run, monkeypatch):
    commit = MemoryStreamLog.commit

    async def strict(self: Any, assignment: int, results: Any, offsets: Any) -> bool:
        if any(len(result.value) > 500_000 for result in results):
            raise SessionLostError("the broker refused a record", is_too_large=True)
        return await commit(self, assignment, results, offsets)

    monkeypatch.setattr(MemoryStreamLog, "commit", strict)
    await world.endpoint((await world.runner()).replica)
    await world.ask({"instances": [[number / 7, 0] for number in range(40_000)]})
    async with run(world.streams()):
        await world.until(lambda: world.broker.committed(GROUP, REQUESTS) == 1)
    (result,) = world.broker.records(RESULTS)
    assert result.header("ce_dataref").startswith("sha256:")
    (body,) = world.store.contents.values()
    assert len(InferenceResult.model_validate_json(body).predictions) == 40_000


async def test_a_dead_letter_that_is_too_large_for_the_broker_leaves_its_record_where_it_is(world, run, monkeypatch):
    commit = MemoryStreamLog.commit

    async def strict(self: Any, assignment: int, results: Any, offsets: Any) -> bool:
        if any(len(result.value) > 300_000 for result in results):
            raise SessionLostError("the broker refused a record", is_too_large=True)
        return await commit(self, assignment, results, offsets)

    monkeypatch.setattr(MemoryStreamLog, "commit", strict)
    await world.endpoint((await world.runner()).replica)
    await world.ask(b"x" * 400_000)
    async with run(world.streams()):
        await world.until(lambda: world.broker.committed(GROUP, REQUESTS) == 1)
    (letter,) = world.dead_letters()
    assert (letter.value_truncated, letter.origin_topic, letter.origin_offset) == (True, REQUESTS, 0)


async def test_a_request_whose_body_is_in_the_store_is_answered(world, run):
    body = json.dumps({"instances": [[number, 0] for number in range(1000)]}).encode()

    async def chunks() -> Any:
        yield body

    stored = await world.store.put(chunks(), max_bytes=10**6)
    await world.endpoint((await world.runner()).replica)
    await world.ask(b"", None, ce_id="large", ce_dataref=f"sha256:{stored.sha256}")
    async with run(world.streams()):
        results = await world.results(2)
    assert [result["predictions"] for result in results] == [list(range(1000))] * 2


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (f"sha256:{'0' * 64}", "does not hold"),
        ("https://elsewhere/body", "is not one of this platform"),
        ("sha256:../../etc/passwd", "is not one of this platform"),
    ],
)
async def test_a_reference_to_nothing_fails_its_record_alone(world, run, reference, says):
    await world.endpoint((await world.runner()).replica)
    await world.ask(b"", ce_id="lost", ce_dataref=reference)
    await world.ask(*rows(1))
    async with run(world.streams()):
        results = await world.results(2)
    assert says in results[0]["error"]
    assert results[1]["predictions"] == [1]
    assert len(world.dead_letters()) == 1


async def test_bodies_from_the_store_are_held_a_few_at_a_time(world, run):
    world.answer_limits = AnswerLimits(claimed_bytes=200, timeout_s=5.0)
    references = []
    for number in range(5):
        body = json.dumps({"instances": [[number, 0]], "parameters": {"filling": "x" * 100}}).encode()

        async def chunks(body: bytes = body) -> Any:
            yield body

        references.append((await world.store.put(chunks(), max_bytes=10**6)).sha256)
    runner = await world.runner()
    await world.endpoint(runner.replica)
    for reference in references:
        await world.ask(b"", ce_id=reference, ce_dataref=f"sha256:{reference}")
    async with run(world.streams()):
        assert predicted(await world.results(5)) == [0, 1, 2, 3, 4]
    assert sums(runner) == [[0], [1], [2], [3], [4]]


async def test_every_form_is_answered_in_kind(world, run):
    await world.endpoint((await world.runner()).replica)
    tensor = {"name": "input", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}
    await world.ask({"instances": [[1, 2]]})
    await world.ask({"inputs": [tensor], "id": "mine"})
    raw = InferRequest({"input": np.array([[1.0, 2.0]])}, binary_data_output=True, id="pb")
    await world.ask(v2_grpc.write_request(raw, "iris"), **{"content-type": "application/x-protobuf"})
    head = json.dumps(
        {
            "inputs": [{**{k: v for k, v in tensor.items() if k != "data"}, "parameters": {"binary_data_size": 16}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    await world.ask(head + np.array([1.0, 2.0]).tobytes(), **{"inference-header-content-length": str(len(head))})
    async with run(world.streams()):
        await world.until(lambda: world.broker.committed(GROUP, REQUESTS) == 4)
    plain, v2, protobuf, binary = world.broker.records(RESULTS)
    assert InferenceResult.model_validate_json(plain.value).predictions == [3.0]
    body = json.loads(v2.value)
    assert body["outputs"] == [{"name": "predict", "datatype": "FP64", "shape": [1], "data": [3.0]}]
    assert (body["id"], body["model_version"], InferenceResult.model_validate(body).model_version) == ("mine", "1", 1)
    assert protobuf.header("content-type") == "application/x-protobuf"
    assert v2_grpc.read_response(protobuf.value).outputs["predict"].tolist() == [3.0]
    length = int(binary.header("inference-header-content-length"))
    assert json.loads(binary.value[:length])["outputs"][0]["parameters"]["binary_data_size"] == 8
    assert np.frombuffer(binary.value[length:], "<f8").tolist() == [3.0]


async def test_together_is_the_same_as_one_at_a_time(tmp_path, run):
    generator = np.random.default_rng(7)
    bodies: list[Any] = []
    for _ in range(300):
        values = generator.normal(size=(generator.integers(1, 4), 2)).round(3).tolist()
        match generator.integers(0, 10):
            case 0:
                bodies.append({"instances": [[1, 2, 3]]})
            case 1:
                tensor = {"name": "input", "shape": [len(values), 2], "datatype": "FP32", "data": values}
                bodies.append({"inputs": [tensor], "outputs": [{"name": "predict"}]})
            case 2:
                bodies.append({"instances": values, "outputs": ["predict"]})
            case 3:
                bodies.append({"instances": [[None, True]], "parameters": {}})
            case 4:
                bodies.append({"inputs": {"input": values}})
            case 5:
                bodies.append(b"no json")
            case 6 | 7:
                flat = [None, *np.ravel(values).tolist()[1:]] if generator.random() < 0.1 else np.ravel(values).tolist()
                shape = [len(values), 3 if generator.random() < 0.05 else 2]
                bodies.append({"inputs": [{"name": "input", "shape": shape, "datatype": "FP64", "data": flat}]})
            case _:
                bodies.append({"instances": values})
    answers = []
    for chunk_records in (100, 1):
        (tmp_path / str(chunk_records)).mkdir()
        world = World(tmp_path / str(chunk_records), limits=StreamLimits(chunk_records=chunk_records))
        runner = await world.runner()
        await world.endpoint(runner.replica)
        await world.ask(*bodies)
        async with run(world.streams()):
            await world.results(len(bodies))
        answers.append([(record.value, record.header("ce_id")) for record in world.broker.records(RESULTS)])
        await runner.stop()
    assert answers[0] == answers[1]


async def test_the_same_request_is_answered_by_the_same_version_under_the_same_id(world, run):
    one, other = await world.runner(offset=0), await world.runner(offset=100)
    shares = {ID: 50, "shop.iris.2": 50}
    await world.publish(
        EndpointSnapshot(endpoint_name="shop", traffic=shares, deployment_ids=tuple(shares), created_at=NOW, updated_at=NOW),
        deployment(replicas=(one.replica,)),
        deployment(replicas=(other.replica,), deployment_id="shop.iris.2", version=2),
    )
    for _ in range(2):
        for number in range(40):
            await world.ask(*rows(1), ce_id=f"r-{number}", ce_source="/me")
    async with run(world.streams()):
        results = await world.results(80)
    assert results[:40] == results[40:]
    assert set(Counter(result["model_version"] for result in results)) == {1, 2}
    ids = [record.header("ce_id") for record in world.broker.records(RESULTS)]
    assert ids[:40] == ids[40:]
    assert len(set(ids)) == 40


async def test_a_broker_that_was_away_costs_no_record(world, run):
    await world.endpoint((await world.runner()).replica)
    async with run(world.streams()):
        await world.until(lambda: len(world.created) == 2)
        await world.ask(*rows(1))
        world.broker.is_away = True
        await asyncio.sleep(0.03)
        world.broker.is_away = False
        assert predicted(await world.results(1)) == [1]


async def test_a_stop_finishes_what_was_asked_and_leaves_the_rest(world, run):
    world.limits = StreamLimits(chunk_records=4)
    runner, answer = await world.runner(), asyncio.Event()
    runner.behave = lambda number: nothing_after(answer)
    await world.endpoint(runner.replica)
    await world.ask(*rows(*range(12)))
    async with run(world.streams()):
        await world.until(lambda: runner.asked)
        asyncio.get_running_loop().call_later(0.02, answer.set)
    assert world.broker.committed(GROUP, REQUESTS) == len(world.broker.records(RESULTS)) == 4


async def test_a_stop_does_not_wait_for_a_model_that_hangs(world, run):
    world.limits = StreamLimits(grace_s=0.05)
    runner = await world.runner()
    runner.behave = lambda number: "hang"
    await world.endpoint(runner.replica)
    await world.ask(*rows(1), {"instances": [POISON]})
    started = time.monotonic()
    async with run(world.streams()):
        await world.until(lambda: runner.asked)
    assert time.monotonic() - started < 5
    assert world.broker.committed(GROUP, REQUESTS) == 0
    runner.behave = lambda number: None
    async with run(world.streams()):
        assert predicted(await world.results(2)) == [1, -2]


async def test_a_stop_does_not_wait_for_a_runner_to_appear(world, run):
    runner = await world.runner()
    runner.behave = lambda number: "hang"
    await world.endpoint(runner.replica)
    await world.ask(*rows(1))
    async with run(world.streams()):
        await world.until(lambda: runner.asked)
        await runner.stop()
    assert world.broker.committed(GROUP, REQUESTS) == 0
    assert world.broker.records(DLQ.name) == ()


def streams_of(name: str) -> list[Any]:
    return [task for task in asyncio.all_tasks() if task.get_name() == f"stream {name}"]


async def test_a_stream_begins_with_its_endpoint_and_ends_with_it(world, run):
    runner = await world.runner()
    async with run(world.streams()):
        await world.ask(*rows(1))
        await asyncio.sleep(0.02)
        assert world.created == []
        await world.endpoint(runner.replica)
        await world.results(1)
        await world.forget(STATE_ENDPOINTS.name, "shop")
        await world.until(lambda: not streams_of("shop"))
        await world.ask(*rows(2))
        await asyncio.sleep(0.03)
        assert len(world.broker.records(RESULTS)) == 1
        await world.endpoint(runner.replica)
        assert predicted(await world.results(2)) == [1, 2]


async def test_a_record_in_hand_when_its_endpoint_is_deleted_stays_on_the_topic(world, run):
    runner = await world.runner()
    runner.behave = lambda number: "hang"
    await world.endpoint(runner.replica)
    await world.ask(*rows(1))
    async with run(world.streams()):
        await world.until(lambda: runner.asked)
        await runner.stop()
        await world.forget(STATE_ENDPOINTS.name, "shop")
        await world.until(lambda: not streams_of("shop"))
    assert world.broker.committed(GROUP, REQUESTS) == 0
    assert world.broker.records(RESULTS) == ()


async def test_connections_to_replicas_that_are_gone_are_closed(world, run):
    first, second = await world.runner(), await world.runner()
    await world.endpoint(first.replica)
    await world.ask(*rows(1))
    async with run(world.streams()):
        await world.results(1)
        await world.endpoint(second.replica)
        await world.until(lambda: not first._writers)
        await world.ask(*rows(2))
        await world.results(2)


async def test_a_new_signature_is_used_from_the_next_record_on(world, run):
    runner = await world.runner()
    await world.endpoint(runner.replica)
    async with run(world.streams()):
        await world.ask(*rows(1))
        await world.results(1)
        await world.publish(deployment(replicas=(runner.replica,), signature=signature(3), version=2, generation=2))
        await world.until(lambda: world.state.route("shop", 0.0).version == 2)
        await world.ask({"instances": [[1, 1, 1]]})
        await world.until(lambda: len(world.broker.records(RESULTS)) == 2)
    result = json.loads(world.broker.records(RESULTS)[1].value)
    assert (result["predictions"], result["model_version"]) == ([3.0], 2)


async def test_the_runners_span_is_part_of_the_trace_of_its_record(tmp_path, run, monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    world = World(tmp_path, spans=RunnerSpans(SimpleSpanProcessor(exporter)))
    runner = await world.runner()
    await world.endpoint(runner.replica)
    sampled, unsampled = "0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c"
    await world.ask(*rows(1), traceparent=f"00-{sampled}-b7ad6b7169203331-01")
    await world.ask(*rows(2), traceparent=f"00-{unsampled}-b7ad6b7169203331-00")
    async with run(world.streams()):
        await world.results(2)
    await runner.stop()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    process, infer = spans[f"process {REQUESTS}"], spans["infer iris"]
    assert len(exporter.get_finished_spans()) == 2
    assert f"{process.context.trace_id:032x}" == f"{infer.context.trace_id:032x}" == sampled
    assert infer.parent.span_id == process.context.span_id
    assert process.attributes["messaging.kafka.offset"] == 0
    assert infer.attributes["service.instance.id"] == runner.replica.replica_id
    first, second = world.broker.records(RESULTS)
    assert first.header("traceparent") == f"00-{sampled}-{process.context.span_id:016x}-01"
    assert second.header("traceparent") == f"00-{unsampled}-b7ad6b7169203331-00"


@pytest.mark.parametrize("traceparent", ["01-{}-01-later", "01-{}-01-zz", " 00-{}-01 ", "00-{}-01\n", "00-{}-ff"])
async def test_no_trace_context_stops_a_stream(tmp_path, run, monkeypatch, traceparent):
    provider = TracerProvider()
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    world = World(tmp_path, spans=RunnerSpans(SimpleSpanProcessor(InMemorySpanExporter())))
    runner = await world.runner()
    await world.endpoint(runner.replica)
    await world.ask(*rows(1), traceparent=traceparent.format("0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"))
    async with run(world.streams()):
        assert predicted(await world.results(1)) == [1]
    await runner.stop()
    assert world.broker.records(RESULTS)[0].header("traceparent").startswith("00-0af7651916cd43dd8448eb211c80319c-")


CAFE_REQUESTS, CAFE_RESULTS = inference_requests("cafe").name, inference_results("cafe").name


async def two_endpoints(world: World) -> None:
    """``shop`` and ``cafe``, with five requests each."""
    runner = await world.runner()
    await world.endpoint(runner.replica)
    await world.publish(
        EndpointSnapshot(
            endpoint_name="cafe", traffic={"cafe.iris.1": 100}, deployment_ids=("cafe.iris.1",), created_at=NOW, updated_at=NOW
        ),
        deployment(deployment_id="cafe.iris.1", endpoint_name="cafe", replicas=(runner.replica,)),
    )
    await world.ask(*rows(*range(5)))
    await ask_cafe(world, 5)


async def ask_cafe(world: World, count: int) -> None:
    await world.broker.append([Record(CAFE_REQUESTS, None, json.dumps(row).encode()) for row in rows(*range(count))])


def failing(monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException) -> set[str]:
    """Topics of requests whose log raises in a method, for as long as they are in the set."""
    original, topics = getattr(MemoryStreamLog, method), set()

    async def buggy(self: Any, *arguments: Any) -> Any:
        if self._topic in topics:
            raise error
        return await original(self, *arguments)

    monkeypatch.setattr(MemoryStreamLog, method, buggy)
    return topics


@pytest.mark.parametrize(
    "error",
    [TypeError("an argument that is not taken"), SessionLostError("the broker says no"), asyncio.CancelledError("lost")],
)
@pytest.mark.parametrize("method", ["open", "take", "commit", "lags"])
async def test_a_stream_that_fails_is_alone_in_it(world, run, monkeypatch, caplog, method, error):
    broken = failing(monkeypatch, method, error)
    broken.add(REQUESTS)
    await two_endpoints(world)
    components = world.streams()
    failures, is_failing = world.metrics.counter(STREAM_FAILURES, "shop"), world.metrics.gauge(STREAM_FAILING, "shop")
    async with run(components):
        await world.until(lambda: failures.value >= 3)
        await ask_cafe(world, 5)
        await world.until(lambda: len(world.broker.records(CAFE_RESULTS)) == 10)
        assert components[1].is_ready()
        assert is_failing.value == 1 or method == "lags"
        if method == "commit":
            (said,) = components[1].failing()
            assert (said.endpoint, said.partition, said.offset) == ("shop", 0, 0)
            assert str(error) in said.cause
            assert said.failures >= 3
        broken.clear()
        assert predicted(await world.results(5)) == list(range(5))
        await world.until(lambda: is_failing.value == 0)
        assert components[1].failing() == []
    assert len(world.broker.records(RESULTS)) == 5
    assert world.metrics.counter(STREAM_FAILURES, "cafe").value == 0
    assert str(error) in caplog.text
    if method == "commit":
        assert f"streaming {REQUESTS}, partition 0 offsets 0 to 4" in caplog.text


async def test_streaming_is_not_ready_while_none_of_its_streams_advances(world, run, monkeypatch):
    monkeypatch.setattr(streams, "LAG_INTERVAL_S", 0.01)
    broken = failing(monkeypatch, "commit", TypeError("a bug"))
    broken |= {REQUESTS, CAFE_REQUESTS}
    components = world.streams()
    assert not components[1].is_ready()
    async with run(components):
        assert components[1].is_ready()
        await two_endpoints(world)
        await world.until(lambda: not components[1].is_ready())
        broken.remove(CAFE_REQUESTS)
        await world.until(components[1].is_ready)
        assert len(world.broker.records(CAFE_RESULTS)) == 5
        assert not world.broker.records(RESULTS)


async def test_a_stream_with_nothing_left_to_do_fails_no_longer(world, run, monkeypatch):
    monkeypatch.setattr(streams, "LAG_INTERVAL_S", 0.01)
    broken = failing(monkeypatch, "take", TypeError("a bug"))
    broken.add(REQUESTS)
    await world.endpoint((await world.runner()).replica)
    components = world.streams()
    async with run(components):
        await world.until(lambda: world.logs and not components[1].is_ready())
        broken.clear()
        await world.until(components[1].is_ready)


async def test_failing_streams_are_written_down_until_they_advance(tmp_path, world, run, monkeypatch):
    monkeypatch.setattr(reporting, "LOOK_S", 0.01)
    path, failing_now = tmp_path / "run" / "streams.json", [StreamReport("shop", 3, 17, "TypeError: a bug", 2, 1.0)]
    async with run([reporting.Reporting(path, lambda: failing_now)]):
        assert reports.read_streams(path) == [StreamReport("shop", 3, 17, "TypeError: a bug", 2, 1.0)]
        failing_now.clear()
        await world.until(lambda: path.exists() and not reports.read_streams(path))
    assert not path.exists()
