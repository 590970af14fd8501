"""Records in, results out: what happens to each of them, and when it counts as done."""

import asyncio
import json
import time
from typing import Any

import pytest

from libs.messaging.broker import Offsets
from libs.messaging.memory import MemoryConsumer, MemoryProducer
from schemas.registry import Replica
from schemas.topics import DLQ, STATE_ENDPOINTS
from services.serving import streaming
from services.serving.streaming import StreamLimits
from tests.unit.serving.conftest import GROUP, ID, REQUESTS, RESULTS, AwayError, World, signature

POISON = [[-1.0, -1.0]]


def rows(*sums: float) -> list[dict[str, Any]]:
    return [{"instances": [[value, 0]]} for value in sums]


async def nothing_after(event: asyncio.Event) -> None:
    await event.wait()


def predicted(results: list[dict[str, Any]]) -> list[Any]:
    return [result.get("predictions", [result.get("error")])[0] for result in results]


async def test_every_record_gets_one_result_in_order(world, run):
    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(*range(100)))
    async with run(world.streams()):
        assert predicted(await world.results(100)) == list(range(100))
    assert len(world.broker.records(RESULTS)) == 100
    assert world.created == [REQUESTS, RESULTS]


async def test_the_order_stands_also_when_answers_come_out_of_order(world, run):
    slow, quick = await world.runner(), await world.runner()
    quick_was_asked = asyncio.Event()
    slow.behave = lambda number: nothing_after(quick_was_asked)
    quick.behave = lambda number: quick_was_asked.set()
    await world.endpoint(slow.replica, quick.replica)
    await world.ask(*rows(1, 2))
    async with run(world.streams()):
        assert predicted(await world.results(2)) == [1, 2]


async def test_all_replicas_are_asked_in_turn(world, run):
    runners = [await world.runner(), await world.runner()]
    await world.endpoint(*(runner.replica for runner in runners))
    await world.ask(*rows(*range(8)))
    async with run(world.streams()):
        await world.results(8)
    assert [len(runner.asked) for runner in runners] == [4, 4]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"{", "not valid JSON"),
        (None, "has no value"),
        ({"instances": [[1, 2, 3]]}, "expects rows of 2 numbers"),
        ({"rows": 1}, "exactly one of"),
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
    assert (letter.origin_topic, letter.origin_offset, letter.consumer) == (REQUESTS, 1, "serving")
    assert says in letter.cause


async def test_a_record_on_which_the_model_raises_fails(world, run):
    runner = await world.runner()
    runner.behave = lambda number: ("model_error", "the model raised ValueError: no") if runner.rows[-1] == POISON else None
    await world.endpoint(runner.replica)
    await world.ask({"instances": POISON}, *rows(2))
    async with run(world.streams()):
        assert predicted(await world.results(2)) == ["the model raised ValueError: no", 2]
    assert len(runner.asked) == 2


async def test_without_a_runner_records_wait_and_nothing_is_lost(world, run):
    await world.endpoint()
    await world.ask(*rows(1, 2))
    async with run(world.streams()):
        await asyncio.sleep(0.03)
        assert world.broker.committed(GROUP, REQUESTS) == 0
        await world.publish(world.ready((await world.runner()).replica))
        assert predicted(await world.results(2)) == [1, 2]
    assert world.dead_letters() == []


async def test_a_runner_that_goes_away_in_the_middle_costs_no_record(world, run):
    gone, other = await world.runner(), await world.runner()
    gone.behave = lambda number: "hang" if number > 2 else None
    await world.endpoint(gone.replica)
    await world.ask(*rows(*range(10)))
    async with run(world.streams()):
        await world.until(lambda: len(gone.asked) > 2)
        await gone.stop()
        await world.publish(world.ready(other.replica))
        assert predicted(await world.results(10)) == list(range(10))
    assert world.dead_letters() == []


async def test_a_replica_that_is_gone_but_still_listed_costs_no_record(world, run):
    gone, other = await world.runner(), await world.runner()
    await gone.stop()
    await world.endpoint(gone.replica, other.replica)
    await world.ask(*rows(*range(20)))
    async with run(world.streams()):
        assert predicted(await world.results(20)) == list(range(20))
    assert world.dead_letters() == []


