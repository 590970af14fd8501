"""What any Kafka client can do here: publish a CloudEvent, and read what comes back.

Nothing of Millrace's own messaging is used, on purpose: these few lines are all that another program needs.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import Message as KafkaRecord

from libs.cli.errors import CommandError

METADATA_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 30.0
POLL_S = 0.2

_QUIET: dict[str, str | int | float | bool] = {"log_level": 0}
"""librdkafka writes to stderr by itself when the broker stops before the client does."""


@dataclass(frozen=True)
class Message:
    """A record as a client reads it; ``headers`` are text, ``value`` is parsed JSON."""

    key: str
    headers: Mapping[str, str]
    value: Any


def cloudevent_headers(event_id: str, event_type: str, traceparent: str | None = None) -> dict[str, str]:
    """The headers that make a record a CloudEvent in Kafka binary mode."""
    headers = {
        "content-type": "application/json",
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_type": event_type,
        "ce_source": "/millrace/demo",
        "ce_time": datetime.now(UTC).isoformat(),
    }
    return {**headers, "traceparent": traceparent} if traceparent else headers


class PlainKafka:
    """A producer and the means to listen, for the brokers at ``bootstrap_servers``."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._servers = bootstrap_servers
        self._producer = Producer({"bootstrap.servers": bootstrap_servers, "enable.idempotence": True, "linger.ms": 5, **_QUIET})

    def publish(self, topic: str, key: str, value: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """Hand one record to the producer; ``flush`` sees it delivered."""
        body = json.dumps(value).encode()
        self._producer.produce(topic, key=key.encode(), value=body, headers=[(name, text.encode()) for name, text in headers.items()])
        self._producer.poll(0)

    def flush(self) -> None:
        """Wait until everything published is on the log."""
        left = self._producer.flush(FLUSH_TIMEOUT_S)
        if left:
            raise CommandError(f"{left} records could not be delivered to {self._servers} within {FLUSH_TIMEOUT_S:.0f} s")

    def listen(self, topic: str) -> "Listener":
        """Begin to read a topic: what is published from now on."""
        return Listener(self._servers, topic)


class Listener:
    """Reads every partition of a topic from the place that was its end when the listener was made."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._topic = topic
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": f"millrace-demo-{uuid.uuid4()}",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "allow.auto.create.topics": True,  # the embedded broker makes a topic when it is first asked for
                **_QUIET,
            }
        )
        try:
            self._consumer.assign([self._end_of(partition) for partition in self._partitions()])
        except KafkaException as error:
            raise CommandError(f"topic {topic} cannot be read from {bootstrap_servers}: {error.args[0].str()}") from error

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def read(self, timeout_s: float) -> Iterator[Message]:
        """Records as they come, until ``timeout_s`` seconds have passed since the call."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            record = self._consumer.poll(min(POLL_S, left_s))
            if record is None:
                continue
            error = record.error()
            if error is None:
                yield _message(record)
            elif not error.retriable() and error.code() != KafkaError._PARTITION_EOF:
                raise CommandError(f"topic {self._topic} cannot be read: {error.str()}")

    def _partitions(self) -> list[int]:
        deadline = time.monotonic() + METADATA_TIMEOUT_S
        while True:
            topic = self._consumer.list_topics(self._topic, timeout=METADATA_TIMEOUT_S).topics[self._topic]
            if topic.partitions:
                return list(topic.partitions)
            if time.monotonic() > deadline:
                raise CommandError(f"there is no topic {self._topic}")
            time.sleep(POLL_S)

    def _end_of(self, partition: int) -> TopicPartition:
        place = TopicPartition(self._topic, partition, OFFSET_BEGINNING)
        _, end = self._consumer.get_watermark_offsets(place, timeout=METADATA_TIMEOUT_S)
        return TopicPartition(self._topic, partition, end)


def _message(record: KafkaRecord) -> Message:
    headers = record.headers() or []
    pairs = headers.items() if isinstance(headers, dict) else headers
    return Message(_text(record.key()), {name: _text(value) for name, value in pairs}, json.loads(record.value() or b"null"))


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""
