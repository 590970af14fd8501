"""The faust app factory: a Processor behind a faust agent, with the same rules as ``consumer.ConsumerRunner``."""

import asyncio
import logging
from typing import Any

import faust
from faust.types import EventT

from libs.messaging.broker import Broker
from libs.messaging.processing import Processor
from libs.messaging.records import Record
from libs.settings import KafkaSettings

log = logging.getLogger(__name__)


class FaustRunner:
    """Consumes topics with faust as group ``group``: record → processor → published and acknowledged → faust commits the offset.

    Faust's web server, tables and topic declarations are off: the platform creates the topics, and state lives in the log.
    """

    def __init__(self, settings: KafkaSettings, broker: Broker, topics: list[str], group: str, processor: Processor) -> None:
        self._producer = broker.producer()
        self._processor = processor
        self._failed: asyncio.Future[None] | None = None
        self._assigned = asyncio.Event()
        self.app = _app(settings, group)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        self.app.agent(self.app.topic(*topics, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw"))(
            self._consume
        )

    async def start(self) -> None:
        self._failed = asyncio.get_running_loop().create_future()
        await self._producer.start()
        self.app.finalize()
        await self.app.start()
        await self._assigned.wait()

    async def run(self) -> None:
        assert self._failed is not None
        await self._failed

    async def stop(self) -> None:
        await self.app.stop()
        await self._producer.stop()

    async def _consume(self, stream: Any) -> None:
        async for event in stream.events():
            try:
                follow = await self._processor.process(_record(event))
                if follow:
                    await self._producer.send(follow)
            except Exception as error:  # noqa: BLE001 - handed to `run`, which ends the process; the offset stays uncommitted
                if self._failed is not None and not self._failed.done():
                    self._failed.set_exception(error)
                await asyncio.Event().wait()

    async def _on_assigned(self, _app: Any, **_: Any) -> None:
        self._assigned.set()


def _app(settings: KafkaSettings, group: str) -> faust.App:
    servers = ";".join(f"kafka://{server}" for server in settings.bootstrap_servers.split(","))
    return faust.App(
        group,
        broker=servers,
        origin="services",
        autodiscover=False,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=None if settings.embedded else f"{group}-{settings.group_instance}",
        broker_session_timeout=settings.session_timeout_ms / 1000,
        broker_heartbeat_interval=settings.session_timeout_ms / 3000,
        broker_max_poll_interval=3600.0,
        broker_max_poll_records=100,
        broker_commit_interval=0.5,
        stream_wait_empty=False,
        store="memory://",
        processing_guarantee="at_least_once",
    )


def _record(event: EventT) -> Record:
    message = event.message
    headers = message.headers.items() if isinstance(message.headers, dict) else message.headers or ()
    return Record(
        message.topic,
        message.key,
        message.value,
        tuple((name, value) for name, value in headers),
        message.partition,
        message.offset,
        int(message.timestamp * 1000) if message.timestamp else -1,
    )
