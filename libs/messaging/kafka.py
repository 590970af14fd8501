"""The log on Kafka, by aiokafka."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.errors import InvalidProducerEpoch, KafkaError, ProducerFenced

from libs.errors import TransientError
from libs.messaging.broker import Offsets, TransactionalProducer
from libs.messaging.errors import FencedError
from libs.messaging.records import MAX_RECORD_BYTES, Record, TopicPartition, refuse_oversized
from libs.metrics import PROCESS
from libs.metrics.definitions import BROKER_ERRORS
from libs.settings import KafkaSettings

_STOP_S = 5.0
"""Longest wait for a broker that does not answer any more when a client stops."""

TRANSACTION_S = 10.0
"""Longest wait for a step of a transaction, which takes milliseconds. One in which the broker ends can hang, also when the broker is back,
and whoever waits for it does nothing else."""

_FETCH_BYTES = 4 * MAX_RECORD_BYTES

FETCH_MAX_WAIT_MS = 500
"""Longest time the broker holds a fetch that finds nothing: two requests a second of an idle consumer."""


class _KafkaClient:
    """Settings and the translation of aiokafka's errors."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._timeout_s = settings.request_timeout_ms / 1000

    @contextmanager
    def _translating(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (ProducerFenced, InvalidProducerEpoch) as error:
            raise FencedError(f"{doing} was refused: another instance with the same transactional id has taken over") from error
        except (KafkaError, TimeoutError) as error:
            PROCESS.counter(BROKER_ERRORS, type(error).__name__).value += 1
            raise TransientError(f"{doing} at {self._settings.bootstrap_servers} failed: {error!r}") from error


class KafkaProducer(_KafkaClient):
    """An idempotent producer: acknowledged by all replicas, in order, without duplicates from its own retries."""

    def __init__(self, settings: KafkaSettings, transactional_id: str | None = None) -> None:
        super().__init__(settings)
        self._transactional_id = transactional_id
        if transactional_id is not None:
            self._timeout_s = min(self._timeout_s, TRANSACTION_S)
        self._producer: AIOKafkaProducer | None = None
        self._connecting = asyncio.Lock()
        self._is_started = False

    async def start(self) -> None:
        self._producer = await self._connected()
        self._is_started = True

    async def stop(self) -> None:
        self._is_started = False
        await self._drop(self._producer)

    async def connect(self) -> None:
        await self._usable()

    async def send(self, records: Sequence[Record]) -> None:
        refuse_oversized(records)
        producer = await self._usable()
        try:
            with self._translating("sending"):
                async with asyncio.timeout(self._timeout_s):
                    await asyncio.gather(*[await _sent(producer, record) for record in records])
        except TransientError:
            if self._transactional_id is None:
                await self._drop(producer)
            raise

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        producer = await self._usable()
        with self._translating("the transaction"):
            async with asyncio.timeout(self._timeout_s):
                await producer.begin_transaction()
            try:
                yield
            except TransientError:
                raise  # the broker does not answer; what remains open is aborted when the next instance starts
            except BaseException:
                await self._abort(producer)
                raise
            async with asyncio.timeout(self._timeout_s):
                await producer.commit_transaction()

    async def send_offsets(self, offsets: Offsets, group: str) -> None:
        producer = await self._usable()
        with self._translating("committing offsets in the transaction"):
            async with asyncio.timeout(self._timeout_s):
                await producer.send_offsets_to_transaction({KafkaPartition(*place): offset for place, offset in offsets.items()}, group)

    async def _abort(self, producer: AIOKafkaProducer) -> None:
        """Abort as well as possible; whatever remains open is aborted by the broker when the next instance starts."""
        if producer._txn_manager.is_fatal_error():
            return
        try:
            async with asyncio.timeout(_STOP_S):
                await producer.abort_transaction()
        except (KafkaError, TimeoutError):
            return

    async def _connected(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._settings.bootstrap_servers,
            enable_idempotence=True,
            acks="all",
            max_request_size=2 * MAX_RECORD_BYTES,
            request_timeout_ms=self._settings.request_timeout_ms,
            transactional_id=self._transactional_id,
        )
        with self._translating("connecting a producer"):
            try:
                async with asyncio.timeout(self._timeout_s):
                    await producer.start()
            except BaseException:
                await stop_client(producer)
                raise
        return producer

    async def _usable(self) -> AIOKafkaProducer:
        if not self._is_started:
            raise TransientError("the producer is not started")
        async with self._connecting:
            if self._producer is None:
                self._producer = await self._connected()
            return self._producer

    async def _drop(self, producer: AIOKafkaProducer | None) -> None:
        """Give a client up: after an error its sequence numbers may be refused for ever; without transactions a new one is harmless."""
        if producer is not None:
            if self._producer is producer:
                self._producer = None
            await stop_client(producer)


async def _sent(producer: AIOKafkaProducer, record: Record) -> asyncio.Future[None]:
    timestamp_ms = record.timestamp_ms if record.timestamp_ms >= 0 else None
    sent: asyncio.Future[None] = await producer.send(
        record.topic, record.value, record.key, timestamp_ms=timestamp_ms, headers=list(record.headers)
    )
    return sent


async def stop_client(client: AIOKafkaProducer | AIOKafkaConsumer) -> None:
    """Stop a client, in a bounded time also when the broker is away.

    In a task of its own, because aiokafka's consumer lets the cancellation of its own fetches escape from ``stop`` when a fetch is
    waiting to be repeated, and then leaves its connections open.
    """
    stopping = asyncio.create_task(client.stop())
    await asyncio.wait({stopping}, timeout=_STOP_S)
    stopping.cancel()
    await asyncio.wait({stopping})
    if stopping.cancelled() or stopping.exception() is not None:
        await (client.client if isinstance(client, AIOKafkaProducer) else client._client).close()


class _KafkaSource(_KafkaClient):
    """What a group's consumer and a reader have in common."""

    def __init__(self, settings: KafkaSettings, topics: Sequence[str], group: str | None) -> None:
        super().__init__(settings)
        self._topics = tuple(topics)
        self._group = group
        self._assigns_itself = group is not None and settings.embedded
        self._consumer: AIOKafkaConsumer | None = None

    async def start(self) -> None:
        consumer = AIOKafkaConsumer(
            *(() if self._assigns_itself else self._topics),
            bootstrap_servers=self._settings.bootstrap_servers,
            group_id=self._group,
            group_instance_id=group_member(self._settings, self._group),
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
            request_timeout_ms=self._settings.request_timeout_ms,
            session_timeout_ms=self._settings.session_timeout_ms,
            heartbeat_interval_ms=self._settings.session_timeout_ms // 3,
            # A model environment may take minutes to build; liveness is what heartbeats are for.
            max_poll_interval_ms=3_600_000,
            max_partition_fetch_bytes=_FETCH_BYTES,
            fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
            check_crcs=not self._settings.embedded,
        )
        with self._translating(f"reading {', '.join(self._topics)}"):
            try:
                async with asyncio.timeout(self._timeout_s):
                    await consumer.start()
                    await self._position(consumer)
            except BaseException:
                await stop_client(consumer)
                raise
        self._consumer = consumer

    async def stop(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await stop_client(consumer)

    async def get_many(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        with self._translating("reading"):
            batches = await self._client.getmany(timeout_ms=int(timeout_s * 1000), max_records=max_records)
        return [
            Record(message.topic, message.key, message.value, tuple(message.headers), message.partition, message.offset, message.timestamp)
            for messages in batches.values()
            for message in messages
        ]

    async def _position(self, consumer: AIOKafkaConsumer) -> None:
        """Where to begin, if not where the group is or at the beginning."""

    @property
    def _client(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise TransientError("the consumer is not started")
        return self._consumer


class KafkaConsumer(_KafkaSource):
    """A static member of a consumer group (KIP-345), so that a restart does not wait for a session to time out.

    On the embedded broker, where a group takes almost a session timeout to form again, it takes all partitions without asking and uses the
    group for its offsets only.
    """

    async def _position(self, consumer: AIOKafkaConsumer) -> None:
        if self._assigns_itself:
            consumer.assign(await all_partitions(consumer, self._topics))

    async def commit(self, offsets: Offsets) -> None:
        with self._translating("committing offsets"):
            async with asyncio.timeout(self._timeout_s):
                await self._client.commit({KafkaPartition(*place): offset for place, offset in offsets.items()})


def group_member(settings: KafkaSettings, group: str | None) -> str | None:
    """Name of this instance in a consumer group; None on the embedded broker, which knows no static members."""
    return None if settings.embedded or group is None else f"{group}-{settings.group_instance}"


async def all_partitions(consumer: AIOKafkaConsumer, topics: Iterable[str]) -> list[KafkaPartition]:
    """Every partition of some topics; waits for topics that are just being created."""
    return [KafkaPartition(topic, partition) for topic in topics for partition in sorted(await consumer._client._wait_on_metadata(topic))]


class KafkaReader(_KafkaSource):
    """Reads whole topics by itself, outside of any group."""

    def __init__(self, settings: KafkaSettings, topics: Sequence[str], last_records: int | None, since: datetime | None) -> None:
        super().__init__(settings, topics, group=None)
        self._last_records = last_records
        self._since = None if settings.embedded else since

    async def _position(self, consumer: AIOKafkaConsumer) -> None:
        if self._since is not None:
            await self._seek_time(consumer, int(self._since.timestamp() * 1000))
        if self._last_records is None:
            return
        places = list(consumer.assignment())
        beginnings = await consumer.beginning_offsets(places)
        for place, end in (await consumer.end_offsets(places)).items():
            consumer.seek(place, max(beginnings[place], end - self._last_records))

    async def _seek_time(self, consumer: AIOKafkaConsumer, since_ms: int) -> None:
        places = list(consumer.assignment())
        ends = await consumer.end_offsets(places)
        for place, found in (await consumer.offsets_for_times(dict.fromkeys(places, since_ms))).items():
            consumer.seek(place, ends[place] if found is None else found.offset)

    async def end_offsets(self) -> Offsets:
        consumer = self._client
        with self._translating("looking up where the topics end"):
            ends = await consumer.end_offsets(list(consumer.assignment()))
        return {TopicPartition(place.topic, place.partition): offset for place, offset in ends.items()}

    async def is_at(self, offsets: Offsets) -> bool:
        for place, offset in offsets.items():
            if await self._client.position(KafkaPartition(*place)) < offset:
                return False
        return True


class BufferedProducer(KafkaProducer):
    """Stands in for transactions on the embedded broker, which has them in name only (it hides nothing and forgets their offsets).

    A block's records are sent when it ends, then its offsets are committed: aborted blocks stay invisible, but a crash in between repeats
    the block, and nobody is fenced.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        super().__init__(settings)
        self._buffer: list[Record] | None = None
        self._offsets: list[tuple[str, Offsets]] = []

    async def send(self, records: Sequence[Record]) -> None:
        if self._buffer is None:
            await super().send(records)
        else:
            refuse_oversized(records)
            self._buffer.extend(records)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        self._buffer, self._offsets = [], []
        try:
            yield
            await super().send(self._buffer)
            for group, offsets in self._offsets:
                await self._commit(group, offsets)
        finally:
            self._buffer = None

    async def send_offsets(self, offsets: Offsets, group: str) -> None:
        self._offsets.append((group, offsets))

    async def _commit(self, group: str, offsets: Offsets) -> None:
        consumer = KafkaConsumer(self._settings, sorted({place.topic for place in offsets}), group)
        await consumer.start()
        try:
            await consumer.commit(offsets)
        finally:
            await consumer.stop()


class KafkaBroker:
    """Makes aiokafka clients from one set of settings."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    def producer(self) -> KafkaProducer:
        return KafkaProducer(self._settings)

    def transactional_producer(self, transactional_id: str) -> TransactionalProducer:
        return BufferedProducer(self._settings) if self._settings.embedded else KafkaProducer(self._settings, transactional_id)

    def consumer(self, topics: Sequence[str], group: str) -> KafkaConsumer:
        return KafkaConsumer(self._settings, topics, group)

    def reader(self, topics: Sequence[str], last_records: int | None = None, since: datetime | None = None) -> KafkaReader:
        return KafkaReader(self._settings, topics, last_records, since)
