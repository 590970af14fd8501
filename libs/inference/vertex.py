"""The bodies of Vertex AI's online prediction: ``{"instances": […], "parameters"}`` in, ``{"predictions": […], …}`` out.

Google's client library carries values in ``google.protobuf.Value``: every number arrives as a float, NaN and infinities cannot. Whole
floats become integers where the model takes integers.

References
----------
Vertex AI REST reference, ``projects.locations.endpoints.predict`` and ``.rawPredict``; ``google.api.HttpBody``.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import orjson

from libs.inference import v1
from libs.inference.bodies import parse_object
from libs.inference.errors import InvalidInputError
from libs.inference.requests import Groups, InferRequest, InferResponse
from schemas.inference import Signature


def parse(body: bytes | bytearray | memoryview, signature: Signature) -> InferRequest:
    """Read the body of ``:predict``.

    Raises
    ------
    InvalidInputError
        The body is malformed or does not fit the signature.
    """
    document = parse_object(body)
    if "instances" not in document:
        raise InvalidInputError("the request needs 'instances'")
    return v1.from_document({"instances": document["instances"], "parameters": document.get("parameters")}, signature)


def render(response: InferResponse, about: Mapping[str, str], groups: Groups = ()) -> bytes:
    """Write the answer of ``:predict``: one prediction for each instance, then ``about``, the fields that name who answered.

    NaN and infinities are ``null``. ``predictions`` is always a list: outputs that cannot be put into rows are its one element.
    ``groups`` are those of the request, as in V1.
    """
    predictions = v1.predictions(response, groups)
    if isinstance(predictions, dict) or not hasattr(predictions, "__len__"):
        predictions = [predictions]
    return orjson.dumps({"predictions": predictions, **about}, option=orjson.OPT_SERIALIZE_NUMPY)


def read_http_body(document: Mapping[str, Any]) -> tuple[str | None, bytes] | None:
    """Content type and content of a ``google.api.HttpBody``, the form in which Google's REST transport wraps ``:rawPredict``.

    None: the document is a body of its own.

    Raises
    ------
    InvalidInputError
        It is meant as an ``HttpBody`` and malformed.

    Examples
    --------
    >>> read_http_body({"httpBody": {"contentType": "text/csv", "data": "MSwyCg=="}})
    ('text/csv', b'1,2\\n')
    """
    wrapped = document.get("httpBody", document.get("http_body"))
    if wrapped is None:
        return None
    if not isinstance(wrapped, dict):
        raise InvalidInputError("'httpBody' must be an object with 'contentType' and 'data'")
    content_type = wrapped.get("contentType", wrapped.get("content_type"))
    data = wrapped.get("data", "")
    if not isinstance(content_type, str | None) or not isinstance(data, str):
        raise InvalidInputError("'contentType' and 'data' of 'httpBody' must be strings")
    try:
        return content_type or None, base64.b64decode(_standard(data), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError("'data' of 'httpBody' is not base64") from error


def _standard(data: str) -> str:
    """Base64 in the standard alphabet with padding; JSON's form of protobuf may have either alphabet and leave the padding out."""
    data = data.replace("-", "+").replace("_", "/").rstrip("=")
    return data + "=" * (-len(data) % 4)


def render_http_body(content_type: str, body: bytes) -> bytes:
    """Write a ``google.api.HttpBody``."""
    return orjson.dumps({"contentType": content_type, "data": base64.b64encode(body).decode("ascii")})
