"""CloudEvents on a predict route: an event in, an event out, in the mode that it came in.

References
----------
CloudEvents 1.0, "HTTP Protocol Binding"; KServe, "CloudEvents" (the type and source of answers).
"""

import base64
import binascii
import uuid
from datetime import UTC, datetime
from typing import Any

import orjson

from libs.errors import InvalidArgumentError
from libs.inference.bodies import parse_object
from services.gateway.exchange import Headers, Outgoing

STRUCTURED = b"application/cloudevents+json"
_REQUIRED = ("id", "source", "type")
_TYPE = "io.kserve.inference.response"
_NAMESPACE = uuid.UUID("c8a9f39e-6b0f-4d0e-9a2b-5d3c5a0f7d11")


def is_structured(headers: Headers) -> bool:
    """Whether the body is an event with the data inside it."""
    content_type = headers.get(b"content-type")
    return content_type is not None and content_type[: len(STRUCTURED)].lower() == STRUCTURED


def binary_event(headers: Headers) -> dict[str, str] | None:
    """The attributes of an event in binary mode, which are headers; None when there are none.

    Raises
    ------
    InvalidArgumentError
        A required attribute is missing, or the version of CloudEvents is not 1.
    """
    if b"ce-specversion" not in headers:
        return None
    names = ("specversion", *_REQUIRED)
    attributes = {name: headers[f"ce-{name}".encode()].decode("latin-1") for name in names if f"ce-{name}".encode() in headers}
    return _checked(attributes, "ce-")


def structured_event(body: bytes | bytearray) -> tuple[dict[str, str], dict[str, Any]]:
    """The attributes and the data of an event in structured mode.

    Raises
    ------
    InvalidArgumentError
        It is no event, or its data is no JSON object.
    """
    event = parse_object(body)
    attributes = _checked({name: event.get(name) for name in ("specversion", *_REQUIRED)}, "")
    if "data_base64" in event:
        return attributes, parse_object(_decoded(event["data_base64"]))
    data = event.get("data")
    if not isinstance(data, dict):
        raise InvalidArgumentError("the CloudEvent's data must be a JSON object")
    return attributes, data


def _decoded(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InvalidArgumentError("the CloudEvent's data_base64 is not base64") from error


def _checked(attributes: dict[str, Any], prefix: str) -> dict[str, str]:
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise InvalidArgumentError(f"the CloudEvent has no {prefix}{name}")
    version = attributes.get("specversion")
    if not isinstance(version, str) or version.partition(".")[0] not in ("0", "1"):
        raise InvalidArgumentError(f"the CloudEvent has no {prefix}specversion that is known; 1.0 is")
    return attributes


def binary_answer(answer: Outgoing, request: dict[str, str], endpoint_name: str) -> Outgoing:
    """The answer as an event in binary mode."""
    attributes = _attributes(request, endpoint_name)
    headers = tuple((f"ce-{name}".encode(), value.encode("latin-1", "replace")) for name, value in attributes.items())
    return Outgoing(answer.body, answer.status, answer.media_type, (*answer.headers, *headers))


def structured_answer(answer: Outgoing, request: dict[str, str], endpoint_name: str) -> Outgoing:
    """The answer as an event in structured mode."""
    event = {**_attributes(request, endpoint_name), "datacontenttype": "application/json", "data": orjson.Fragment(answer.body)}
    return Outgoing(orjson.dumps(event), answer.status, STRUCTURED, answer.headers)


def _attributes(request: dict[str, str], endpoint_name: str) -> dict[str, str]:
    """The answer's own id follows from the request's, so that the same event is answered by the same event."""
    return {
        "specversion": "1.0",
        "id": str(uuid.uuid5(_NAMESPACE, f"{request['source']}\n{request['id']}")),
        "source": f"io.kserve.inference.{endpoint_name}",
        "type": _TYPE,
        "time": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "correlationid": request["id"],
    }
