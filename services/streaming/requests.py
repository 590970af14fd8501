"""What a record of a requests topic asks. No I/O.

A request is a body of an inference protocol: the value of a plain record or of a CloudEvent in binary mode, or the data of a structured
one. The content type says which: JSON is V1 (``instances``) or V2 (``inputs``), told apart by what is in it; V2 with binary tensors is JSON
with the header ``inference-header-content-length``; V2 in protobuf (``ModelInferRequest``) has a content type of its own.

References
----------
CloudEvents 1.0.2, Kafka Protocol Binding; extension "dataref" (claim check).
"""

import base64
import binascii
import hashlib
import uuid
from collections.abc import Mapping
from enum import Enum
from typing import Any

import orjson

from libs import telemetry
from libs.errors import InvalidMessage
from libs.inference import v1, v2, v2_grpc
from libs.inference.bodies import parse_object
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferRequest
from libs.messaging import cloudevents
from schemas.inference import Signature
from services.streaming.log import Taken

REFERENCE = "sha256:"
"""How a ``dataref`` names an artifact of the platform's store."""

PROTOBUF = frozenset(
    {
        v2_grpc.CONTENT_TYPE,
        "application/x-protobuf",
        "application/protobuf",
        "application/vnd.google.protobuf",
        "application/grpc+proto",
        "application/grpc",
    }
)
"""Content types of a ``ModelInferRequest``."""

_HEAD_LENGTH = "inference-header-content-length"
_RESULT_NAMESPACE = uuid.UUID("6d696c6c-7261-4365-8000-726573756c74").bytes
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


class Form(Enum):
    """The forms a body can have; the answer has the same."""

    ROWS = "V1"
    TENSORS = "V2"
    BINARY = "V2 with binary tensors"
    PROTOBUF = "V2 in protobuf"


class Request:
    """A record with its envelope; every record has one, whatever else is wrong with it.

    Attributes
    ----------
    id
        The CloudEvent's id, else the key, else the record's place in the log.
    result_id
        UUIDv5 of the event's source and id, or of the record's place: the same whenever the request is answered.
    chance
        A number in [0, 1) that follows from the same, by which a traffic split chooses: a repeat is answered by the same version.
    dataref
        Where the body is, if it is not in the record.
    """

    __slots__ = (
        "_data",
        "_head_length",
        "chance",
        "content_type",
        "correlation_id",
        "dataref",
        "endpoint_name",
        "form",
        "id",
        "result_id",
        "taken",
        "traceparent",
    )

    def __init__(self, taken: Taken, topic: str, endpoint_name: str) -> None:
        self.taken = taken
        self.endpoint_name = endpoint_name
        envelope, self._data = _envelope(taken)
        self.content_type = content_type = envelope.get("content-type")
        self.form: Form | None = None
        self._head_length: str | None = None
        if content_type is not None and content_type.partition(";")[0].strip().lower() in PROTOBUF:
            self.form = Form.PROTOBUF
        elif _HEAD_LENGTH in envelope:
            self.form, self._head_length = Form.BINARY, envelope[_HEAD_LENGTH]
        self.dataref = envelope.get("dataref")
        traceparent = envelope.get("traceparent")
        self.traceparent = None if traceparent is None else telemetry.checked_traceparent(traceparent)
        event_id = _usable(envelope.get("id"))
        if event_id is not None:
            self.id = event_id
            cause = f"{envelope.get('source') or ''}\n{event_id}"
        else:
            cause = f"{topic}-{taken.partition}-{taken.offset}"
            self.id = _usable(taken.key.decode("utf-8", "replace") if taken.key else None) or cause
        self.correlation_id = _usable(envelope.get("correlationid")) or self.id
        self.result_id, self.chance = _derived(cause)

    @property
    def body(self) -> Any:
        """The body as it came: bytes, or what a structured event holds."""
        return self.taken.value if self._data is None else self._data

    @property
    def is_claimed(self) -> bool:
        """Whether the body has to be fetched."""
        return self.dataref is not None and not self.body

    def fetched(self, body: bytes) -> None:
        """Take the body that ``dataref`` names."""
        self._data = body

    def document(self) -> dict[str, Any]:
        """The JSON body; sets ``form``.

        Raises
        ------
        InvalidMessage
            When there is no JSON object to be found.
        """
        value = self.body
        if not value:
            raise InvalidMessage("the record has no value")
        if isinstance(value, bytes):
            try:
                value = parse_object(value)
            except InvalidInputError as error:
                raise InvalidMessage(error.message.replace("the request body", "the record's value")) from error
        if not isinstance(value, dict):
            raise InvalidMessage("the CloudEvent's data must be a JSON object")
        self.form = Form.TENSORS if _is_v2(value) else Form.ROWS
        return value

    def parse(self, document: Mapping[str, Any] | None, signature: Signature) -> InferRequest:
        """Tensors for a signature; ``document`` is what ``document()`` gave, None for the forms that are not JSON.

        Raises
        ------
        InvalidMessage, InvalidInputError
            The body is malformed or does not fit.
        """
        if document is not None:
            return v2.from_document(document, signature) if self.form is Form.TENSORS else v1.from_document(document, signature)
        value = self.body
        if not isinstance(value, bytes) or not value:
            raise InvalidMessage("the record has no value" if not value else "the CloudEvent's data must be bytes (data_base64)")
        if self.form is Form.PROTOBUF:
            return v2_grpc.parse(value, signature)
        if self._head_length is None or not self._head_length.isdigit() or len(self._head_length) > 10:
            raise InvalidMessage(f"the header {_HEAD_LENGTH} must be a number of bytes, got {(self._head_length or '')[:40]!r}")
        return v2.parse(value, signature, int(self._head_length))