async def test_a_record_that_kills_its_runner_is_found_out_and_its_neighbours_are_not_blamed(world, run):
    runner = await world.runner()

    def behave(number: int) -> str | None:
        if runner.rows[-1] == POISON:
            for writer in runner._writers:
                writer.close()
            return "drop"
        return None

    runner.behave = behave
    await world.endpoint(runner.replica)
    await world.ask(*rows(1, 2), {"instances": POISON}, *rows(4, 5))
    async with run(world.streams()):
        results = await world.results(5)
    assert [result["status"] for result in results] == ["completed", "completed", "failed", "completed", "completed"]
    assert "3 runners were lost" in results[2]["error"]
    assert runner.rows.count(POISON) == streaming.MOST_LOST_RUNNERS
    assert len(world.dead_letters()) == 1


async def test_a_record_on_which_the_model_hangs_is_given_up_and_its_neighbours_are_answered(world, run):
    world.limits = StreamLimits(in_flight=4, timeout_s=0.05)
    runner = await world.runner()
    runner.behave = lambda number: "hang" if runner.rows[-1] == POISON else None
    await world.endpoint(runner.replica)
    await world.ask(*rows(1), {"instances": POISON}, *rows(3))
    async with run(world.streams()):
        assert predicted(await world.results(3)) == [1, "the model did not answer within 0.05 s", 3]


async def test_nobody_is_asked_alone_of_a_runner_that_is_stuck(world, run):
    world.limits = StreamLimits(in_flight=4, timeout_s=0.05)
    stuck, fresh = await world.runner(), await world.runner()
    stuck.busy_s, stuck.behave = 31.0, lambda number: "hang"
    await world.endpoint(stuck.replica)
    await world.ask(*rows(1, 2))
    async with run(world.streams()):
        await world.until(lambda: len(stuck.asked) == 2)
        await asyncio.sleep(0.15)
        assert world.broker.records(RESULTS) == ()
        await world.publish(world.ready(fresh.replica))
        assert predicted(await world.results(2)) == [1, 2]
    assert len(stuck.asked) == 2


async def test_a_slow_model_is_given_its_time_for_each_record(world, run):
    world.limits = StreamLimits(in_flight=8, timeout_s=0.2)
    runner = await world.runner()
    runner.behave = lambda number: asyncio.sleep(0.05)
    await world.endpoint(runner.replica)
    await world.ask(*rows(*range(8)))
    async with run(world.streams()):
        assert predicted(await world.results(8)) == list(range(8))
    assert len(runner.asked) == 8


async def test_only_so_many_records_are_asked_at_once(world, run, monkeypatch):
    now: list[int] = []
    most, infer = 0, streaming.RunnerPool.infer

    async def counted(self: Any, *args: Any) -> Any:
        nonlocal most
        now.append(1)
        most = max(most, len(now))
        try:
            return await infer(self, *args)
        finally:
            now.pop()

    monkeypatch.setattr(streaming.RunnerPool, "infer", counted)
    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(*range(40)))
    async with run(world.streams()):
        await world.results(40)
    assert most == world.limits.in_flight


async def test_a_runner_that_refuses_the_key_is_no_fault_of_the_record(world, run):
    runner, other = await world.runner(), await world.runner()
    await world.endpoint(Replica(replica_id="somebody else", address=runner.replica.address))
    await world.ask(*rows(1))
    async with run(world.streams()):
        await asyncio.sleep(0.05)
        assert world.broker.records(RESULTS) == ()
        await world.publish(world.ready(other.replica))
        assert predicted(await world.results(1)) == [1]


async def test_an_offset_is_committed_after_the_results_were_sent(world, run, monkeypatch):
    order: list[str] = []
    send, commit = MemoryProducer.send, MemoryConsumer.commit

    async def failing_send(self: Any, records: Any) -> None:
        order.append("send")
        if len(order) < 3:
            raise AwayError("the broker is away")
        await send(self, records)

    async def noted_commit(self: Any, offsets: Offsets) -> None:
        order.append("commit")
        await commit(self, offsets)

    monkeypatch.setattr(MemoryProducer, "send", failing_send)
    monkeypatch.setattr(MemoryConsumer, "commit", noted_commit)
    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(1))
    async with run(world.streams()):
        await world.results(1)
    assert order == ["send", "send", "send", "commit"]


