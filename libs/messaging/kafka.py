"""The log on Kafka, by aiokafka."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.errors import (
    InvalidProducerEpoch,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
    RecordTooLargeError,
)

from libs.errors import PayloadTooLargeError, TransientError
from libs.messaging.broker import Offsets
from libs.messaging.errors import FencedError
from libs.messaging.records import Record, TopicPartition
from libs.settings import KafkaSettings

MAX_RECORD_BYTES = 1_048_576
"""What a Kafka broker accepts by default (``message.max.bytes`` is a little more)."""

_TOO_LARGE = (MessageSizeTooLargeError, RecordTooLargeError)


class KafkaProducer:
    """An idempotent producer: acknowledged by all replicas, in order, without duplicates from its own retries."""

    def __init__(self, settings: KafkaSettings, transactional_id: str | None = None) -> None:
        self._settings = settings
        self._transactional_id = transactional_id
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._settings.bootstrap_servers,
            enable_idempotence=True,
            acks="all",
            max_request_size=MAX_RECORD_BYTES,
            request_timeout_ms=self._settings.request_timeout_ms,
            transactional_id=self._transactional_id,
        )
        try:
            await producer.start()
        except KafkaError as error:
            await producer.stop()
            raise TransientError(f"the broker at {self._settings.bootstrap_servers} cannot be used: {error!r}") from error
        self._producer = producer

    async def stop(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            await producer.stop()

    async def send(self, records: Sequence[Record]) -> None:
        producer = self._client
        try:
            pending = [
                await producer.send(
                    record.topic,
                    record.value,
                    record.key,
                    headers=list(record.headers),
                    timestamp_ms=record.timestamp_ms if record.timestamp_ms >= 0 else None,
                )
                for record in records
            ]
            await asyncio.gather(*pending)
        except _TOO_LARGE as error:
            raise PayloadTooLargeError(f"a record of more than {MAX_RECORD_BYTES} bytes cannot be sent") from error
        except KafkaError as error:
            raise _translated(error) from error

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        try:
            async with self._client.transaction():
                yield
        except KafkaError as error:
            raise _translated(error) from error

    async def send_offsets(self, offsets: Offsets, group: str) -> None:
        try:
            await self._client.send_offsets_to_transaction({KafkaPartition(*place): offset for place, offset in offsets.items()}, group)
        except KafkaError as error:
            raise _translated(error) from error

    @property
    def _client(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise TransientError("the producer is not started")
        return self._producer


class _KafkaSource:
    """What a group's consumer and a reader have in common."""

    def __init__(self, settings: KafkaSettings, topics: Sequence[str], group: str | None, name: str | None = None) -> None:
        self._settings = settings
        self._topics = tuple(topics)
        self._group = group
        self._name = name
        self._consumer: AIOKafkaConsumer | None = None

    async def start(self) -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._settings.bootstrap_servers,
            group_id=self._group,
            group_instance_id=self._name,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
            request_timeout_ms=self._settings.request_timeout_ms,
            session_timeout_ms=self._settings.session_timeout_ms,
            heartbeat_interval_ms=self._settings.session_timeout_ms // 3,
            # A model environment may take minutes to build; liveness is what heartbeats are for.
            max_poll_interval_ms=3_600_000,
            max_partition_fetch_bytes=4 * MAX_RECORD_BYTES,
        )
        if self._group is not None:
            consumer.subscribe(self._topics)
        try:
            await consumer.start()
            if self._group is None:
                await self._assign(consumer)
        except KafkaError as error:
            await consumer.stop()
            raise TransientError(f"the broker at {self._settings.bootstrap_servers} cannot be used: {error!r}") from error
        self._consumer = consumer

    async def stop(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await consumer.stop()

    async def get_many(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        try:
            batches = await self._client.getmany(timeout_ms=int(timeout_s * 1000), max_records=max_records)
        except KafkaError as error:
            raise _translated(error) from error
        return [
            Record(message.topic, message.key, message.value, tuple(message.headers), message.partition, message.offset, message.timestamp)
            for messages in batches.values()
            for message in messages
        ]

    async def _assign(self, consumer: AIOKafkaConsumer) -> None:
        raise NotImplementedError

    @property
    def _client(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise TransientError("the consumer is not started")
        return self._consumer


class KafkaConsumer(_KafkaSource):
    """A static member of a consumer group (KIP-345), so that a restart does not wait for a session to time out."""

    def __init__(self, settings: KafkaSettings, topics: Sequence[str], group: str) -> None:
        name = None if settings.embedded else f"{group}-{settings.group_instance}"
        super().__init__(settings, topics, group, name)

    async def commit(self, offsets: Offsets) -> None:
        try:
            await self._client.commit({KafkaPartition(*place): offset for place, offset in offsets.items()})
        except KafkaError as error:
            raise _translated(error) from error


class KafkaReader(_KafkaSource):
    """Reads whole topics by itself."""

    def __init__(self, settings: KafkaSettings, topics: Sequence[str], last_records: int | None) -> None:
        super().__init__(settings, topics, group=None)
        self._last_records = last_records

    async def _assign(self, consumer: AIOKafkaConsumer) -> None:
        places: list[KafkaPartition] = []
        for topic in self._topics:
            consumer.assign([KafkaPartition(topic, 0)])  # makes the client learn of the topic
            partitions = await self._partitions(consumer, topic)
            places += [KafkaPartition(topic, partition) for partition in sorted(partitions)]
        consumer.assign(places)
        beginnings = await consumer.beginning_offsets(places)
        ends = await consumer.end_offsets(places) if self._last_records is not None else {}
        for place, beginning in beginnings.items():
            start = beginning if self._last_records is None else max(beginning, ends[place] - self._last_records)
            consumer.seek(place, start)

    @staticmethod
    async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> set[int]:
        for _ in range(50):
            partitions = consumer.partitions_for_topic(topic)
            if partitions:
                return set(partitions)
            await consumer._client.force_metadata_update()
            await asyncio.sleep(0.1)
        raise TransientError(f"the topic {topic!r} does not exist")

    async def end_offsets(self) -> Offsets:
        places = list(self._client.assignment())
        try:
            ends = await self._client.end_offsets(places)
        except KafkaError as error:
            raise _translated(error) from error
        return {TopicPartition(place.topic, place.partition): offset for place, offset in ends.items()}

    async def is_at(self, offsets: Offsets) -> bool:
        for place, offset in offsets.items():
            if await self._client.position(KafkaPartition(*place)) < offset:
                return False
        return True


class KafkaBroker:
    """Makes aiokafka clients from one set of settings."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    def producer(self) -> KafkaProducer:
        return KafkaProducer(self._settings)

    def transactional_producer(self, transactional_id: str) -> KafkaProducer:
        return KafkaProducer(self._settings, transactional_id)

    def consumer(self, topics: Sequence[str], group: str) -> KafkaConsumer:
        return KafkaConsumer(self._settings, topics, group)

    def reader(self, topics: Sequence[str], last_records: int | None = None) -> KafkaReader:
        return KafkaReader(self._settings, topics, last_records)


def _translated(error: KafkaError) -> FencedError | TransientError:
    if isinstance(error, ProducerFenced | InvalidProducerEpoch):
        return FencedError("another instance with the same transactional id has taken over")
    return TransientError(f"the broker did not answer as it should: {error!r}")
