"""The official ``cloudevents`` package reads what we write, and we read what it writes, in version 2 and in its version 1 API."""

from datetime import UTC, datetime

import pytest
from cloudevents.core.bindings import kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from cloudevents.v1 import http
from cloudevents.v1 import kafka as kafka_v1

from libs.messaging import cloudevents
from libs.messaging.dead_letter import dead_letter
from libs.messaging.records import Record
from schemas.registry import CreateEndpoint

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

RECORDED_V1_STRUCTURED = Record(
    "millrace.commands",
    b"churn",
    b'{"type": "millrace.registry.endpoint.create.v1", "source": "/laptop", "subject": "churn", "datacontenttype": "application/json", '
    b'"partitionkey": "churn", "specversion": "1.0", "id": "53b02411-eb43-45b4-9db9-01d1c3618368", '
    b'"time": "2026-11-21T01:17:49.490903+00:00", "data": {"endpoint_name": "churn", "labels": {"team": "risk"}}}',
    (("content-type", b"application/json"),),
)
"""What ``kafka.to_structured`` of cloudevents 1.13.0 gave."""


def ours() -> cloudevents.Event:
    return cloudevents.Event(
        "e1", CreateEndpoint.event_type, "/millrace/gateway", NOW, CreateEndpoint(endpoint_name="churn"), "story", "before", TRACEPARENT
    )


def message(record: Record, message_type=kafka.KafkaMessage):
    return message_type(headers=dict(record.headers), key=record.key, value=record.value)


def record(sent) -> Record:
    key = sent.key.encode() if isinstance(sent.key, str) else sent.key
    value = sent.value.encode() if isinstance(sent.value, str) else sent.value
    return Record("millrace.commands", key, value, tuple(sent.headers.items()))


def theirs(**attributes) -> CloudEvent:
    return CloudEvent(
        {
            "id": "t1", "type": CreateEndpoint.event_type, "source": "/theirs", "specversion": "1.0", "time": NOW,
            "datacontenttype": "application/json", "partitionkey": "churn", **attributes,
        },
        {"endpoint_name": "churn"},
    )  # fmt: skip


def test_version_2_reads_what_we_write():
    event = kafka.from_kafka(message(cloudevents.write(ours())), JSONFormat())
    assert (event.get_id(), event.get_type(), event.get_source(), event.get_time()) == (
        "e1",
        CreateEndpoint.event_type,
        "/millrace/gateway",
        NOW,
    )
    assert (event.get_subject(), event.get_datacontenttype()) == ("churn", "application/json")
    assert (event.get_extension("correlationid"), event.get_extension("causationid")) == ("story", "before")
    assert event.get_extension("partitionkey") == "churn"
    assert event.get_data()["endpoint_name"] == "churn"


@pytest.mark.parametrize("convert", [kafka.to_binary, kafka.to_structured])
def test_we_read_what_version_2_writes(convert):
    event = cloudevents.read(record(convert(theirs(correlationid="story", traceparent=TRACEPARENT), JSONFormat())))
    assert (event.id, event.source, event.time, event.data) == ("t1", "/theirs", NOW, CreateEndpoint(endpoint_name="churn"))
    assert (event.correlation_id, event.traceparent) == ("story", TRACEPARENT)


def test_version_2_reads_a_dead_letter():
    written = dead_letter(Record("millrace.commands", b"churn", b"\x80", offset=3), ValueError("bad"), "registry", NOW)
    assert kafka.from_kafka(message(written), JSONFormat()).get_data()["cause"] == "bad"


def test_version_1_reads_what_we_write():
    event = kafka_v1.from_binary(message(cloudevents.write(ours()), kafka_v1.KafkaMessage))
    assert (event["id"], event["type"], event["correlationid"], event["partitionkey"]) == (
        "e1",
        CreateEndpoint.event_type,
        "story",
        b"churn",
    )
    assert event.data["endpoint_name"] == "churn"


@pytest.mark.parametrize("convert", [kafka_v1.to_binary, kafka_v1.to_structured])
def test_we_read_what_version_1_writes(convert):
    attributes = {"type": CreateEndpoint.event_type, "source": "/theirs", "datacontenttype": "application/json", "partitionkey": "churn"}
    sent = http.CloudEvent(attributes, {"endpoint_name": "churn"})
    event = cloudevents.read(record(convert(sent)))
    assert (event.id, event.source, event.data) == (sent["id"], "/theirs", CreateEndpoint(endpoint_name="churn"))


def test_we_read_the_structured_record_that_version_1_labels_as_plain_json():
    event = cloudevents.read(RECORDED_V1_STRUCTURED)
    assert (event.id, event.source) == ("53b02411-eb43-45b4-9db9-01d1c3618368", "/laptop")
    assert event.data == CreateEndpoint(endpoint_name="churn", labels={"team": "risk"})