async def test_what_was_answered_and_not_committed_is_answered_again_with_the_same_id(world, run, monkeypatch):
    async def lost_commit(self: Any, offsets: Offsets) -> None:
        raise AwayError("the broker is away")

    await world.endpoint((await world.runner()).replica)
    await world.ask(*rows(1), key="r-1")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryConsumer, "commit", lost_commit)
        async with run(world.streams()):
            await world.until(lambda: world.broker.records(RESULTS))
    async with run(world.streams()):
        await world.results(1)
    first, second = world.broker.records(RESULTS)
    assert first.header("ce_id") == second.header("ce_id")
    assert first.value == second.value


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
    runner = await world.runner()
    answer = asyncio.Event()
    runner.behave = lambda number: nothing_after(answer)
    await world.endpoint(runner.replica)
    await world.ask(*rows(*range(12)))
    async with run(world.streams()):
        await world.until(lambda: runner.asked)
        asyncio.get_running_loop().call_later(0.02, answer.set)
    assert world.broker.committed(GROUP, REQUESTS) == len(world.broker.records(RESULTS)) == world.limits.in_flight


async def test_a_stop_does_not_wait_for_a_model_that_hangs(world, run):
    world.limits = StreamLimits(in_flight=4, grace_s=0.05)
    runner = await world.runner()
    runner.behave = lambda number: "hang" if runner.rows[-1] == POISON else None
    await world.endpoint(runner.replica)
    await world.ask(*rows(1), {"instances": POISON})
    started = time.monotonic()
    async with run(world.streams()):
        await world.until(lambda: len(runner.asked) == 2)
    assert time.monotonic() - started < 2
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


async def test_a_batch_that_waits_too_long_is_given_back_and_read_again(world, run):
    world.limits = StreamLimits(in_flight=4, timeout_s=5.0, hold_s=0.05)
    runner = await world.runner()
    runner.behave = lambda number: "hang" if number == 1 else None
    await world.endpoint(runner.replica)
    await world.ask(*rows(1))
    async with run(world.streams()):
        assert predicted(await world.results(1)) == [1]
    assert len(runner.asked) == 2


async def test_a_stream_begins_with_its_endpoint_and_ends_with_it(world, run):
    runner = await world.runner()
    async with run(world.streams()):
        await world.ask(*rows(1))
        await asyncio.sleep(0.02)
        assert world.created == []
        await world.endpoint(runner.replica)
        await world.results(1)
        await world.forget(STATE_ENDPOINTS.name, "shop")
        await world.until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "stream shop"])
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
        await world.until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "stream shop"])
    assert world.broker.committed(GROUP, REQUESTS) == 0
    assert world.broker.records(RESULTS) == ()


async def test_a_bug_in_a_stream_ends_the_component(world, run, monkeypatch):
    async def fail(self: Any, *_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(MemoryConsumer, "get_many", fail)
    await world.endpoint((await world.runner()).replica)
    with pytest.raises(ZeroDivisionError):
        async with run(world.streams()):
            await asyncio.sleep(0.05)


async def test_connections_to_replicas_that_are_gone_are_closed(world, run, monkeypatch):
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
        await world.publish(world.ready(runner.replica, signature=signature(3), version=2, generation=2))
        await world.until(lambda: world.state.deployments[ID].snapshot.version == 2)
        await world.ask({"instances": [[1, 1, 1]]})
        await world.until(lambda: len(world.broker.records(RESULTS)) == 2)
    result = json.loads(world.broker.records(RESULTS)[1].value)
    assert (result["predictions"], result["model_version"]) == ([3.0], 2)


async def test_the_runners_span_is_part_of_the_trace_of_its_record(tmp_path, run, monkeypatch):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from libs import telemetry
    from libs.inference.spans import RunnerSpans

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    world = World(tmp_path, spans=RunnerSpans(SimpleSpanProcessor(exporter)))
    runner = await world.runner()
    await world.endpoint(runner.replica)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    await world.ask(*rows(1), traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
    async with run(world.streams()):
        await world.results(1)
    await runner.stop()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    process, infer = spans[f"process {REQUESTS}"], spans["infer iris"]
    assert f"{process.context.trace_id:032x}" == f"{infer.context.trace_id:032x}" == trace_id
    assert infer.parent.span_id == process.context.span_id
    assert process.attributes["messaging.kafka.offset"] == 0
    assert infer.attributes["service.instance.id"] == runner.replica.replica_id
    (result,) = world.broker.records(RESULTS)
    assert result.header("traceparent") == f"00-{trace_id}-{process.context.span_id:016x}-01"
