"""A record as the broker sees it: bytes with headers at a place in a topic."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from libs.errors import PayloadTooLargeError

Headers = tuple[tuple[str, bytes | None], ...]

MAX_RECORD_BYTES = 1_048_576
"""Largest record, counted as ``Record.size_bytes`` does; a Kafka broker accepts 12 bytes more by default (``message.max.bytes``)."""

_RECORD_OVERHEAD_BYTES = 100
"""Record batch header (61 bytes), record header (at most 21 bytes) and some room."""

_HEADER_OVERHEAD_BYTES = 10
"""Two variable-length sizes."""


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record, before it is sent (``offset`` -1) or as it was read.

    ``value`` None is a tombstone: on a compacted topic it deletes the key.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = field(default=())
    partition: int = 0
    offset: int = -1
    timestamp_ms: int = -1

    @property
    def place(self) -> TopicPartition:
        """The partition it was read from."""
        return TopicPartition(self.topic, self.partition)

    @property
    def size_bytes(self) -> int:
        """Upper bound of what it takes in the log, alone in its batch."""
        headers = sum(len(name.encode()) + len(value or b"") + _HEADER_OVERHEAD_BYTES for name, value in self.headers)
        return len(self.key or b"") + len(self.value or b"") + headers + _RECORD_OVERHEAD_BYTES

    def header(self, name: str) -> str | None:
        """The first header of that name as text, or None when it is absent or not UTF-8."""
        for header, value in self.headers:
            if header == name and value is not None:
                try:
                    return value.decode()
                except UnicodeDecodeError:
                    return None
        return None


def refuse_oversized(records: Iterable[Record]) -> None:
    """Raise PayloadTooLargeError when one of the records is larger than the log takes."""
    for record in records:
        if record.size_bytes > MAX_RECORD_BYTES:
            raise PayloadTooLargeError(f"a record for {record.topic} has {record.size_bytes} bytes; at most {MAX_RECORD_BYTES} can be sent")
