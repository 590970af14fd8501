"""The log in memory: the fake that tests run on; it passes the same contract tests as Kafka."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime

from libs.errors import TransientError
from libs.messaging.broker import Offsets
from libs.messaging.errors import FencedError
from libs.messaging.records import Record, TopicPartition, refuse_oversized


class MemoryBroker:
    """A log of single-partition topics that lives as long as the object; topics come into being when they are used.

    Attributes
    ----------
    is_away
        Set it to play a broker that cannot be reached: every call raises TransientError until it is False again.
    """

    def __init__(self) -> None:
        self.is_away = False
        self._records: dict[str, list[Record]] = defaultdict(list)
        self._committed: dict[tuple[str, TopicPartition], int] = {}
        self._epochs: dict[str, int] = defaultdict(int)
        self._changed = asyncio.Condition()

    def records(self, topic: str) -> Sequence[Record]:
        """Everything that was written to a topic."""
        return tuple(self._records[topic])

    def committed(self, group: str, topic: str) -> int:
        """The offset a group would go on from."""
        return self._committed.get((group, TopicPartition(topic, 0)), 0)

    async def delete_topics(self, names: Sequence[str]) -> None:
        """Forget topics, what they hold and how far groups have read them."""
        self.check_reachable()
        async with self._changed:
            for name in names:
                self._records.pop(name, None)
            self._committed = {(group, place): offset for (group, place), offset in self._committed.items() if place.topic not in names}

    def producer(self) -> "MemoryProducer":
        return MemoryProducer(self)

    def transactional_producer(self, transactional_id: str) -> "MemoryProducer":
        return MemoryProducer(self, transactional_id)

    def consumer(self, topics: Sequence[str], group: str) -> "MemoryConsumer":
        return MemoryConsumer(self, topics, group)

    def reader(self, topics: Sequence[str], last_records: int | None = None, since: datetime | None = None) -> "MemoryReader":  # noqa: ARG002
        return MemoryReader(self, topics, last_records)

    async def append(self, records: Sequence[Record], offsets: Sequence[tuple[str, Offsets]] = ()) -> None:
        """Write records and commit offsets in one step."""
        self.check_reachable()
        async with self._changed:
            for record in records:
                stored = self._records[record.topic]
                stored.append(replace(record, partition=0, offset=len(stored)))
            for group, by_place in offsets:
                self._committed.update({(group, place): offset for place, offset in by_place.items()})
            self._changed.notify_all()

    async def read(self, positions: dict[str, int], max_records: int, timeout_s: float) -> list[Record]:
        """Take records from ``positions`` on, advancing them."""
        self.check_reachable()
        async with self._changed:
            if not any(len(self._records[topic]) > position for topic, position in positions.items()):
                try:
                    async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 can swallow a cancellation
                        await self._changed.wait()
                except TimeoutError:
                    return []
            taken: list[Record] = []
            for topic, position in positions.items():
                some = self._records[topic][position : position + max_records - len(taken)]
                positions[topic] = position + len(some)
                taken += some
            return taken

    def take_over(self, transactional_id: str) -> int:
        """The next epoch of a transactional id; whoever holds an earlier one is fenced."""
        self.check_reachable()
        self._epochs[transactional_id] += 1
        return self._epochs[transactional_id]

    def check_not_fenced(self, transactional_id: str, epoch: int) -> None:
        """Raise FencedError when ``epoch`` is not the newest of the transactional id."""
        if self._epochs[transactional_id] != epoch:
            raise FencedError(f"another instance with the transactional id {transactional_id!r} has taken over")

    def check_reachable(self) -> None:
        """Raise TransientError while the broker plays being away."""
        if self.is_away:
            raise TransientError("the broker in memory plays being away")


class MemoryProducer:
    """Writes to a MemoryBroker, with or without transactions."""

    def __init__(self, broker: MemoryBroker, transactional_id: str | None = None) -> None:
        self._broker = broker
        self._id = transactional_id
        self._epoch = 0
        self._pending: tuple[list[Record], list[tuple[str, Offsets]]] | None = None

    async def start(self) -> None:
        self._broker.check_reachable()
        if self._id is not None:
            self._epoch = self._broker.take_over(self._id)

    async def stop(self) -> None:
        return None

    async def connect(self) -> None:
        self._broker.check_reachable()

    async def send(self, records: Sequence[Record]) -> None:
        refuse_oversized(records)
        if self._pending is not None:
            self._pending[0].extend(records)
        else:
            await self._broker.append(records)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        self._pending = ([], [])
        try:
            yield
            if self._id is not None:
                self._broker.check_not_fenced(self._id, self._epoch)
            await self._broker.append(*self._pending)
        finally:
            self._pending = None

    async def send_offsets(self, offsets: Offsets, group: str) -> None:
        if self._pending is None:
            raise RuntimeError("send_offsets belongs inside a transaction")
        self._pending[1].append((group, offsets))


class MemoryConsumer:
    """Reads from a MemoryBroker as the only member of its group."""

    def __init__(self, broker: MemoryBroker, topics: Sequence[str], group: str) -> None:
        self._broker = broker
        self._topics = topics
        self._group = group
        self._positions: dict[str, int] = {}

    async def start(self) -> None:
        self._broker.check_reachable()
        self._positions = {topic: self._broker.committed(self._group, topic) for topic in self._topics}

    async def stop(self) -> None:
        return None

    async def get_many(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        return await self._broker.read(self._positions, max_records, timeout_s)

    async def commit(self, offsets: Offsets) -> None:
        await self._broker.append((), [(self._group, offsets)])


class MemoryReader:
    """Reads whole topics of a MemoryBroker."""

    def __init__(self, broker: MemoryBroker, topics: Sequence[str], last_records: int | None) -> None:
        self._broker = broker
        self._topics = topics
        self._last_records = last_records
        self._positions: dict[str, int] = {}

    async def start(self) -> None:
        self._broker.check_reachable()
        ends = {topic: len(self._broker.records(topic)) for topic in self._topics}
        skip = self._last_records
        self._positions = {topic: 0 if skip is None else max(0, end - skip) for topic, end in ends.items()}

    async def stop(self) -> None:
        return None

    async def get_many(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        return await self._broker.read(self._positions, max_records, timeout_s)

    async def end_offsets(self) -> Offsets:
        self._broker.check_reachable()
        return {TopicPartition(topic, 0): len(self._broker.records(topic)) for topic in self._topics}

    async def is_at(self, offsets: Offsets) -> bool:
        return all(self._positions[place.topic] >= offset for place, offset in offsets.items())
