import base64

import pytest

from libs.errors import InvalidMessage
from libs.messaging import cloudevents
from libs.messaging.dead_letter import MAX_ORIGINAL_BYTES, dead_letter, original
from libs.messaging.records import MAX_RECORD_BYTES, Record
from schemas.topics import DLQ
from tests.unit.messaging.events import NOW, TRACEPARENT, binary

BAD = Record("millrace.commands", b"\xff\x00", b"\x80garbage", (("a", b"\xff"), ("a", b"2"), ("b", b"")), partition=0, offset=7)


def letter_of(record: Record, error: Exception | None = None):
    return cloudevents.read(dead_letter(record, error or InvalidMessage("bad"), "registry", NOW))


def test_a_dead_letter_restores_the_record_byte_for_byte():
    restored = original(letter_of(BAD).data)
    assert (restored.topic, restored.key, restored.value, restored.headers) == (BAD.topic, BAD.key, BAD.value, BAD.headers)


def test_a_dead_letter_keeps_the_key_and_tells_cause_and_origin():
    record = dead_letter(BAD, InvalidMessage("the reason"), "registry", NOW)
    event = cloudevents.read(record)
    assert (record.topic, record.key, event.source) == (DLQ.name, BAD.key, "/millrace/registry")
    assert (event.data.cause, event.data.error, event.data.consumer) == ("the reason", "InvalidMessage", "registry")
    assert (event.data.origin_topic, event.data.origin_partition, event.data.origin_offset) == ("millrace.commands", 0, 7)


def test_a_dead_letter_of_an_event_continues_its_story_and_trace():
    event = letter_of(binary(ce_id="e1", ce_correlationid="story", traceparent=TRACEPARENT))
    assert (event.data.event_id, event.causation_id, event.correlation_id, event.traceparent) == ("e1", "e1", "story", TRACEPARENT)


def test_the_same_record_gives_the_same_dead_letter_and_another_consumer_its_own():
    first, again = letter_of(BAD), letter_of(BAD)
    other = cloudevents.read(dead_letter(BAD, InvalidMessage("bad"), "validator", NOW))
    assert first.id == again.id
    assert first.id != other.id


@pytest.mark.parametrize(
    "record",
    [
        Record("t", b"k", b"x" * MAX_RECORD_BYTES),
        Record("t", b"k" * MAX_RECORD_BYTES, b"x"),
        Record("t", b"k", b"x", (("big", b"x" * MAX_RECORD_BYTES),)),
        Record("t", b"k", b"x" * MAX_ORIGINAL_BYTES),
        Record("t", b"k", b"x", (("\x01" * 200_000, b"in JSON its name is six times as long"),)),
    ],
)
def test_an_original_that_is_too_large_is_left_where_it_is_and_replaying_it_says_so(record):
    written = dead_letter(record, InvalidMessage("bad"), "registry", NOW)
    assert written.size_bytes <= MAX_RECORD_BYTES
    with pytest.raises(InvalidMessage, match=r"still stands at t-0 offset -1"):
        original(cloudevents.read(written).data)


def test_the_largest_original_that_is_carried_fits_a_record():
    overhead = Record("t", b"k", b"").size_bytes
    record = Record("t", b"k", b"x" * (MAX_ORIGINAL_BYTES - overhead))
    written = dead_letter(record, InvalidMessage("y" * 1_000_000), "registry", NOW)
    assert written.size_bytes <= MAX_RECORD_BYTES
    letter = cloudevents.read(written).data
    assert not letter.value_truncated
    assert len(base64.b64decode(letter.value_base64)) == len(record.value)


def test_a_broker_that_takes_less_gets_less():
    record = Record("t", b"k", b"x" * 100_000)
    assert cloudevents.read(dead_letter(record, InvalidMessage("bad"), "registry", NOW, max_bytes=100_000)).data.value_truncated
    assert dead_letter(record, InvalidMessage("\x01" * 10_000), "registry", NOW, max_bytes=65_536).size_bytes <= 65_536
    assert not letter_of(record).data.value_truncated


def test_envelope_attributes_of_any_length_cannot_break_a_dead_letter():
    huge = "x" * 200_000
    event = letter_of(binary(ce_id=huge, ce_correlationid=huge, traceparent=huge))
    assert (event.data.event_id, event.traceparent) == (None, None)


def test_the_trace_of_a_cloudevent_goes_on_in_its_dead_letter():
    assert letter_of(binary(ce_id="e1", ce_traceparent=TRACEPARENT)).traceparent == TRACEPARENT
