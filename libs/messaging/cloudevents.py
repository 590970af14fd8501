"""CloudEvents 1.0 on Kafka: binary mode written, binary and structured mode read.

References
----------
CloudEvents 1.0.2, Kafka Protocol Binding, sections 3.2 (binary) and 3.3 (structured).
Structured messages are recognised by their body, not by the content type: version 1 of the official Python SDK labels them
``application/json``.
"""

import base64
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import orjson
from pydantic import ValidationError

from libs import telemetry
from libs.errors import InvalidMessage
from libs.messaging.records import Headers, Record
from schemas.base import Payload
from schemas.topics import PAYLOADS

_NAMESPACE = uuid.UUID("6d696c6c-7261-4365-8000-6576656e7473")
_CONTENT_TYPE = b"application/json"

MAX_ATTRIBUTE_CHARS = 1024
"""Longest envelope attribute that is read: ids and sources travel on in every event that follows."""

Clock = Callable[[], datetime]
P = TypeVar("P", bound=Payload)
P_co = TypeVar("P_co", bound=Payload, covariant=True)


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Event(Generic[P_co]):
    """A CloudEvent with its payload, already checked against its contract.

    ``correlation_id`` is the id of the event that began the story, ``causation_id`` that of the one just before, whose source is
    ``causation_source``: an id is unique within its source only.
    """

    id: str
    type: str
    source: str
    time: datetime
    data: P_co
    correlation_id: str
    causation_id: str | None = None
    traceparent: str | None = None
    causation_source: str | None = None


def derived_id(cause_id: str, event_type: str, discriminator: str = "") -> str:
    """Id of the event of a type that a cause leads to: the same for every attempt, so repeats are recognised (UUIDv5)."""
    return str(uuid.uuid5(_NAMESPACE, f"{cause_id}\n{event_type}\n{discriminator}"))


def new_event(data: P, source: str, *, now: datetime, event_id: str | None = None) -> Event[P]:
    """An event that begins a story."""
    identity = event_id or str(uuid.uuid4())
    return Event(identity, data.event_type, source, now, data, identity, traceparent=telemetry.current_traceparent())


def caused_event(data: P, cause: Event[Any], source: str, *, now: datetime, ordinal: int = 0) -> Event[P]:
    """An event that another one led to; ``ordinal`` tells apart several of one type and entity."""
    return Event(
        derived_id(f"{cause.source}\n{cause.id}", data.event_type, f"{data.entity}#{ordinal}" if ordinal else data.entity),
        data.event_type,
        source,
        now,
        data,
        cause.correlation_id,
        cause.id,
        telemetry.current_traceparent() or cause.traceparent,
        cause.source,
    )


def write(event: Event[Any], topic: str | None = None) -> Record:
    """The record of an event, in binary mode."""
    attributes = {
        "ce_specversion": "1.0",
        "ce_id": event.id,
        "ce_type": event.type,
        "ce_source": event.source,
        "ce_time": event.time.isoformat().replace("+00:00", "Z"),
        "ce_subject": event.data.entity,
        "ce_correlationid": event.correlation_id,
        "ce_causationid": event.causation_id,
        "ce_causationsource": event.causation_source,
        "traceparent": event.traceparent,
    }
    headers: Headers = (
        ("content-type", _CONTENT_TYPE),
        *((name, value.encode()) for name, value in attributes.items() if value is not None),
    )
    body = event.data.model_dump_json().encode()
    return Record(topic or event.data.topic, event.data.entity.encode(), body, headers)