def result_id(cause: str) -> str:
    """The id of the result of what ``cause`` names: ``uuid.uuid5``, in a quarter of its time."""
    return _derived(cause)[0]


def _derived(cause: str) -> tuple[str, float]:
    digest = hashlib.sha1(_RESULT_NAMESPACE + cause.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
    identity = f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{_VARIANT[digest[16]]}{digest[17:20]}-{digest[20:32]}"
    return identity, int(digest[32:], 16) / 2**32


def _is_v2(document: Mapping[str, Any]) -> bool:
    if "instances" in document:
        return False
    inputs = document.get("inputs")
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], dict) and "datatype" in inputs[0]


def _envelope(taken: Taken) -> tuple[dict[str, str], Any]:
    """The attributes of a CloudEvent with the headers that matter, and its data in structured mode."""
    found: dict[str, str] = {}
    is_event = False
    for name, value in taken.headers:
        attribute = _WANTED.get(name)
        if attribute is not None and value is not None and attribute not in found:
            text = _text(value)
            if text is not None:
                found[attribute] = text
                is_event = is_event or name == "ce_id"
    if is_event or not taken.value or b"specversion" not in taken.value:
        return found, None
    return _structured(taken.value, found)


_WANTED = {
    **{f"ce_{name}": name for name in ("id", "source", "correlationid", "dataref")},
    "traceparent": "traceparent",
    "content-type": "content-type",
    _HEAD_LENGTH: _HEAD_LENGTH,
}


def _structured(value: bytes, headers: dict[str, str]) -> tuple[dict[str, str], Any]:
    try:
        event = orjson.loads(value)
    except orjson.JSONDecodeError:
        return headers, None
    if not isinstance(event, dict) or not isinstance(event.get("specversion"), str) or "type" not in event:
        return headers, None
    found = {name: text for name in ("id", "source", "correlationid", "dataref", "traceparent") if isinstance(text := event.get(name), str)}
    found.update({name: text for name, text in headers.items() if name in ("traceparent", _HEAD_LENGTH)})
    if isinstance(content_type := event.get("datacontenttype"), str):
        found["content-type"] = content_type
    encoded = event.get("data_base64")
    if not isinstance(encoded, str):
        return found, event.get("data") or b""
    try:
        return found, base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return found, "not base64"


def _text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _usable(identity: str | None) -> str | None:
    return identity if identity and len(identity) <= cloudevents.MAX_ATTRIBUTE_CHARS else None
