"""What a record of a requests topic asks. No I/O.

A request is a body of an inference protocol: the value of a plain record or of a CloudEvent in binary mode, or the data of a structured
one. The content type says which: JSON is V1 (``instances``) or V2 (``inputs``), told apart by what is in it; V2 with binary tensors is JSON
with the header ``inference-header-content-length``; V2 in protobuf (``ModelInferRequest``) has a content type of its own.

References
----------
CloudEvents 1.0.2, Kafka Protocol Binding; extensions "dataref" (claim check) and "distributed tracing".
W3C Trace Context, sections 3.2 and 3.3.
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
from services.streaming.log import Header, Taken

REFERENCE = "sha256:"
"""How a ``dataref`` names an artifact of the platform's store."""

PROTOBUF = frozenset(
    {
        v2_grpc.CONTENT_TYPE.encode(),
        b"application/x-protobuf",
        b"application/protobuf",
        b"application/vnd.google.protobuf",
        b"application/grpc+proto",
        b"application/grpc",
    }
)
"""Content types of a ``ModelInferRequest``."""

_MAX_TRACESTATE_BYTES = 512
_HEAD_LENGTH = "inference-header-content-length"
_JSON = b"application/json"
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
    id, id_bytes
        The CloudEvent's id, else the key, else the record's place in the log.
    result_id
        UUIDv5 of the event's source and id, or of the record's place: the same whenever the request is answered.
    chance
        A number in [0, 1) that follows from the same, by which a traffic split chooses: a repeat is answered by the same version.
    form
        None until JSON has been looked into.
    dataref
        Where the body is, if it is not in the record.
    traceparent
        The trace context of the record, else that of its event (CloudEvents' extension "distributed tracing"); a span of ours takes
        its place.
    tracing
        What else of a trace context is carried to the result: the ``tracestate``, and the attributes of the extension as they came.
    """

    __slots__ = (
        "_data",
        "_head_length",
        "chance",
        "content_type",
        "correlation_bytes",
        "dataref",
        "endpoint_name",
        "form",
        "id",
        "id_bytes",
        "result_id",
        "taken",
        "traceparent",
        "tracing",
    )

    def __init__(self, taken: Taken, topic: str, endpoint_name: str) -> None:
        self.taken = taken
        self.endpoint_name = endpoint_name
        headers = taken.headers
        # The first of a name counts.
        envelope: dict[str, bytes | None] = dict(reversed(headers)) if headers else {}
        self._data: Any = None
        identity = envelope.get("ce_id")
        if identity is None and taken.value and b"specversion" in taken.value:
            self._data = _structured(taken.value, envelope)
            identity = envelope.get("ce_id")
        self.content_type = content_type = envelope.get("content-type")
        self._head_length = envelope.get(_HEAD_LENGTH)
        self.form = None if content_type == _JSON and self._head_length is None else _form(content_type, self._head_length)
        self.dataref = _text(envelope.get("ce_dataref"))
        own, extension = envelope.get("traceparent") or None, envelope.get("ce_traceparent")
        self.traceparent = None if own is None else telemetry.checked_traceparent(_text(own))
        self.tracing = () if own is extension is None else self._trace_context(own, extension, envelope)
        event_id = _usable(identity)
        if event_id is not None and identity is not None:
            self.id, self.id_bytes = event_id, identity
            cause = b"%b\n%b" % (envelope.get("ce_source") or b"", identity)
        else:
            place = f"{topic}-{taken.partition}-{taken.offset}"
            cause = place.encode()
            self.id = _key(taken.key) or place
            self.id_bytes = self.id.encode()
        correlation = envelope.get("ce_correlationid")
        self.correlation_bytes = self.id_bytes if correlation is None or _usable(correlation) is None else correlation
        self.result_id, self.chance = _derived(cause)

    def _trace_context(self, own: bytes | None, extension: bytes | None, envelope: Mapping[str, bytes | None]) -> tuple[Header, ...]:
        carried: list[Header] = []
        began = telemetry.checked_traceparent(_text(extension))
        if own is None:
            self.traceparent = began
        if self.traceparent is not None and (state := _tracestate(envelope.get("ce_tracestate" if own is None else "tracestate"))):
            carried.append(("tracestate", state))
        if began is not None:
            carried.append(("ce_traceparent", began.encode()))
            if state := _tracestate(envelope.get("ce_tracestate")):
                carried.append(("ce_tracestate", state))
        return tuple(carried)

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
            raise InvalidMessage(f"the header {_HEAD_LENGTH} must be a number of bytes, got {_text(self._head_length)!r}"[:200])
        return v2.parse(value, signature, int(self._head_length))


def result_id(cause: str) -> str:
    """The id of the result of what ``cause`` names: ``uuid.uuid5``, in a quarter of its time."""
    return _derived(cause.encode())[0]


def _derived(cause: bytes) -> tuple[str, float]:
    digest = hashlib.sha1(_RESULT_NAMESPACE + cause, usedforsecurity=False).hexdigest()
    identity = f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{_VARIANT[digest[16]]}{digest[17:20]}-{digest[20:32]}"
    return identity, int(digest[32:], 16) / 2**32


def _form(content_type: bytes | None, head_length: bytes | None) -> Form | None:
    """What the headers say of the form; None: it is JSON."""
    if content_type is not None and content_type.partition(b";")[0].strip().lower() in PROTOBUF:
        return Form.PROTOBUF
    return None if head_length is None else Form.BINARY


def _is_v2(document: Mapping[str, Any]) -> bool:
    if "instances" in document:
        return False
    inputs = document.get("inputs")
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], dict) and "datatype" in inputs[0]


def _structured(value: bytes, envelope: dict[str, bytes | None]) -> Any:
    """The data of a structured event, whose attributes are put into the envelope; None if the record is none."""
    try:
        event = orjson.loads(value)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("specversion"), str) or "type" not in event:
        return None
    for name, attribute in _ATTRIBUTES.items():
        if isinstance(text := event.get(attribute), str):
            envelope[name] = text.encode()
    encoded = event.get("data_base64")
    if not isinstance(encoded, str):
        return event.get("data") or b""
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return "not base64"


_ATTRIBUTES = {
    "ce_id": "id",
    "ce_source": "source",
    "ce_correlationid": "correlationid",
    "ce_dataref": "dataref",
    "ce_traceparent": "traceparent",
    "ce_tracestate": "tracestate",
    "content-type": "datacontenttype",
}
"""Headers of the binary mode -> attributes of the structured one."""


def _text(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _tracestate(value: bytes | None) -> bytes | None:
    """What vendors added to a trace context, if it is text and no longer than has to be carried."""
    return value if value and len(value) <= _MAX_TRACESTATE_BYTES and value.isascii() else None


def _usable(value: bytes | None) -> str | None:
    """The text of an id, if there is one and it is not too long to travel on."""
    text = _text(value) if value else None
    return text if text is not None and len(text) <= cloudevents.MAX_ATTRIBUTE_CHARS else None


def _key(key: bytes | None) -> str | None:
    text = key.decode("utf-8", "replace") if key else ""
    return text if 0 < len(text) <= cloudevents.MAX_ATTRIBUTE_CHARS else None
