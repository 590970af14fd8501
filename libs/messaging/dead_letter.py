"""Dead letters: a record that cannot be handled is kept with its cause, and can be put back."""

import base64
from dataclasses import replace
from datetime import datetime

from libs import telemetry
from libs.errors import InvalidMessage
from libs.messaging import cloudevents
from libs.messaging.records import MAX_RECORD_BYTES, Record
from schemas.dead_letter import DeadLetter

MAX_ORIGINAL_BYTES = 655_360
"""Largest original that is carried: base64 makes 853 KiB of it, which leaves room for the rest in a record of 1 MiB."""

MAX_CAUSE_CHARS = 4096

_MAX_KEY_BYTES = 4096


def dead_letter(record: Record, error: Exception, consumer: str, now: datetime, *, max_bytes: int = MAX_RECORD_BYTES) -> Record:
    """The record for the dead-letter topic; its id derives from the origin and the consumer, so a repeat is the same dead letter.

    It has ``max_bytes`` at most (which must not be below 64 KiB): what would make it larger is left out.
    """
    written = _written(record, error, consumer, now, is_carried=record.size_bytes <= MAX_ORIGINAL_BYTES)
    # Names of headers are JSON, in which one byte can take six.
    return written if written.size_bytes <= max_bytes else _written(record, error, consumer, now, is_carried=False)


def _written(record: Record, error: Exception, consumer: str, now: datetime, *, is_carried: bool) -> Record:
    event_id = _short(record.header("ce_id"))
    place = f"{record.topic}-{record.partition}-{record.offset}"
    data = DeadLetter(
        origin_topic=record.topic,
        origin_partition=record.partition,
        origin_offset=record.offset,
        consumer=consumer,
        cause=(str(error) or repr(error))[:MAX_CAUSE_CHARS],
        error=type(error).__name__,
        event_id=event_id,
        key_base64=_encode(record.key) if is_carried else None,
        value_base64=_encode(record.value) if is_carried else None,
        value_truncated=not is_carried,
        headers_base64=tuple((name, base64.b64encode(content or b"").decode()) for name, content in record.headers) if is_carried else (),
    )
    trace = record.header("traceparent") or record.header("ce_traceparent")
    event = cloudevents.Event(
        id=cloudevents.derived_id(place, data.event_type, consumer),
        type=data.event_type,
        source=f"/millrace/{consumer}",
        time=now,
        data=data,
        correlation_id=_short(record.header("ce_correlationid")) or event_id or place,
        causation_id=event_id,
        traceparent=telemetry.current_traceparent() or telemetry.checked_traceparent(trace),
        causation_source=_short(record.header("ce_source")) if event_id else None,
    )
    key = record.key if record.key is not None and len(record.key) <= _MAX_KEY_BYTES else None
    return replace(cloudevents.write(event), key=key)


def original(letter: DeadLetter) -> Record:
    """The record as it was, to be sent to its origin topic again.

    Raises
    ------
    InvalidMessage
        When the record was too large to be carried.
    """
    if letter.value_truncated:
        raise InvalidMessage(
            f"the record was too large to be kept; it still stands at {letter.origin_topic}-{letter.origin_partition} "
            f"offset {letter.origin_offset} until that topic's retention removes it"
        )
    headers = tuple((name, base64.b64decode(content)) for name, content in letter.headers_base64)
    return Record(letter.origin_topic, _decode(letter.key_base64), _decode(letter.value_base64), headers)


def _short(attribute: str | None) -> str | None:
    return attribute if attribute and len(attribute) <= cloudevents.MAX_ATTRIBUTE_CHARS else None


def _encode(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _decode(content: str | None) -> bytes | None:
    return None if content is None else base64.b64decode(content)
