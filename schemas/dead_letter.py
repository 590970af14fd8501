"""A message that could not be handled: why, and from where."""

from pydantic import Field

from schemas.base import Payload


class DeadLetter(Payload):
    """The original record, byte for byte, with the cause and the place it came from.

    ``key_base64``, ``value_base64`` and ``headers_base64`` restore the record exactly, so that it can be replayed.
    ``value_truncated`` is true when the original was too large to be carried; key, value and headers are then left out, and the record
    still stands at its origin offset.
    """

    event_type = "millrace.messaging.record.dead_lettered.v1"
    topic = "millrace.dlq"
    origin_topic: str
    origin_partition: int
    origin_offset: int
    consumer: str = Field(description="Service that could not handle it.")
    cause: str
    error: str = Field(description="Class of the error.")
    event_id: str | None = None
    key_base64: str | None = None
    value_base64: str | None = None
    value_truncated: bool = False
    headers_base64: tuple[tuple[str, str], ...] = ()

    @property
    def entity(self) -> str:
        return self.event_id or f"{self.origin_topic}-{self.origin_partition}-{self.origin_offset}"
