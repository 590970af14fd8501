"""What a ledger says of a gateway that is gone."""

import os
import signal

import numpy as np
import pytest

from libs.errors import ConfigurationError
from schemas.predictions import OutcomeCounts
from services.gateway import ledger as ledgers
from services.gateway.ledger import COMPLETED, EXPIRED, FAILED, Ledger, orphans

INSTANCE = "ab" * 16


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "gateway", INSTANCE, 1000.0)
    yield made
    made.close(remove=True)


def left(ledger):
    """What the next gateway reads once this one is gone."""
    ledger.close(remove=False)
    (orphan,) = orphans(ledger.path.parent)
    remains = orphan.read()
    orphan.remove()
    return remains


def sequences(*numbers):
    return np.array(numbers, np.int64)


def test_what_was_in_flight_has_failed(ledger):
    door = ledger.door("churn", "v2")
    ledger.begin(1, 1000.5, door, "first")
    ledger.begin(2, 1000.6, door, "second")
    ledger.end(1, COMPLETED)
    remains = left(ledger)
    assert remains.instance == INSTANCE
    assert remains.counters.accepted == 2
    assert remains.counters.ended == OutcomeCounts(completed=1, failed=1)
    assert remains.counters.logged == OutcomeCounts(completed=1, failed=1)
    assert {(each.sequence, each.request_id, each.state, each.was_in_flight) for each in remains.unfinished} == {
        (1, "first", COMPLETED, False),
        (2, "second", FAILED, True),
    }
    assert {(each.endpoint_name, each.protocol) for each in remains.unfinished} == {("churn", "v2")}


def test_what_the_log_has_is_not_said_again(ledger):
    for number in (1, 2, 3):
        ledger.begin(number, 1000.0, 0, f"r{number}")
        ledger.end(number, EXPIRED)
    ledger.logged(sequences(1, 3), OutcomeCounts(expired=2))
    remains = left(ledger)
    assert [each.request_id for each in remains.unfinished] == ["r2"]
    assert remains.counters.logged == OutcomeCounts(expired=3)
    assert remains.in_doubt == 0


def test_lost_and_unlogged_requests_are_accounted_for(ledger):
    for number in (1, 2):
        ledger.begin(number, 1000.0, 0, f"r{number}")
        ledger.end(number, COMPLETED)
    ledger.lost(sequences(1), OutcomeCounts(completed=1))
    ledger.off(sequences(2), OutcomeCounts(completed=1))
    remains = left(ledger)
    assert remains.unfinished == []
    assert (remains.counters.lost.total, remains.counters.off.total, remains.counters.logged.total) == (1, 1, 0)


def test_a_request_that_was_being_ended_is_counted_once(ledger):
    ledger.begin(1, 1000.0, 0, "r1")
    ledger.end(1, COMPLETED)
    ledger._counters[COMPLETED] -= 1  # killed between the slot and the counter
    remains = left(ledger)
    assert remains.counters.ended == OutcomeCounts(completed=1)


def test_a_request_that_was_being_accepted_is_counted(ledger):
    ledger.begin(1, 1000.0, 0, "r1")
    ledger._counters[0] = 0  # killed between the slot and the counter
    remains = left(ledger)
    assert (remains.counters.accepted, remains.counters.ended.failed) == (1, 1)


def test_a_very_long_request_keeps_its_place(ledger):
    ledger.begin(1, 1000.0, 0, "slow")
    around = ledgers._SLOTS + 1
    ledger.begin(around, 1001.0, 0, "quick")
    assert ledger._displaced
    ledger.end(around, COMPLETED)
    ledger.logged(sequences(around), OutcomeCounts(completed=1))
    assert not ledger._displaced
    remains = left(ledger)
    assert [(each.request_id, each.was_in_flight) for each in remains.unfinished] == [("slow", True)]


def test_a_row_whose_place_was_taken_is_in_doubt(ledger):
    ledger.begin(1, 1000.0, 0, "early")
    ledger.end(1, COMPLETED)
    for number in range(2, ledgers._SLOTS + 2):
        ledger._counters[0] = number
        ledger._counters[COMPLETED] += 1
        ledger._counters[5] += 1
    ledger._counters[COMPLETED] -= 1
    ledger._counters[5] -= 1
    ledger.begin(ledgers._SLOTS + 1, 1000.0, 0, "late")
    ledger.end(ledgers._SLOTS + 1, COMPLETED)
    remains = left(ledger)
    assert [each.request_id for each in remains.unfinished] == ["late"]
    assert remains.in_doubt == 1
    assert remains.counters.lost.total == 1


def test_it_survives_a_process_that_is_killed(tmp_path):
    child = os.fork()
    if child == 0:
        doomed = Ledger(tmp_path, INSTANCE, 0.0)
        doomed.begin(1, 0.0, doomed.door("churn", "grpc"), "x" * 200)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (orphan,) = orphans(tmp_path)
    remains = orphan.read()
    orphan.remove()
    assert remains.counters.accepted == 1
    assert remains.unfinished[0].request_id == "x" * 128


def test_a_living_ledger_is_nobody_elses(ledger):
    assert list(orphans(ledger.path.parent)) == []


def test_a_ledger_is_settled_by_one_gateway_only(ledger):
    ledger.close(remove=False)
    (held,) = orphans(ledger.path.parent)
    assert list(orphans(ledger.path.parent)) == []
    held.release()
    (again,) = orphans(ledger.path.parent)
    again.remove()
    assert list(ledger.path.parent.iterdir()) == []


def test_a_foreign_file_is_no_ledger(tmp_path):
    (tmp_path / "ledger-x").write_bytes(b"something else")
    (orphan,) = orphans(tmp_path)
    assert orphan.read() is None
    orphan.release()


def test_a_home_that_cannot_be_written_refuses_to_start(tmp_path):
    (tmp_path / "gateway").write_text("a file")
    with pytest.raises(ConfigurationError, match="the request ledger .* cannot be made"):
        Ledger(tmp_path / "gateway", INSTANCE, 0.0)


def test_ends_of_everything_settle_it(ledger):
    ledger.begin(1, 0.0, 0, "r1")
    assert not ledger.is_settled
    ledger.end(1, FAILED)
    assert not ledger.is_settled
    ledger.logged(sequences(1), OutcomeCounts(failed=1))
    assert ledger.is_settled
