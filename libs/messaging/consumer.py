"""The consumer runners: a group's records through a Processor, at least once, in order within a key."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

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
"""Offsets are committed when nothing is left to handle, and until then so often."""

_BATCH_RECORDS = 100

_IN_HAND_RECORDS = 500
"""Most records read and not finished: what may queue up behind a slow one before nothing more is read."""

_LAST_COMMIT_S = 5.0
"""Longest wait for a broker that does not answer any more when the runner ends."""


class ConsumerRunner:
    """Consumes topics as ``group``: record → processor → what follows is published and acknowledged → offset committed.

    At least once: a crash between publishing and committing repeats records, and the ids of what follows are the same again.
    While the broker is away it keeps trying.

    Records of one key are handled one after the other, in order. Those of different keys may be handled at once, so that a slow one holds
    up its own entity only; committed is then what stands before the first unfinished one, so that a crash also repeats finished ones behind
    it.

    Parameters
    ----------
    consumer
        What to read with, if not the broker's own consumer of ``topics`` as ``group``.
    concurrency
        Most records handled at once; 1: one after the other, whatever their keys.
    grace_s
        Time the handlers get to finish when the process stops, in seconds.
    """

    def __init__(
        self,
        broker: Broker,
        topics: Sequence[str],
        group: str,
        processor: Processor,
        *,
        consumer: Consumer | None = None,
        concurrency: int = 1,
        grace_s: float = GRACE_S,
    ) -> None:
        self._consumer = consumer or broker.consumer(topics, group)
        self._producer = broker.producer()
        self._processor = processor
        self._concurrency = concurrency
        self._loop = Loop(group, self._step, processor.stopping, grace_s, self._finish)
        self._reading: asyncio.Task[Sequence[Record]] | None = None
        self._waiting: list[Record] = []
        self._handling: dict[asyncio.Task[None], Record] = {}
        self._read_to: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._committed_at = time.monotonic()

    async def start(self) -> None:
        await self._producer.start()
        await self._consumer.start()

    async def run(self) -> None:
        await self._loop.run()

    async def stop(self) -> None:
        await self._loop.stop()
        await self._consumer.stop()
        await self._producer.stop()

    async def _step(self) -> None:
        """Begin what may begin, and wait until something is done; once the process stops, until all that was begun is."""
        self._begin()
        begun = self._begun
        await asyncio.wait(begun, timeout=COMMIT_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
        if self._processor.stopping.is_set():
            await asyncio.wait(begun)
        self._take_done()
        if not self._in_hand or time.monotonic() - self._committed_at > COMMIT_INTERVAL_S:
            await self._commit()

    def _begin(self) -> None:
        if self._reading is None and len(self._in_hand) < _IN_HAND_RECORDS:
            self._reading = asyncio.create_task(self._read())
        busy = {_lane(record) for record in self._handling.values()}
        for record in tuple(self._waiting):
            if len(self._handling) >= self._concurrency:
                break
            if _lane(record) not in busy:
                self._waiting.remove(record)
                self._handling[asyncio.create_task(self._handle(record))] = record
            busy.add(_lane(record))

    def _take_done(self) -> None:
        """Take in what was handled and read; raises what one of them raised."""
        self._forget_finished()
        for task in self._handling:
            if task.done():
                task.result()
        if self._reading is not None and self._reading.done():
            reading, self._reading = self._reading, None
            for record in reading.result():
                self._waiting.append(record)
                self._read_to[record.place] = record.offset + 1

    def _forget_finished(self) -> None:
        """Let go of what was handled; a record whose handler failed stays in hand."""
        self._handling = {task: record for task, record in self._handling.items() if not _succeeded(task)}

    async def _read(self) -> Sequence[Record]:
        stopping = self._processor.stopping
        return await keep_trying(lambda: self._consumer.get_many(_BATCH_RECORDS, POLL_S), self._processor.retry.for_broker, stopping)

    async def _handle(self, record: Record) -> None:
        follow = await self._processor.process(record)
        if follow:
            await keep_trying(lambda: self._producer.send(follow), self._processor.retry.for_broker, self._processor.stopping)

    @property
    def _begun(self) -> set[asyncio.Task[Any]]:
        return {*self._handling} if self._reading is None else {*self._handling, self._reading}

    @property
    def _in_hand(self) -> list[Record]:
        """What was read and is not finished."""
        return [*self._handling.values(), *self._waiting]

    async def _finish(self) -> None:
        """Give back what is still being handled, and commit the rest."""
        begun = self._begun
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
        self._forget_finished()
        try:
            async with asyncio.timeout(_LAST_COMMIT_S):
                await self._commit()
        except TimeoutError:
            log.warning("the last offsets were not committed within %g s; their records will be handled again", _LAST_COMMIT_S)

    async def _commit(self) -> None:
        """Commit up to the first unfinished record of each partition; what fails is part of the next commit, or is handled again."""
        reached = dict(self._read_to)
        for record in self._in_hand:
            reached[record.place] = min(reached[record.place], record.offset)
        offsets = {place: offset for place, offset in reached.items() if self._committed.get(place) != offset}
        if not offsets:
            return
        self._committed_at = time.monotonic()
        try:
            await self._consumer.commit(offsets)
        except TransientError as error:
            log.warning("offsets %s are not committed yet: %s", {f"{p.topic}-{p.partition}": n for p, n in offsets.items()}, error)
        else:
            self._committed |= offsets


def _succeeded(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _lane(record: Record) -> tuple[TopicPartition, bytes | None]:
    """What records must be equal in to be handled one after the other."""
    return record.place, record.key


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
        # A process that is started again because a transaction failed mostly finds the broker still away.
        await keep_trying(self._begin, self._processor.retry.for_broker, self._processor.stopping)

    async def _begin(self) -> None:
        try:
            await self._producer.start()
            await self._restore()
            await self._consumer.start()
        except TransientError:
            await self._consumer.stop()
            await self._producer.stop()
            raise

    async def run(self) -> None:
        await self._loop.run()

    async def stop(self) -> None:
        await self._loop.stop()
        await self._consumer.stop()
        await self._producer.stop()

    async def _step(self) -> None:
        stopping = self._processor.stopping
        records = await keep_trying(lambda: self._consumer.get_many(_BATCH_RECORDS, POLL_S), self._processor.retry.for_broker, stopping)
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