def tombstone(topic: str, entity: str) -> Record:
    """The record that deletes an entity from a compacted topic."""
    return Record(topic, entity.encode(), None)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A CloudEvent whose data has not been looked at yet; an event without a time gets that of its record."""

    id: str
    type: str
    source: str
    time: datetime
    data: bytes
    correlation_id: str
    causation_id: str | None
    traceparent: str | None
    causation_source: str | None = None


def read_envelope(record: Record) -> Envelope:
    """Read the envelope of a record, in either mode.

    Raises
    ------
    InvalidMessage
        When the record is not a CloudEvent 1.0, or lacks one of its required attributes.
    """
    if record.value is None:
        raise InvalidMessage("the record has no value")
    attributes = {name[3:].lower(): record.header(name) for name, _ in record.headers if name.lower().startswith("ce_")}
    return _envelope(attributes, record.value, record) if attributes else _structured(record)


def _structured(record: Record) -> Envelope:
    try:
        body = orjson.loads(record.value or b"")
    except orjson.JSONDecodeError as error:
        raise InvalidMessage(f"the record has no ce_ headers and its value is not JSON: {error}") from error
    if not isinstance(body, dict) or "specversion" not in body:
        raise InvalidMessage("the record is not a CloudEvent: it has no ce_ headers and its value has no specversion")
    attributes: dict[str, str | None] = {name: value for name, value in body.items() if isinstance(value, str) and name != "data"}
    return _envelope(attributes, _structured_data(body), record)


def _structured_data(body: dict[str, Any]) -> bytes:
    if "data_base64" not in body:
        return orjson.dumps(body.get("data"))
    try:
        return base64.b64decode(body["data_base64"], validate=True)
    except (TypeError, ValueError) as error:
        raise InvalidMessage(f"the CloudEvent's data_base64 is not base64: {error}") from error


def _envelope(attributes: dict[str, str | None], data: bytes, record: Record) -> Envelope:
    for name in ("specversion", "id", "type", "source"):
        if not attributes.get(name):
            raise InvalidMessage(f"the CloudEvent has no {name}")
    for name, value in attributes.items():
        if value is not None and len(value) > MAX_ATTRIBUTE_CHARS:
            raise InvalidMessage(f"the CloudEvent's {name[:64]} has {len(value)} characters; at most {MAX_ATTRIBUTE_CHARS} are read")
    if attributes["specversion"] != "1.0":
        raise InvalidMessage(f"CloudEvents specversion {attributes['specversion']!r} is not supported; 1.0 is")
    time = attributes.get("time")
    try:
        moment = datetime.fromisoformat(time) if time else datetime.fromtimestamp(max(record.timestamp_ms, 0) / 1000, UTC)
    except ValueError as error:
        raise InvalidMessage(f"the CloudEvent's time {time!r} is not RFC 3339") from error
    identity = str(attributes["id"])
    return Envelope(
        id=identity,
        type=str(attributes["type"]),
        source=str(attributes["source"]),
        time=moment if moment.tzinfo else moment.replace(tzinfo=UTC),
        data=data,
        correlation_id=attributes.get("correlationid") or identity,
        causation_id=attributes.get("causationid"),
        traceparent=telemetry.checked_traceparent(record.header("traceparent") or attributes.get("traceparent")),
        causation_source=attributes.get("causationsource"),
    )


class UnknownEventType(InvalidMessage):
    """No contract has this type; consumers of facts skip it, the consumer of commands dead-letters it."""


def open_envelope(envelope: Envelope) -> Event[Payload]:
    """Check the data against the contract of its type.

    Raises
    ------
    UnknownEventType
        When no contract has the type; the message names a version that does exist, if one does.
    InvalidMessage
        When the data does not fit the contract; the message names each field.
    """
    contract = PAYLOADS.get(envelope.type)
    if contract is None:
        raise UnknownEventType(_unknown_type(envelope.type))
    try:
        data = contract.model_validate_json(envelope.data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'data'}: {problem['msg']}" for problem in error.errors()[:5])
        raise InvalidMessage(f"{envelope.type} does not fit its contract: {problems}") from error
    return Event(
        envelope.id,
        envelope.type,
        envelope.source,
        envelope.time,
        data,
        envelope.correlation_id,
        envelope.causation_id,
        envelope.traceparent,
        envelope.causation_source,
    )


def read(record: Record) -> Event[Payload]:
    """Envelope and data in one step; raises what ``read_envelope`` and ``open_envelope`` raise."""
    return open_envelope(read_envelope(record))


def _unknown_type(event_type: str) -> str:
    stem, _, version = event_type.rpartition(".")
    known = [name for name in PAYLOADS if name.rpartition(".")[0] == stem]
    if known and version:
        return f"{event_type} is not a known version of this event; known: {', '.join(known)}"
    return f"no contract has the event type {event_type!r}"
