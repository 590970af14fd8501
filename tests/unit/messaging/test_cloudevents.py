import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from libs.errors import InvalidMessage
from libs.messaging import cloudevents
from libs.messaging.cloudevents import MAX_ATTRIBUTE_CHARS, UnknownEventType
from libs.messaging.records import Record
from schemas.registry import CreateEndpoint, EndpointCreated
from tests.unit.messaging.events import NOW, TRACEPARENT, binary, create_endpoint


def structured(**changes) -> Record:
    body = {"specversion": "1.0", "id": "1", "type": CreateEndpoint.event_type, "source": "/test", "data": {"endpoint_name": "churn"}}
    body |= changes
    return Record("millrace.commands", None, json.dumps(body).encode())


def test_what_was_written_reads_as_the_same_event():
    event = create_endpoint(correlation_id="story", causation_id="before", causation_source="/cause", traceparent=TRACEPARENT)
    assert cloudevents.read(cloudevents.write(event)) == event


def test_a_record_is_written_in_binary_mode_with_the_entity_as_key():
    record = cloudevents.write(create_endpoint(traceparent=TRACEPARENT))
    assert (record.topic, record.key) == ("millrace.commands", b"churn")
    assert dict(record.headers) == {
        "content-type": b"application/json",
        "ce_specversion": b"1.0",
        "ce_id": b"cause-1",
        "ce_type": b"millrace.registry.endpoint.create.v1",
        "ce_source": b"/test",
        "ce_time": b"2026-01-01T12:00:00Z",
        "ce_subject": b"churn",
        "ce_correlationid": b"cause-1",
        "traceparent": TRACEPARENT.encode(),
    }
    assert json.loads(record.value)["endpoint_name"] == "churn"


def test_an_event_that_begins_a_story_correlates_with_itself():
    event = cloudevents.new_event(CreateEndpoint(endpoint_name="churn"), "/test", now=NOW)
    assert (event.correlation_id, event.causation_id, event.traceparent) == (event.id, None, None)


def test_what_an_event_leads_to_has_the_same_id_every_time_and_its_own_per_type_entity_and_ordinal():
    cause = create_endpoint()

    def follow(data, **options):
        return cloudevents.caused_event(data, cause, "/millrace/registry", now=NOW, **options).id

    created = EndpointCreated(endpoint_name="churn")
    assert follow(created) == follow(created)
    others = [
        follow(created),
        follow(created, ordinal=1),
        follow(EndpointCreated(endpoint_name="other")),
        follow(CreateEndpoint(endpoint_name="churn")),
    ]
    assert len(set(others)) == len(others)


def test_causes_of_two_sources_with_one_id_lead_to_two_events():
    causes = [replace(create_endpoint(), source=source) for source in ("/one", "/other")]
    one, other = (cloudevents.caused_event(EndpointCreated(endpoint_name="churn"), cause, "/registry", now=NOW) for cause in causes)
    assert one.id != other.id
    assert (one.causation_id, one.causation_source, other.causation_source) == ("cause-1", "/one", "/other")


def test_a_caused_event_continues_the_story_and_the_trace_of_its_cause():
    cause = create_endpoint(correlation_id="story", traceparent=TRACEPARENT)
    event = cloudevents.caused_event(EndpointCreated(endpoint_name="churn"), cause, "/millrace/registry", now=NOW)
    assert (event.correlation_id, event.causation_id, event.traceparent) == ("story", "cause-1", TRACEPARENT)


def test_a_minimal_structured_event_is_read_and_correlates_with_itself():
    event = cloudevents.read(structured())
    assert (event.id, event.data, event.correlation_id) == ("1", CreateEndpoint(endpoint_name="churn"), "1")


def test_structured_extensions_and_base64_data_are_read():
    event = cloudevents.read(
        structured(data=None, data_base64="eyJlbmRwb2ludF9uYW1lIjogIngifQ==", correlationid="c", traceparent=TRACEPARENT)
    )
    assert (event.data, event.correlation_id, event.traceparent) == (CreateEndpoint(endpoint_name="x"), "c", TRACEPARENT)


def test_header_names_are_read_in_any_case():
    record = Record("t", None, b'{"endpoint_name": "churn"}', tuple((name.upper(), value) for name, value in binary().headers))
    assert cloudevents.read(record).id == "1"


def test_times_are_read_with_and_without_zone_and_default_to_that_of_the_record():
    assert cloudevents.read(binary(ce_time="2026-01-01T12:00:00.5")).time == NOW + timedelta(milliseconds=500)
    assert cloudevents.read(binary(ce_time="2026-01-01T14:00:00+02:00")).time == NOW.astimezone(timezone(timedelta(hours=2)))
    without = binary()
    record = Record(without.topic, without.key, without.value, without.headers, timestamp_ms=1_767_268_800_000)
    assert cloudevents.read(record).time == datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("traceparent", ["nonsense", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "x" * 1000])
def test_an_invalid_traceparent_is_not_passed_on(traceparent):
    assert cloudevents.read(binary(traceparent=traceparent)).traceparent is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record("t", b"k", None), "no value"),
        (Record("t", b"k", b""), "not JSON"),
        (Record("t", b"k", b"\x80\x04\x95garbage"), "not JSON"),
        (Record("t", b"k", b"[]"), "not a CloudEvent"),
        (Record("t", b"k", b'{"instances": [[1]]}'), "not a CloudEvent"),
        (binary(ce_id=""), "no id"),
        (binary(ce_type=""), "no type"),
        (binary(ce_source=""), "no source"),
        (binary(ce_specversion=""), "no specversion"),
        (binary(ce_specversion="0.3"), "'0.3' is not supported"),
        (binary(ce_time="yesterday"), "'yesterday' is not RFC 3339"),
        (binary(ce_id="x" * (MAX_ATTRIBUTE_CHARS + 1)), "id has 1025 characters"),
        (structured(id=7), "no id"),
        (structured(data_base64="%"), "not base64"),
        (structured(data_base64=[1]), "not base64"),
        (binary(b"not json"), "does not fit its contract"),
        (binary(b"{}"), "endpoint_name: Field required"),
        (binary(b'{"endpoint_name": "../etc"}'), "endpoint_name: String should match"),
        (binary(b"null"), "does not fit its contract"),
    ],
)
def test_what_is_no_valid_event_is_refused_with_the_reason(record, reason):
    with pytest.raises(InvalidMessage, match=reason):
        cloudevents.read(record)


def test_an_unknown_type_is_named_with_the_versions_there_are():
    with pytest.raises(
        UnknownEventType, match=r"create\.v9 is not a known version of this event; known: millrace\.registry\.endpoint\.create\.v1"
    ):
        cloudevents.read(binary(ce_type="millrace.registry.endpoint.create.v9"))
    with pytest.raises(UnknownEventType, match="no contract has the event type 'other'"):
        cloudevents.read(binary(ce_type="other"))


def test_unknown_fields_are_ignored_so_that_writers_may_add_some():
    assert cloudevents.read(binary(b'{"endpoint_name": "churn", "added_later": 1}')).data == CreateEndpoint(endpoint_name="churn")
