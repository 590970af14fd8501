"""What is remembered of the log, and for how long."""

import pytest

from libs.errors import InvalidMessage, NotFoundError, TransientError
from libs.messaging import cloudevents
from libs.messaging.dead_letter import dead_letter
from libs.messaging.records import Record
from schemas.registry import CreateEndpoint, DeleteEndpoint, DeploymentRemovalRequested, EndpointCreated, EndpointDeleted
from schemas.topics import COMMANDS, EVENTS
from services.gateway import journal as module
from services.gateway.commands import answer
from services.gateway.journal import EventFilter, Journal
from tests.unit.gateway.conftest import NOW


def told(payload, event_id: str, cause: str | None = None) -> Record:
    event = cloudevents.new_event(payload, "/test", now=NOW, event_id=event_id)
    if cause is not None:
        event = cloudevents.Event(event_id, event.type, event.source, NOW, payload, cause, cause)
    return cloudevents.write(event)


def created(name: str, event_id: str, cause: str | None = None) -> Record:
    return told(EndpointCreated(endpoint_name=name), event_id, cause)


def ids(journal: Journal) -> list[str]:
    return [event.envelope.id for event in journal.events(EventFilter())]


def test_the_oldest_events_go_first_by_number_and_by_size(monkeypatch):
    monkeypatch.setattr(module, "MAX_EVENTS", 3)
    journal = Journal()
    for number in range(5):
        journal.apply(created("e", str(number), f"c{number}"))
    assert ids(journal) == ["2", "3", "4"]
    with pytest.raises(NotFoundError):
        journal.operation("c0")
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    journal.apply(created("e", "5"))
    assert ids(journal) == ["5"]


def test_the_answer_of_a_command_is_its_own_fact_and_not_what_else_it_led_to():
    journal = Journal()
    journal.apply(told(DeploymentRemovalRequested(endpoint_name="e", deployment_id="e.m.1"), "f1", "c"))
    journal.apply(told(DeleteEndpoint(endpoint_name="e"), "c"))
    assert not journal.operation("c").is_done
    journal.apply(told(EndpointDeleted(endpoint_name="e"), "f2", "c"))
    assert isinstance(answer(journal.operation("c")), EndpointDeleted)


def test_records_that_cannot_be_read_are_passed_over():
    journal = Journal()
    for value in (None, b"", b"{", b"[]", b"\xff"):
        journal.apply(Record(EVENTS.name, None, value))
        journal.apply(Record(COMMANDS.name, b"\xff", value, (("ce_type", b"x"),)))
        journal.apply_dead_letter(Record("millrace.dlq", None, value))
    journal.apply(Record(EVENTS.name, b"e", b"{", created("e", "1").headers))
    assert ids(journal) == []


def test_a_dead_letter_decides_a_command_until_a_replay_succeeds():
    journal = Journal()
    command = told(CreateEndpoint(endpoint_name="e"), "c")
    journal.apply(command)
    journal.apply_dead_letter(dead_letter(command, InvalidMessage("it is broken"), "registry", NOW))
    with pytest.raises(InvalidMessage, match="it is broken"):
        answer(journal.operation("c"))
    assert journal.dead_letter("c").data.cause == "it is broken"
    journal.apply(created("e", "f", "c"))
    assert isinstance(answer(journal.operation("c")), EndpointCreated)


def test_dead_letters_are_bounded_and_newest_first(monkeypatch):
    monkeypatch.setattr(module, "MAX_DEAD_LETTERS", 2)
    journal = Journal()
    for number in range(3):
        record = Record("t", b"k", b"v", offset=number)
        journal.apply_dead_letter(dead_letter(record, TransientError("x"), "s", NOW))
    assert [event.data.origin_offset for event in journal.dead_letters()] == [2, 1]


def test_a_subscriber_that_is_too_slow_is_cut_off_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr(module, "SUBSCRIBER_QUEUE", 2)
    journal = Journal()
    everything, some = journal.subscribe(EventFilter()), journal.subscribe(EventFilter(entity="rare"))
    for number in range(4):
        journal.apply(created("e", str(number)))
    journal.apply(created("rare", "9"))
    assert (everything.overflowed, everything.queue.qsize()) == (True, 2)
    assert (some.overflowed, some.queue.qsize()) == (False, 1)
    journal.unsubscribe(some)
    journal.apply(created("rare", "10"))
    assert some.queue.qsize() == 1
