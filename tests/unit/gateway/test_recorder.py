"""What the recorder makes of what the data plane tells it."""

import numpy as np
import pytest

from libs.inference.errors import InvalidInputError, ModelError, RunnerGoneError
from libs.messaging.memory import MemoryBroker
from schemas.predictions import InstanceState, OutcomeCounts
from schemas.topics import EVENTS
from services.gateway.errors import LogUnavailableError
from services.gateway.predictions import Outcome, Protocol
from services.gateway.recorder import Recorder, RecorderLimits
from tests.unit.gateway.recording import audited, recording, route


async def test_every_request_has_one_row(tmp_path):
    async with recording(tmp_path) as world:
        world.answer("a", "b")
        failed = world.accept("c", protocol=Protocol.GRPC, principal="alice")
        world.end(failed, Outcome.FAILED, InvalidInputError("no"))
        await world.written()
        rows = world.rows()
        assert {(name, row["outcome"], row["error"]) for name, row in rows.items()} == {
            ("a", "completed", ""),
            ("b", "completed", ""),
            ("c", "failed", "invalid_input"),
        }
        assert rows["c"]["protocol"] == "grpc"
        assert rows["c"]["principal"] == "alice"
        assert rows["c"]["status"] == 400
        assert np.isnan(rows["c"]["queue_s"])
        assert rows["a"]["latency_s"] == pytest.approx(0.5)
        assert rows["a"]["queue_s"] == pytest.approx(0.1, rel=1e-4)
        assert rows["a"]["model_s"] == pytest.approx(0.25)


async def test_a_record_is_of_one_deployment(tmp_path):
    async with recording(tmp_path) as world:
        world.answer("a")
        world.answer("b", endpoint="other")
        await world.written()
        assert {(batch.head.endpoint_name, batch.head.deployment_id, batch.head.model_version) for batch in world.batches()} == {
            ("e", "e.m.1", "1"),
            ("other", "other.m.1", "1"),
        }


async def test_inputs_and_outputs_are_those_of_their_request(tmp_path):
    async with recording(tmp_path) as world:
        one = world.answer("a", "b", rows=2)
        two = world.answer("c")
        await world.written()
        for pending in [*one, *two]:
            inputs, outputs = world.payload()[pending.sequence]
            assert inputs == [[float(pending.sequence)] * 2] * pending.rows
            assert outputs == [10.0 * pending.sequence] * pending.rows


async def test_the_same_requests_are_sampled_again(tmp_path):
    async with recording(tmp_path) as world:
        world.endpoint("e", sample_percent=30)
        names = [f"request-{number}" for number in range(200)]
        world.answer(*names)
        await world.written()
        sampled = set(world.payload())
        assert 30 < len(sampled) < 90
        again = world.answer(*names)
        await world.written()
        repeated = {pending.sequence - 200 for pending in again if pending.sequence in world.payload()}
        assert repeated == sampled
        assert len(world.rows()) == 200


async def test_a_rate_leaves_inputs_out_and_keeps_the_rows(tmp_path):
    async with recording(tmp_path) as world:
        world.endpoint("e", max_rows_per_s=3)
        for number in range(5):
            world.answer(f"r{number}", rows=2)
        await world.written()
        assert len(world.rows()) == 5
        assert len(world.payload()) == 2
        assert world.value("millrace_log_payload_left_out_total", endpoint="e", reason="rate") == 3


async def test_what_is_larger_than_a_record_is_left_out(tmp_path):
    async with recording(tmp_path) as world:
        world.endpoint("e", max_rows_per_s=1_000_000)
        world.answer("huge", rows=100_000)
        world.answer("large", "larger", rows=20_000)
        await world.written()
        assert len(world.rows()) == 3
        assert {len(inputs) for inputs, _ in world.payload().values()} == {20_000}
        assert len(world.payload()) == 2
        assert world.value("millrace_log_payload_left_out_total", reason="oversized") == 1


async def test_a_bad_request_keeps_its_inputs_only(tmp_path):
    async with recording(tmp_path) as world:
        members = world.accept("bad")
        batch = world.batch(members)
        batch.outputs = None
        error = ModelError("it raised")
        world.recorder.batch_ended(batch, error)
        world.end(members, Outcome.FAILED, error)
        await world.written()
        assert world.payload() == {1: ([[1.0, 1.0]], None)}


