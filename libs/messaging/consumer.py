"""The consumer runner: a group's records through a Processor, at least once, in order."""

import logging
from collections.abc import Awaitable, Callable, Sequence

from libs.errors import TransientError
from libs.messaging.broker import Broker, Offsets, TransactionalProducer
from libs.messaging.processing import Processor
from libs.messaging.records import Record

log = logging.getLogger(__name__)

_POLL_S = 1.0


class ConsumerRunner:
    """Consumes topics as ``group``: record → processor → what follows is published and acknowledged → offset committed.

    At least once: a crash between publishing and committing repeats a record, and the ids of what follows are the same again.
    """

    def __init__(self, broker: Broker, topics: Sequence[str], group: str, processor: Processor) -> None:
        self._consumer = broker.consumer(topics, group)
        self._producer = broker.producer()
        self._processor = processor
        self._stopping = False

    async def start(self) -> None:
        await self._producer.start()
        await self._consumer.start()

    async def run(self) -> None:
        while not self._stopping:
            for record in await self._consumer.get_many(100, _POLL_S):
                if self._stopping:
                    break
                follow = await self._processor.process(record)
                if follow:
                    await self._producer.send(follow)
                await self._consumer.commit({record.place: record.offset + 1})

    async def stop(self) -> None:
        self._stopping = True
        await self._consumer.stop()
        await self._producer.stop()


class TransactionalRunner:
    """Like ConsumerRunner, but a batch's outputs and offsets become visible in one Kafka transaction.

    The processor's handlers may keep state: after any failed transaction ``run`` raises, and the process starts again from the log.

    Parameters
    ----------
    restore
        Reads that state from the log. Called once an older instance has been fenced, so nothing is written behind its back, and
        before the first record is read.
    """

    def __init__(
        self, broker: Broker, topics: Sequence[str], group: str, processor: Processor, restore: Callable[[], Awaitable[None]]
    ) -> None:
        self._consumer = broker.consumer(topics, group)
        self._producer: TransactionalProducer = broker.transactional_producer(group)
        self._group = group
        self._processor = processor
        self._restore = restore
        self._stopping = False

    async def start(self) -> None:
        await self._producer.start()
        await self._restore()
        await self._consumer.start()

    async def run(self) -> None:
        while not self._stopping:
            records = await self._consumer.get_many(100, _POLL_S)
            if records:
                await self._transact(records)

    async def stop(self) -> None:
        self._stopping = True
        await self._consumer.stop()
        await self._producer.stop()

    async def _transact(self, records: Sequence[Record]) -> None:
        offsets: Offsets = {record.place: record.offset + 1 for record in records}
        try:
            async with self._producer.transaction():
                for record in records:
                    follow = await self._processor.process(record)
                    if follow:
                        await self._producer.send(follow)
                await self._producer.send_offsets(offsets, self._group)
        except TransientError as error:
            raise TransientError(f"the transaction of {self._group} failed; starting again from the log: {error}") from error
