"""The log as a stream sees it: records are taken, and their results are written with their offsets, both or neither."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from libs.messaging.records import Record

Header = tuple[str, bytes | None]
"""Kafka knows headers without a value; whoever writes requests may use them."""


class Taken(NamedTuple):
    """A record of a requests topic as it was read."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header]
    timestamp_ms: int

    def record(self, topic: str) -> Record:
        """The same for those who know nothing of streams."""
        return Record(topic, self.key, self.value, tuple(self.headers), self.partition, self.offset, self.timestamp_ms)


class Given(NamedTuple):
    """A record to be written; its partition follows from its key."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header]


class Chunk(NamedTuple):
    """Records that were taken at once, in order within each partition.

    ``assignment`` numbers the time between two changes of who reads which partition: what was taken in an earlier one belongs to
    somebody else by now.
    """

    assignment: int
    records: list[Taken]

    def offsets(self) -> dict[int, int]:
        """The offset after the last record of each partition."""
        return {record.partition: record.offset + 1 for record in self.records}


class StreamLog(Protocol):
    """The requests of one endpoint, read as a member of a group, and a way to write.

    ``take``, ``stay`` and ``lags`` are called one at a time; ``commit`` may run beside them. After a ``SessionLostError`` only ``close``
    may be called. All of them wait without blocking the event loop.
    """

    async def open(self) -> None:
        """Join the group, once the outcome of whatever an earlier session left open is settled.

        Raises
        ------
        SessionLostError
            When the broker cannot be reached in time.
        """
        ...

    async def close(self) -> None:
        """Leave; what is open is aborted. Never raises."""
        ...

    async def take(self, max_records: int, max_bytes: int, timeout_s: float) -> Chunk:
        """The next committed records, as soon as there is one; none when none came in time.

        Raises
        ------
        SessionLostError, SupersededError
            When this process is no member of its group any more, for good.
        """
        ...

    async def stay(self, timeout_s: float) -> None:
        """Stay in the group for so long without taking anything; raises as ``take`` does."""
        ...

    async def commit(self, assignment: int, results: Sequence[Given], offsets: Mapping[int, int]) -> bool:
        """Write results and the offsets of what they answer, both or neither; False when the assignment is over, and nothing is written.

        Raises
        ------
        SessionLostError
            When it failed or its outcome is not known.
        """
        ...

    async def lags(self) -> dict[int, int]:
        """Records of each assigned partition that have not been committed."""
        ...


class StreamLogs(Protocol):
    """Makes the log of an endpoint; opens nothing by itself."""

    def __call__(self, endpoint_name: str) -> StreamLog: ...
