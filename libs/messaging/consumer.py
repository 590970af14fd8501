"""The consumer runners: a group's records through a Processor, at least once, in order."""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from libs.errors import TransientError
from libs.messaging.broker import Broker, Consumer, Offsets, TransactionalProducer
from libs.messaging.loop import GRACE_S, Loop
from libs.messaging.processing import Processor
from libs.messaging.records import Record, TopicPartition
from libs.messaging.retry import keep_trying

log = logging.getLogger(__name__)

POLL_S = 0.25
"""Longest wait for records, and so for a stop to be noticed by an idle runner."""

COMMIT_INTERVAL_S = 0.5
"""Offsets are committed at the end of a batch, and within a batch of slow records so often."""

_BATCH_RECORDS = 100


class ConsumerRunner:
    """Consumes topics as ``group``: record → processor → what follows is published and acknowledged → offset committed.

    At least once: a crash between publishing and committing repeats records, and the ids of what follows are the same again.
    While the broker is away it keeps trying.

    Parameters
    ----------
    consumer
        What to read with, if not the broker's own consumer of ``topics`` as ``group``.
    grace_s
        Time the handler gets to finish when the process stops, in seconds.
    """

    def __init__(
        self,
        broker: Broker,
        topics: Sequence[str],
        group: str,
        processor: Processor,
        *,
        consumer: Consumer | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._consumer = consumer or broker.consumer(topics, group)
        self._producer = broker.producer()
        self._processor = processor
        self._loop = Loop(group, self._step, processor.stopping, grace_s)
        self._handled: dict[TopicPartition, int] = {}
        self._committed_at = time.monotonic()

    async def start(self) -> None:
        await self._producer.start()
        await self._consumer.start()

    async def run(self) -> None:
        try:
            await self._loop.run()
        finally:
            await self._commit()

    async def stop(self) -> None:
        await self._loop.stop()
        await self._consumer.stop()
        await self._producer.stop()

    async def _step(self) -> None:
        stopping = self._processor.stopping
        records = await keep_trying(lambda: self._consumer.get_many(_BATCH_RECORDS, POLL_S), self._processor.retry, stopping)
        for record in records:
            if stopping.is_set():
                break
            await self._handle(record)
            if time.monotonic() - self._committed_at > COMMIT_INTERVAL_S:
                await self._commit()
        await self._commit()

    async def _handle(self, record: Record) -> None:
        follow = await self._processor.process(record)
        if follow:
            await keep_trying(lambda: self._producer.send(follow), self._processor.retry, self._processor.stopping)
        self._handled[record.place] = record.offset + 1

    async def _commit(self) -> None:
        """Commit what was handled; what cannot be committed now is part of the next commit, or is handled again by whoever gets it."""
        if not self._handled:
            return
        self._committed_at = time.monotonic()
        try:
            await self._consumer.commit(self._handled)
        except TransientError as error:
            log.warning("offsets %s are not committed yet: %s", {f"{p.topic}-{p.partition}": n for p, n in self._handled.items()}, error)
        else:
            self._handled = {}


class TransactionalRunner:
    """Like ConsumerRunner, but what follows from a batch and its offsets become visible in one Kafka transaction.

    The processor's handlers may keep state: after any failed transaction ``run`` raises, and the process starts again from the log.

    Parameters
    ----------
    restore
        Reads that state from the log. Called once an older instance has been fenced, so nothing is written behind its back, and
        before the first record is read.
    """

    def __init__(
        self,
        broker: Broker,
        topics: Sequence[str],
        group: str,
        processor: Processor,
        restore: Callable[[], Awaitable[None]],
        *,
        grace_s: float = GRACE_S,
    ) -> None:
        self._consumer = broker.consumer(topics, group)
        self._producer: TransactionalProducer = broker.transactional_producer(group)
        self._group = group
        self._processor = processor
        self._restore = restore
        self._loop = Loop(group, self._step, processor.stopping, grace_s)

    async def start(self) -> None:
        await self._producer.start()
        await self._restore()
        await self._consumer.start()

    async def run(self) -> None:
        await self._loop.run()

    async def stop(self) -> None:
        await self._loop.stop()
        await self._consumer.stop()
        await self._producer.stop()

    async def _step(self) -> None:
        stopping = self._processor.stopping
        records = await keep_trying(lambda: self._consumer.get_many(_BATCH_RECORDS, POLL_S), self._processor.retry, stopping)
        if not records:
            return
        offsets: Offsets = {record.place: record.offset + 1 for record in records}
        follow = [result for record in records for result in await self._processor.process(record)]
        try:
            async with self._producer.transaction():
                await self._producer.send(follow)
                await self._producer.send_offsets(offsets, self._group)
        except TransientError as error:
            raise TransientError(f"the transaction of {self._group} failed; starting again from the log: {error}") from error
