"""Faust as a way to consume: the app factory, and a runner on it with the same rules as ``consumer.ConsumerRunner``.

Faust (0.15) brings group membership, fetching, flow control and, for whoever needs them, tables. What it acknowledges and commits by
itself is not used: it acknowledges a record also when its handler was cancelled, and when a rebalance made it skip the record, so a record
could be lost. Its topics are therefore read with ``acks=False``, and the offsets of handled records are committed by the runner.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, cast

import faust
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from yarl import URL

from libs.errors import TransientError
from libs.messaging.broker import Broker, Offsets
from libs.messaging.consumer import ConsumerRunner
from libs.messaging.errors import BrokenClientError
from libs.messaging.kafka import FETCH_MAX_WAIT_MS, all_partitions, group_member, stop_client
from libs.messaging.loop import GRACE_S
from libs.messaging.processing import Processor
from libs.messaging.records import Record
from libs.settings import KafkaSettings

_AHEAD_RECORDS = 100
"""Records fetched ahead of the handler."""


class FaustRunner(ConsumerRunner):
    """A ConsumerRunner that reads through a faust app."""

    def __init__(
        self,
        settings: KafkaSettings,
        broker: Broker,
        topics: Sequence[str],
        group: str,
        processor: Processor,
        *,
        concurrency: int = 1,
        grace_s: float = GRACE_S,
    ) -> None:
        consumer = FaustConsumer(settings, topics, group)
        super().__init__(broker, topics, group, processor, consumer=consumer, concurrency=concurrency, grace_s=grace_s)


class FaustConsumer:
    """A ``broker.Consumer`` on a faust app: an agent hands over every record, offsets are committed through faust."""

    def __init__(self, settings: KafkaSettings, topics: Sequence[str], group: str) -> None:
        self._timeout_s = settings.request_timeout_ms / 1000
        self._group = group
        self._fetched: asyncio.Queue[Record] = asyncio.Queue(_AHEAD_RECORDS)
        self._assigned = asyncio.Event()
        self.app = faust_app(settings, group)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        channel = self.app.topic(*topics, acks=False, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
        self.app.agent(channel, name=group)(self._fetch)

    async def start(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.app.start()
                await self._assigned.wait()
        except (KafkaError, TimeoutError) as error:
            raise TransientError(f"the group {self._group} got no partitions within {self._timeout_s:g} s: {error!r}") from error

    async def stop(self) -> None:
        await self.app.stop()

    async def get_many(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        self._check()
        try:
            records = [await asyncio.wait_for(self._fetched.get(), timeout_s)]
        except TimeoutError:
            return []
        while len(records) < max_records and not self._fetched.empty():
            records.append(self._fetched.get_nowait())
        return records

    async def commit(self, offsets: Offsets) -> None:
        self._check()
        consumer = cast(driver.Consumer, self.app.consumer)
        await consumer._commit_offsets({TP(place.topic, place.partition): offset for place, offset in offsets.items()})
        self._check()

    def _check(self) -> None:
        if self.app.crashed:
            raise BrokenClientError(f"the consumer of {self._group} cannot go on: {self.app.crash_reason!r}")

    async def _fetch(self, stream: faust.StreamT[Any]) -> None:
        async for event in stream.events():
            await self._fetched.put(_record(event.message))

    async def _on_assigned(self, *_: Any, **__: Any) -> None:
        self._assigned.set()

    async def _on_revoked(self, *_: Any, **__: Any) -> None:
        """What waits here will be fetched again, by this instance or another."""
        while not self._fetched.empty():
            self._fetched.get_nowait()


class _App(faust.App):
    """An app without tables: it has nothing to keep on disk."""

    def _create_directories(self) -> None:
        return


def faust_app(settings: KafkaSettings, group: str) -> faust.App:
    """A faust app that is a member of ``group``, reads committed records only and declares no topics; it opens nothing by itself."""
    servers = ";".join(f"kafka://{server}" for server in settings.bootstrap_servers.split(","))
    app = _App(
        group,
        broker=servers,
        origin="services",
        autodiscover=False,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=group_member(settings, group),
        broker_request_timeout=max(settings.request_timeout_ms, settings.session_timeout_ms) / 1000,
        broker_session_timeout=settings.session_timeout_ms / 1000,
        broker_heartbeat_interval=settings.session_timeout_ms / 3000,
        # A model environment may take minutes to build; liveness is what heartbeats are for.
        broker_max_poll_interval=3600.0,
        broker_max_poll_records=_AHEAD_RECORDS,
        broker_check_crcs=not settings.embedded,
        stream_wait_empty=False,
        store="memory://",
        processing_guarantee="at_least_once",
    )
    transport = _EmbeddedTransport if settings.embedded else _Transport
    app.transport = transport([URL(server) for server in servers.split(";")], app)
    return app


class _Thread(driver.AIOKafkaConsumerThread):
    """Changes three things that faust has no setting for.

    It reads uncommitted records unless it is itself transactional, but the registry's aborted transactions must not be seen. It lets the
    broker hold a fetch for 1.5 s, in which a record of a topic that is not part of the fetch has to wait. It does not end when its
    consumer fails to stop (see ``kafka.stop_client``).
    """

    def _create_worker_consumer(self, transport: driver.Transport) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"
        consumer._fetch_max_wait_ms = FETCH_MAX_WAIT_MS
        return consumer

    async def on_thread_stop(self) -> None:
        consumer, self._consumer = self._consumer, None
        await super().on_thread_stop()
        if consumer is not None:
            await stop_client(consumer)


class _EmbeddedThread(_Thread):
    """On the embedded broker takes all partitions without asking, for the reason given at ``kafka.KafkaConsumer``."""

    async def subscribe(self, topics: Iterable[str]) -> None:
        await self.call_thread(self._assign, tuple(topics))

    async def _assign(self, topics: Iterable[str]) -> None:
        consumer = self._ensure_consumer()
        places = await all_partitions(consumer, topics)
        consumer.assign(places)
        # As a task: faust announces an assignment only after `subscribe` has returned.
        self._announcing = asyncio.create_task(self._announce(places))

    async def _announce(self, places: Iterable[TopicPartition]) -> None:
        self.app.on_rebalance_start()
        await self._rebalance_listener.on_partitions_assigned(places)


class _Consumer(driver.Consumer):
    def _new_consumer_thread(self) -> driver.AIOKafkaConsumerThread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)


class _EmbeddedConsumer(driver.Consumer):
    def _new_consumer_thread(self) -> driver.AIOKafkaConsumerThread:
        return _EmbeddedThread(self, loop=self.loop, beacon=self.beacon)


class _Transport(driver.Transport):
    Consumer = _Consumer


class _EmbeddedTransport(driver.Transport):
    Consumer = _EmbeddedConsumer


def _record(message: Any) -> Record:
    headers = message.headers.items() if isinstance(message.headers, dict) else message.headers or ()
    timestamp_ms = -1 if message.timestamp is None else int(message.timestamp * 1000)
    return Record(message.topic, message.key, message.value, tuple(headers), message.partition, message.offset, timestamp_ms)
