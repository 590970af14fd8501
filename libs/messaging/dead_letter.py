"""Dead letters: a record that cannot be handled is kept with its cause, and can be put back."""

import base64
from datetime import datetime

from libs.errors import InvalidMessage
from libs.messaging import cloudevents
from libs.messaging.records import Record
from schemas.dead_letter import DeadLetter

MAX_VALUE_BYTES = 524_288
"""Base64 of so much still fits a record of 1 MiB."""


def dead_letter(record: Record, error: Exception, consumer: str, now: datetime) -> Record:
    """The record for the dead-letter topic; its id derives from the origin, so a repeat is the same dead letter."""
    event_id = record.header("ce_id")
    value = record.value if record.value is None or len(record.value) <= MAX_VALUE_BYTES else None
    data = DeadLetter(
        origin_topic=record.topic,
        origin_partition=record.partition,
        origin_offset=record.offset,
        consumer=consumer,
        cause=str(error) or repr(error),
        error=type(error).__name__,
        event_id=event_id,
        key_base64=_encode(record.key),
        value_base64=_encode(value),
        value_truncated=value is not record.value,
        headers_base64=tuple((name, base64.b64encode(content or b"").decode()) for name, content in record.headers),
    )
    place = f"{record.topic}-{record.partition}-{record.offset}"
    event = cloudevents.Event(
        id=cloudevents.derived_id(place, data.event_type),
        type=data.event_type,
        source=f"/millrace/{consumer}",
        time=now,
        data=data,
        correlation_id=record.header("ce_correlationid") or event_id or place,
        causation_id=event_id,
        traceparent=record.header("traceparent"),
    )
    return cloudevents.write(event)


def original(letter: DeadLetter) -> Record:
    """The record as it was, to be sent to its origin topic again.

    Raises
    ------
    InvalidMessage
        When the value was too large to be carried.
    """
    if letter.value_truncated:
        raise InvalidMessage(
            f"the value was too large to be kept; it still stands at {letter.origin_topic}-{letter.origin_partition} "
            f"offset {letter.origin_offset} until that topic's retention removes it"
        )
    headers = tuple((name, base64.b64decode(content)) for name, content in letter.headers_base64)
    return Record(letter.origin_topic, _decode(letter.key_base64), _decode(letter.value_base64), headers)


def _encode(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _decode(content: str | None) -> bytes | None:
    return None if content is None else base64.b64decode(content)
