"""The demo's Kafka client against librdkafka's own in-memory broker, which lives in this process."""

import socket
from collections.abc import Iterator

import pytest
from confluent_kafka import Producer

from libs.cli.plain_kafka import PlainKafka, cloudevent_headers
from libs.local.embedded import MockCluster
from libs.messaging import cloudevents
from libs.messaging.records import Record
from schemas.registry import CreateEndpoint

TOPIC = "results"


@pytest.fixture
def servers() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = MockCluster(port, {TOPIC: 3})
    yield f"127.0.0.1:{port}"
    cluster.close()


def test_a_listener_reads_what_is_published_after_it_was_made_from_every_partition(servers: str) -> None:
    kafka = PlainKafka(servers)
    kafka.publish(TOPIC, "early", {"n": 0}, {})
    kafka.flush()
    with kafka.listen(TOPIC) as listener:
        for number in range(20):
            kafka.publish(TOPIC, f"key-{number}", {"n": number}, {"ce_id": str(number)})
        kafka.flush()
        seen = {}
        for message in listener.read(10):
            seen[message.key] = (message.value["n"], message.headers["ce_id"])
            if len(seen) == 20:
                break
    assert seen == {f"key-{number}": (number, str(number)) for number in range(20)}


def test_a_topic_that_the_embedded_broker_has_not_seen_yet_can_be_listened_to(servers: str) -> None:
    kafka = PlainKafka(servers)
    with kafka.listen("never-seen") as listener:
        kafka.publish("never-seen", "k", {"n": 1}, {})
        kafka.flush()
        assert next(listener.read(5)).value == {"n": 1}


def test_reading_ends_when_its_time_is_over(servers: str) -> None:
    with PlainKafka(servers).listen(TOPIC) as listener:
        assert list(listener.read(0.05)) == []


def test_a_value_that_is_not_json_stops_nobody_from_reading_headers(servers: str) -> None:
    kafka = PlainKafka(servers)
    with kafka.listen(TOPIC) as listener:
        producer = Producer({"bootstrap.servers": servers})
        producer.produce(TOPIC, key=b"k", value=None)
        producer.flush(5)
        assert next(listener.read(5)).value is None


def test_the_headers_make_a_command_that_the_platform_reads() -> None:
    command = CreateEndpoint(endpoint_name="cancer")
    headers = cloudevent_headers("id-1", command.event_type)
    pairs = tuple((name, value.encode()) for name, value in headers.items())
    event = cloudevents.read(Record(command.topic, b"cancer", command.model_dump_json().encode(), pairs))
    assert (event.id, event.data) == ("id-1", command)
