"""What V1 and V2 bodies have in common: JSON objects, and outputs asked for by name."""

from typing import Any

import orjson

from libs.inference.errors import InvalidInputError
from schemas.inference import Signature


def parse_object(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Parse a body that must be a JSON object.

    Raises
    ------
    InvalidInputError
        Not JSON, or not an object.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInputError(f"the request body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInputError("the request body must be a JSON object")
    return document


def requested_outputs(names: Any, signature: Signature) -> tuple[str, ...] | None:
    """Check the names of requested outputs; nothing requested is ``None``.

    Raises
    ------
    InvalidInputError
        Not a list of names, or a name that the model does not have.
    """
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInputError("'outputs' must be a list of output names")
    known = [spec.name for spec in signature.outputs]
    for name in names:
        if name not in known:
            raise InvalidInputError(f"the model has no output '{name}'; it has {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def object_or_empty(value: Any, what: str) -> dict[str, Any]:
    """Return ``value`` if it is an object, ``{}`` if it is absent.

    Raises
    ------
    InvalidInputError
        Something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidInputError(f"'{what}' must be a JSON object")
    return value
