"""Streaming inference on the wire: what a record asks, and the record that answers it. No I/O.

A request is a V1 or V2 body (``libs.inference``) in JSON: the value of a plain record or of a CloudEvent in binary mode, or the data of a
structured one. A result is a CloudEvent in binary mode whose body is an ``InferenceResult``.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from libs import telemetry
from libs.errors import InvalidMessage, MillraceError
from libs.inference import v1, v2
from libs.inference.bodies import parse_object
from libs.inference.errors import InvalidInputError, printable
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import Route
from libs.messaging import cloudevents
from libs.messaging.records import MAX_RECORD_BYTES, Record
from schemas.inference import Signature
from schemas.topics import inference_results

COMPLETED = "millrace.serving.inference.completed.v1"
FAILED = "millrace.serving.inference.failed.v1"
SOURCE = "/millrace/serving"
MAX_KEY_BYTES = 4096
"""A longer key is not repeated on the result: beside it there would be no room for the answer."""

_ENVELOPE = ("id", "source", "correlationid", "traceparent")


@dataclass(frozen=True, slots=True)
class Request:
    """A record with its envelope; ``id`` is the CloudEvent's, else the key, else the record's place in the log."""

    record: Record
    endpoint_name: str
    id: str
    correlation_id: str
    traceparent: str | None
    structured_data: Any = None

    def document(self) -> dict[str, Any]:
        """The body.

        Raises
        ------
        InvalidMessage
            When there is no JSON object to be found.
        """
        value = self.record.value if self.structured_data is None else self.structured_data
        if not value:
            raise InvalidMessage("the record has no value")
        if isinstance(value, dict):
            return value
        if not isinstance(value, bytes):
            raise InvalidMessage("the CloudEvent's data must be a JSON object")
        try:
            return parse_object(value)
        except InvalidInputError as error:
            raise InvalidMessage(error.message.replace("the request body", "the record's value")) from error

    def completed(self, route: Route, response: InferResponse, now: datetime) -> Record:
        """The result with a model's answer.

        Raises
        ------
        InvalidMessage
            When the answer is larger than a record may be.
        """
        outcome = {"model_name": route.model_name, "model_version": route.version, "predictions": v1.predictions(response)}
        result = self._result("completed", outcome, now)
        if result.size_bytes > MAX_RECORD_BYTES:
            raise InvalidMessage(f"the answer is too large for a record: {result.size_bytes} bytes; at most {MAX_RECORD_BYTES} can be sent")
        return result

    def failed(self, error: MillraceError, now: datetime) -> Record:
        """The result that says why there is no answer."""
        return self._result("failed", {"error": printable(error.message)}, now)

    def _result(self, status: str, outcome: Mapping[str, Any], now: datetime) -> Record:
        topic = inference_results(self.endpoint_name).name
        body = {"request_id": self.id, "endpoint_name": self.endpoint_name, "status": status, **outcome}
        attributes = {
            "content-type": "application/json",
            "ce_specversion": "1.0",
            # Derived: whoever reads results recognises a repeat.
            "ce_id": cloudevents.derived_id(self.id, f"{topic} result"),
            "ce_type": COMPLETED if status == "completed" else FAILED,
            "ce_source": SOURCE,
            "ce_time": now.isoformat().replace("+00:00", "Z"),
            "ce_subject": self.endpoint_name,
            "ce_correlationid": self.correlation_id,
            "ce_causationid": self.id,
            "traceparent": telemetry.current_traceparent() or self.traceparent,
        }
        key = self.record.key
        return Record(
            topic,
            key if key and len(key) <= MAX_KEY_BYTES else self.id.encode(),
            orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY),
            tuple((name, value.encode()) for name, value in attributes.items() if value),
        )


def read_request(record: Record, endpoint_name: str) -> Request:
    """Read the envelope of a record; every record has an id, whatever else is wrong with it."""
    envelope, data = _envelope(record)
    place = f"{record.topic}-{record.partition}-{record.offset}"
    key = record.key.decode("utf-8", "replace") if record.key else None
    identity = _usable(envelope.get("id")) or _usable(key) or place
    return Request(
        record,
        endpoint_name,
        identity,
        _usable(envelope.get("correlationid")) or identity,
        telemetry.checked_traceparent(record.header("traceparent") or envelope.get("traceparent")),
        data,
    )


def parse(document: Mapping[str, Any], signature: Signature) -> InferRequest:
    """Read a V1 or V2 body; raises ``InvalidInputError``."""
    inputs = document.get("inputs")
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) and "datatype" in inputs[0]:
        return v2.from_document(document, signature)
    return v1.from_document(document, signature)


def _envelope(record: Record) -> tuple[dict[str, str | None], Any]:
    """The attributes of a CloudEvent, and its data in structured mode."""
    event = {} if record.header("ce_id") else _structured(record)
    if not event:
        return {name: record.header(f"ce_{name}") for name in _ENVELOPE}, None
    attributes = {name: value for name in _ENVELOPE if isinstance(value := event.get(name), str)}
    encoded = event.get("data_base64")
    if not isinstance(encoded, str):
        return dict(attributes), event.get("data") or b""
    try:
        return dict(attributes), base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return dict(attributes), "not base64"


def _structured(record: Record) -> dict[str, Any]:
    """A structured CloudEvent; empty for any other record."""
    if not record.value or b"specversion" not in record.value:
        return {}
    try:
        event = orjson.loads(record.value)
    except orjson.JSONDecodeError:
        return {}
    return event if isinstance(event, dict) and isinstance(event.get("specversion"), str) and "type" in event else {}


def _usable(identity: str | None) -> str | None:
    return identity if identity and len(identity) <= cloudevents.MAX_ATTRIBUTE_CHARS else None