async def test_requests_that_will_be_asked_again_are_captured_once(tmp_path):
    async with recording(tmp_path) as world:
        members = world.accept("a", "b")
        world.recorder.batch_ended(world.batch(members), RunnerGoneError("gone"))
        world.recorder.batch_ended(world.batch(members), ModelError("one of them"))
        for pending in members:
            world.recorder.batch_ended(world.batch([pending]), None)
        world.end(members)
        await world.written()
        assert sorted(world.payload()) == [1, 2]
        assert sum(len(block.sequence) for batch in world.batches() for block in batch.blocks) == 2


async def test_rows_of_many_requests_are_cut_into_records_before_the_next_tick(tmp_path):
    async with recording(tmp_path) as world:
        for begin in range(0, 10_240, 1024):
            world.answer(*(f"r{number}" for number in range(begin, begin + 1024)))
        assert world.recorder._ledger.records >= 2
        await world.written()
        assert len(world.rows()) == 10_240
        (report,) = audited(world.broker, [world.recorder.instance])
        assert report.is_sound, report.findings


async def test_an_endpoint_without_a_log_is_counted(tmp_path):
    async with recording(tmp_path) as world:
        world.endpoint("e", mode="off")
        world.answer("a", "b")
        await world.written()
        assert world.batches() == []
        assert world.recorder._ledger.counters().off == OutcomeCounts(completed=2)
        assert world.value("millrace_log_off_total", outcome="completed") == 2


async def test_metrics_count_what_happened(tmp_path):
    async with recording(tmp_path) as world:
        world.endpoint("e")
        world.answer("a", "b", rows=3)
        waiting = world.accept("c")
        world.recorder.refused("e", Protocol.V1, "overloaded")
        world.recorder.refused("no such endpoint", Protocol.V1, "not_found")
        assert world.value("millrace_requests_accepted_total", endpoint="e") == 3
        assert world.value("millrace_requests_total", model_name="m", model_version="1", protocol="v1", outcome="completed") == 2
        assert world.value("millrace_requests_in_flight", endpoint="e") == 1
        assert world.value("millrace_request_rows_total", endpoint="e") == 6
        assert world.value("millrace_request_seconds", endpoint="e") == pytest.approx(1.0)
        assert world.value("millrace_model_seconds", endpoint="e") == pytest.approx(0.25)
        assert world.value("millrace_batch_rows") == 6
        assert world.value("millrace_batches_total", reason="idle") == 1
        assert world.value("millrace_requests_refused_total", endpoint="e", reason="overloaded") == 1
        assert world.value("millrace_requests_refused_total", endpoint="", reason="not_found") == 1
        world.end(waiting, Outcome.EXPIRED, None)
        assert world.value("millrace_requests_in_flight") == 0


async def test_predictions_go_on_while_the_broker_is_away_and_the_loss_is_counted(tmp_path):
    async with recording(tmp_path, queue_bytes=1_000) as world:
        world.broker.is_away = True
        for number in range(20):
            world.answer(f"r{number}")
            world.recorder.tick()
        lost = world.recorder._ledger.counters().lost
        assert 0 < lost.completed < 20
        assert world.value("millrace_log_lost_total", outcome="completed") == lost.completed
        world.broker.is_away = False
        assert await world.recorder._writer.drain()
        await world.written()
        (said,) = world.broker.records(EVENTS.name)
        assert b"millrace.gateway.log.lost.v1" in dict(said.headers)["ce_type"]
        assert b'"completed":%d' % lost.completed in said.value
    (report,) = audited(world.broker)
    assert report.is_sound, report.findings
    assert report.counters.lost == lost


async def test_a_required_log_refuses_what_it_cannot_take_and_loses_nothing(tmp_path):
    async with recording(tmp_path, queue_bytes=1_000) as world:
        world.endpoint("e", mode="required")
        world.endpoint("other")
        assert world.recorder.refusal("e") is None
        world.broker.is_away = True
        world.answer("a")
        for _ in range(3):
            world.answer("b", endpoint="e")
            world.recorder.tick()
        assert isinstance(world.recorder.refusal("e"), LogUnavailableError)
        assert world.recorder.refusal("e").http_status == 503
        assert world.recorder.refusal("other") is None
        world.broker.is_away = False
        assert await world.recorder._writer.drain()
        world.recorder.tick()
        assert world.recorder.refusal("e") is None
        assert world.recorder._ledger.counters().lost.total == 0


async def test_it_says_that_it_lives_and_that_it_stopped(tmp_path):
    async with recording(tmp_path) as world:
        await world.written()
    first, *_, last = world.said()
    assert (first.state, first.counters.accepted) == (InstanceState.LIVE, 0)
    assert last.state is InstanceState.STOPPED
    assert list(tmp_path.iterdir()) == []


