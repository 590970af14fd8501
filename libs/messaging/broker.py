"""Ports to the log; ``kafka`` and ``memory`` implement them and pass the same contract tests."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from libs.messaging.records import Record, TopicPartition

Offsets = Mapping[TopicPartition, int]
"""Next offset to read, by partition."""


class Producer(Protocol):
    """Writes records; ``start`` before use, ``stop`` flushes. After a TransientError it can be used again."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def connect(self) -> None:
        """Be connected; nothing is written. ``send`` does it by itself: this tells "not written" from "perhaps written".

        Raises
        ------
        TransientError
            When the broker cannot be reached in time.
        """
        ...

    async def send(self, records: Sequence[Record]) -> None:
        """Send records in order and wait until the broker has all of them.

        Raises
        ------
        TransientError
            When the broker cannot be reached in time; some of the records may have been written.
        PayloadTooLargeError
            When a record is larger than ``records.MAX_RECORD_BYTES``; none of them has been written.
        """
        ...


class TransactionalProducer(Producer, Protocol):
    """A producer with a fixed transactional id: starting a second one with the same id fences the first."""

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """Everything sent inside is visible to ``read_committed`` readers at once when the block ends, or never when it raises.

        Raises
        ------
        FencedError
            When another instance has taken over.
        TransientError
            When the outcome is doubtful; the producer must not be used again.
        """
        ...

    async def send_offsets(self, offsets: Offsets, group: str) -> None:
        """Commit a group's offsets as part of the transaction."""
        ...


class Consumer(Protocol):
    """Reads topics as a member of a group; what is not committed is read again after a restart."""

    async def start(self) -> None:
        """Join the group; returns when partitions have been assigned (possibly none)."""
        ...

    async def stop(self) -> None:
        """Leave the group."""
        ...

    async def get_many(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        """Up to ``max_records`` committed records, in order within each partition; empty when none came in time."""
        ...

    async def commit(self, offsets: Offsets) -> None:
        """Commit offsets; records up to them will not be read again."""
        ...


class Reader(Protocol):
    """Reads whole topics from their beginning, outside of any group."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def get_many(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        """Up to ``max_records`` committed records; empty when none came in time."""
        ...

    async def end_offsets(self) -> Offsets:
        """Where the committed part of each partition ends now."""
        ...

    async def is_at(self, offsets: Offsets) -> bool:
        """Whether everything before ``offsets`` has been read."""
        ...


class Broker(Protocol):
    """Makes clients of one log; opens nothing by itself."""

    def producer(self) -> Producer: ...

    def transactional_producer(self, transactional_id: str) -> TransactionalProducer: ...

    def consumer(self, topics: Sequence[str], group: str) -> Consumer: ...

    def reader(self, topics: Sequence[str], last_records: int | None = None, since: datetime | None = None) -> Reader:
        """A reader from the beginning, from ``last_records`` before the end of each partition, or from a time on.

        From ``since`` on nothing is left out; a broker that cannot look times up gives earlier records too.
        """
        ...
