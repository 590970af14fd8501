"""An audit of an honest log finds nothing; of a tampered one it says what is wrong."""

from dataclasses import replace

import orjson
import pytest

from libs.predictions import records
from libs.predictions.audit import Audit, Sequences
from schemas.predictions import OutcomeCounts
from schemas.topics import PREDICTIONS
from services.gateway.predictions import Outcome
from tests.unit.gateway.recording import recording

np = pytest.importorskip("numpy")


@pytest.fixture
async def log(tmp_path):
    """Records of a gateway that has stopped: three of rows, the first and the last say what was counted."""
    async with recording(tmp_path) as world:
        for number in range(3):
            world.answer(f"a{number}", f"b{number}")
            world.end(world.accept(f"c{number}"), Outcome.EXPIRED)
            await world.written()
        written = list(world.broker.records(PREDICTIONS.name))
    return [*written, *world.broker.records(PREDICTIONS.name)[len(written) :]]


def report(log, live=()):
    audit = Audit()
    for record in log:
        audit.add(record)
    (found,) = audit.reports(live)
    return found


def batches(log):
    return [place for place, record in enumerate(log) if isinstance(records.read(record), records.PredictionBatch)]


def test_an_honest_log_adds_up(log):
    found = report(log)
    assert found.findings == ()
    assert found.is_whole
    assert found.rows == found.counters.ended == OutcomeCounts(completed=6, expired=3)


def test_the_order_of_reading_does_not_matter(log):
    assert report(log[::-1]).findings == ()


def test_a_record_that_comes_twice_counts_once(log):
    assert report([*log, log[2]]).findings == ()


def test_a_part_of_the_log_adds_up(log):
    found = report(log[3:])
    assert (found.findings, found.is_whole) == ((), False)


def test_a_missing_record_is_found(log):
    del log[batches(log)[1]]
    assert "records are missing" in " ".join(report(log).findings)


def test_missing_records_at_the_end_are_found(log):
    for place in reversed(batches(log)[-2:]):
        del log[place]
    assert "records are missing" in " ".join(report(log).findings)


def changed(record, change, columns=None):
    """A record with another head, its tensors as they were, or some of them changed in place."""
    length = int(record.header(records.HEAD_LENGTH))
    head, tail = orjson.loads(record.value[:length]), bytearray(record.value[length:])
    change(head)
    position = 0
    for column in head["columns"]:
        size = column["parameters"]["binary_data_size"]
        if columns and column["name"] in columns:
            tail[position : position + size] = columns[column["name"]](bytes(tail[position : position + size]))
        position += size
    front = orjson.dumps(head)
    headers = tuple((name, b"%d" % len(front) if name == records.HEAD_LENGTH else value) for name, value in record.headers)
    return replace(record, value=front + bytes(tail), headers=headers)


def tampered(log, which, change=lambda _: None, **columns):
    place = batches(log)[which]
    return [changed(record, change, columns) if number == place else record for number, record in enumerate(log)]


def test_another_outcome_is_found(log):
    turned = tampered(log, 1, outcome=lambda data: bytes([1]) + data[1:])
    assert "was counted as" in " ".join(report(turned).findings)


def test_a_request_that_ends_twice_is_found(log):
    first = np.array([1], "<i8").tobytes()
    twice = tampered(log, 1, sequence=lambda data: first + data[8:])
    assert "have ended before" in " ".join(report(twice).findings)


def test_a_number_that_was_never_given_is_found(log):
    high = np.array([4711], "<i8").tobytes()
    assert "with the number 4711" in " ".join(report(tampered(log, -1, sequence=lambda data: high + data[8:])).findings)


def test_counters_that_were_lowered_are_found(log):
    def lower(head):
        head["counters"]["logged"]["completed"] -= 1

    assert "was counted as" in " ".join(report(tampered(log, 2, lower)).findings)


def test_a_final_count_that_hides_a_request_is_found(log):
    body = orjson.loads(log[-1].value)
    body["counters"]["accepted"] += 1
    assert "1 accepted requests have no end" in report([*log[:-1], replace(log[-1], value=orjson.dumps(body))]).findings
    body["counters"]["ended"]["failed"] += 1
    found = report([*log[:-1], replace(log[-1], value=orjson.dumps(body))]).findings
    assert "1 requests that ended are neither in the log nor counted as lost" in found


def test_an_instance_that_nobody_settled_is_found_unless_it_runs(log):
    unsettled = log[:-1]
    assert "nobody has settled" in report(unsettled).findings[0]
    instance = records.read(log[0]).instance
    assert report(unsettled, [instance]).findings == ()


def test_what_cannot_be_read_is_told(log):
    audit = Audit()
    audit.add(replace(log[1], value=log[1].value[:-1]))
    assert len(audit.unreadable) == 1


def test_sequences_are_counted_once_each():
    held = Sequences()
    assert held.add(np.array([1, 2, 70_000]), np.array([0, 1, 2], np.uint8)) == (0, 0)
    assert held.add(np.array([2, 3, 3, 1]), np.array([1, 0, 0, 2], np.uint8)) == (2, 1)
    assert held.counts() == OutcomeCounts(completed=2, failed=1, expired=1)