async def test_what_is_left_at_a_stop_is_written(tmp_path):
    async with recording(tmp_path) as world:
        world.answer("a")
    assert set(world.rows()) == {"a"}
    (report,) = audited(world.broker)
    assert (report.state, report.is_sound, report.counters.ended.completed) == (InstanceState.STOPPED, True, 1)


async def test_the_next_gateway_settles_one_that_was_killed(tmp_path):
    broker = MemoryBroker()
    async with recording(tmp_path, broker, stop=False) as killed:
        killed.answer("written")
        await killed.written()
        killed.answer("not written")
        killed.accept("in flight")
    (before,) = audited(broker)
    assert "nobody has settled" in before.findings[-1]
    async with recording(tmp_path, broker) as world:
        await world.recorder._recovery.settle()
        rows = world.rows()
        assert (rows["not written"]["outcome"], rows["in flight"]["outcome"]) == ("completed", "failed")
        assert rows["in flight"]["error"] == "gateway_lost"
        assert world.value("millrace_ledger_recovered_total", outcome="failed") == 1
        reports = {report.instance: report for report in audited(broker, [world.recorder.instance])}
        settled = reports[killed.recorder.instance]
        assert (settled.state, settled.findings) == (InstanceState.LOST, ())
        assert settled.counters.ended == OutcomeCounts(completed=2, failed=1)
        assert [path.name for path in tmp_path.iterdir()] == [f"ledger-{world.recorder.instance}"]


async def test_a_row_that_was_written_unknown_to_its_gateway_counts_once(tmp_path):
    broker = MemoryBroker()
    async with recording(tmp_path, broker, stop=False) as killed:
        killed.recorder._ledger.logged = lambda *_: None  # the acknowledgement never came
        killed.answer("a")
        await killed.written()
    async with recording(tmp_path, broker) as world:
        await world.recorder._recovery.settle()
        settled = next(report for report in audited(broker, [world.recorder.instance]) if report.state is InstanceState.LOST)
        assert (settled.findings, settled.rows.completed) == ((), 1)
        assert [request_id for batch in world.batches() for request_id in batch.head.request_ids] == ["a"]


async def test_a_stop_without_a_broker_leaves_the_account_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("services.gateway.prediction_log._STOP_S", 0.05)
    broker = MemoryBroker()
    async with recording(tmp_path, broker) as world:
        world.answer("a")
        broker.is_away = True
    assert len(list(tmp_path.iterdir())) == 1
    broker.is_away = False
    async with recording(tmp_path, broker) as world:
        await world.recorder._recovery.settle()
        assert set(world.rows()) == {"a"}
        assert all(report.is_sound for report in audited(broker, [world.recorder.instance]))


async def test_stopping_before_it_has_started_does_nothing(tmp_path):
    async with recording(tmp_path) as world:
        recorder = Recorder(tmp_path, world.catalog, world.broker, world.metrics, RecorderLimits())
        await recorder.stop()


async def test_requests_that_end_without_a_version_are_logged_under_their_endpoint(tmp_path):
    async with recording(tmp_path) as world:
        world.end(world.accept("a"), Outcome.EXPIRED)
        await world.written()
        (batch,) = world.batches()
        assert (batch.head.endpoint_name, batch.head.deployment_id) == ("e", "")
        assert world.value("millrace_requests_total", model_name="", outcome="expired") == 1


async def test_object_tensors_come_back_as_they_were(tmp_path):
    async with recording(tmp_path) as world:
        members = world.accept("a", "b")
        batch = world.batch(members)
        batch.inputs = {"input": np.array([[b"x"], [None]], object)}
        world.recorder.batch_ended(batch, None)
        world.end(members)
        await world.written()
        assert [inputs for inputs, _ in world.payload().values()] == [[[b"x"]], [[None]]]


async def test_a_request_whose_tensors_have_no_rows_is_kept_whole(tmp_path):
    async with recording(tmp_path) as world:
        members = world.accept("a")
        batch = world.batch(members)
        batch.inputs, batch.outputs = {"input": np.array(3.0)}, {"predict": np.ones((2, 2))}
        world.recorder.batch_ended(batch, None)
        world.end(members)
        await world.written()
        assert world.payload() == {1: (3.0, [[1.0, 1.0], [1.0, 1.0]])}


def test_the_route_of_the_stand_ins_is_that_of_the_data_plane():
    assert route("e", 2).deployment_id == "e.m.2"
