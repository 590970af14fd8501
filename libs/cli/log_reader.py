"""Reads the prediction log from Kafka."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as KafkaRecord

from libs.cli.errors import CommandError, UsageError
from libs.cli.settings import CliSettings
from libs.messaging.records import Record
from schemas.topics import PREDICTIONS

T = TypeVar("T")

METADATA_TIMEOUT_S = 10.0
SILENCE_S = 30.0
"""Longest time a broker may say nothing while there is more to read."""

PATIENCE_S = 15.0
"""Longest time that is waited for a broker that is starting or changing leaders."""

_PASSING = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._PARTITION_EOF,
        KafkaError._TIMED_OUT,
        KafkaError._TRANSPORT,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    }
)
"""Errors of a broker that is starting or changing leaders; the client library tries again by itself."""

_BATCH = 500
_POLL_S = 0.2
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def moment(text: str, now: datetime) -> datetime:
    """A time as people write it: ``15m``, ``1h``, ``7d`` before now, or RFC 3339.

    >>> moment("90s", datetime(2026, 1, 1, 12, tzinfo=UTC)).isoformat()
    '2026-01-01T11:58:30+00:00'
    >>> moment("2026-01-01T10:00:00Z", datetime(2026, 1, 1, tzinfo=UTC)).hour
    10
    """
    number, unit = text[:-1], text[-1:]
    if unit in _UNITS and number.isascii() and number.isdigit() and len(number) < 9:
        return now - timedelta(seconds=int(number) * _UNITS[unit])
    try:
        given = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no time: write 15m, 1h, 7d, or 2026-01-31T12:00:00Z") from error
    return given if given.tzinfo else given.replace(tzinfo=UTC)


class LogReader:
    """A consumer of ``millrace.predictions`` that is in no group's way and commits nothing.

    Parameters
    ----------
    is_embedded
        The broker is the embedded one, which cannot look times up: it keeps little, so all of it is read.

    Raises
    ------
    CommandError
        When the broker cannot be reached, or has no such topic.
    """

    def __init__(self, bootstrap_servers: str, *, is_embedded: bool = False) -> None:
        self._servers = bootstrap_servers
        self._is_embedded = is_embedded
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "millrace-cli",
                "enable.auto.commit": False,
                "enable.partition.eof": False,
                "isolation.level": "read_committed",
                "log_level": 0,
            }
        )

    def __enter__(self) -> "LogReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def until_now(self, since: datetime | None) -> Iterator[Record]:
        """Everything written from ``since`` (None: the beginning) to the moment of the call, in order within each partition."""
        ends = {place.partition: self._watermarks(place)[1] for place in self._partitions()}
        since_ms = -1 if since is None else max(0, int(since.timestamp() * 1000))
        begins = self._begins(since_ms, ends)
        left = {number: ends[number] for number, begin in begins.items() if begin < ends[number]}
        self._consumer.assign([TopicPartition(PREDICTIONS.name, number, begins[number]) for number in left])
        deadline = time.monotonic() + SILENCE_S
        while left:
            for record in self._consumed():
                deadline = time.monotonic() + SILENCE_S
                if record.offset < ends[record.partition] and record.timestamp_ms >= since_ms:
                    yield record
            left = {number: end for number, end in left.items() if self._position(number) < end}
            if time.monotonic() > deadline:
                raise CommandError(f"the broker at {self._servers} has not given the rest of {PREDICTIONS.name} for {SILENCE_S:.0f} s")

    def from_now(self) -> Iterator[Record]:
        """What is written from now on, until the caller has enough."""
        self._consumer.assign(
            [TopicPartition(PREDICTIONS.name, place.partition, self._watermarks(place)[1]) for place in self._partitions()]
        )
        while True:
            yield from self._consumed()

    def _consumed(self) -> Iterator[Record]:
        for message in self._consumer.consume(_BATCH, timeout=_POLL_S):
            error = message.error()
            if error is None:
                yield _record(message)
            elif error.code() not in _PASSING:
                raise CommandError(f"{PREDICTIONS.name} cannot be read from {self._servers}: {error.str()}")

    def _partitions(self) -> list[TopicPartition]:
        topics = self._patiently(lambda: self._consumer.list_topics(PREDICTIONS.name, timeout=METADATA_TIMEOUT_S).topics)
        topic = topics[PREDICTIONS.name]
        if not topic.partitions:
            raise CommandError(f"there is no topic {PREDICTIONS.name} at {self._servers}; `millrace up` makes it")
        return [TopicPartition(PREDICTIONS.name, number) for number in topic.partitions]

    def _watermarks(self, place: TopicPartition) -> tuple[int, int]:
        low, high = self._patiently(lambda: self._consumer.get_watermark_offsets(place, timeout=METADATA_TIMEOUT_S))
        return low, high

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask the broker; one that is just starting, or changing leaders, is asked again for a while."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return ask()
            except KafkaException as error:
                if error.args[0].code() not in _PASSING or time.monotonic() > deadline:
                    raise CommandError(f"{PREDICTIONS.name} cannot be read from {self._servers}: {error.args[0].str()}") from error
            time.sleep(_POLL_S)

    def _begins(self, since_ms: int, ends: dict[int, int]) -> dict[int, int]:
        """Where each partition is read from; ``since_ms`` -1: from its beginning."""
        if since_ms < 0 or self._is_embedded:
            return {number: self._watermarks(TopicPartition(PREDICTIONS.name, number))[0] for number in ends}
        wanted = [TopicPartition(PREDICTIONS.name, number, since_ms) for number in ends]
        found = self._patiently(lambda: self._consumer.offsets_for_times(wanted, METADATA_TIMEOUT_S))
        return {place.partition: place.offset if place.offset >= 0 else ends[place.partition] for place in found}

    def _position(self, partition: int) -> int:
        (place,) = self._consumer.position([TopicPartition(PREDICTIONS.name, partition)])
        return int(place.offset)


OpenLog = Callable[[], LogReader]


def log_of(settings: CliSettings, bootstrap_servers: str | None) -> OpenLog:
    """Opens the log of the brokers that were named, or else of the platform."""
    if bootstrap_servers:
        return lambda: LogReader(bootstrap_servers)
    return lambda: LogReader(settings.bootstrap_servers, is_embedded=settings.is_embedded)


def _record(message: KafkaRecord) -> Record:
    headers = message.headers() or []
    pairs = headers.items() if isinstance(headers, dict) else headers
    named = tuple((name, value if isinstance(value, bytes) else str(value).encode()) for name, value in pairs if value is not None)
    key, value = message.key(), message.value()
    return Record(
        PREDICTIONS.name,
        key.encode() if isinstance(key, str) else key,
        value.encode() if isinstance(value, str) else value,
        named,
        message.partition() or 0,
        message.offset() or 0,
        message.timestamp()[1],
    )
