"""What the JSON bodies of all protocols have in common: objects, names that are given once, and outputs asked for by name."""

import json
from collections.abc import Collection
from itertools import takewhile
from typing import Any

import numpy as np
import orjson

from libs.inference.errors import InvalidInputError, printable
from libs.inference.requests import Groups
from schemas.inference import Signature

MAX_CONTAINERS = 2_000_000
"""Lists and objects of one body: empty ones take two bytes of JSON, and sixty of memory once they are parsed."""

MAX_VALUES = 8_000_000
"""Commas of one body: more values are a matter of seconds in JSON, and of a millisecond as a binary tensor."""

_MOST_NESTED = 32
_MANY_BYTES = 4096
_CHUNK_BYTES = 1 << 20


def parse_object(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Parse a body that must be a JSON object, in which every object gives a name once.

    Raises
    ------
    InvalidInputError
        Empty, not JSON (also NaN, Infinity, numbers beyond float64, and bytes that are not UTF-8), not an object, a name given twice, or
        more than ``MAX_CONTAINERS`` lists and objects or ``MAX_VALUES`` values.
    """
    check_size(body)
    return parse_bounded(body)


def check_size(body: bytes | bytearray | memoryview) -> None:
    """Refuse a body that would be too much to parse.

    Raises
    ------
    InvalidInputError
        Empty, or more than ``MAX_CONTAINERS`` lists and objects or ``MAX_VALUES`` values.
    """
    if not body:
        raise InvalidInputError("the request body is empty")
    if len(body) > MAX_CONTAINERS and _count(body, b"[") + _count(body, b"{") > MAX_CONTAINERS:
        raise InvalidInputError(f"the request body has more than {MAX_CONTAINERS} lists and objects")
    if len(body) > MAX_VALUES and _count(body, b",") > MAX_VALUES:
        raise InvalidInputError(f"the request body has more than {MAX_VALUES} values; send so many as a binary tensor (V2)")


def parse_bounded(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Parse as ``parse_object`` does a body whose size was checked already.

    Raises
    ------
    InvalidInputError
        It is not a JSON object, or gives a name twice.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInputError(f"the request body is not valid JSON: {error}") from error
    if type(document) is not dict:
        raise InvalidInputError("the request body must be a JSON object")
    colons = _count(body, b":")  # in JSON, one for each name that is given, and those within strings
    if colons != len(document) and colons != _names(document, _MOST_NESTED):
        _refuse_duplicates(document, body, colons)
    return document


def _count(body: bytes | bytearray | memoryview, character: bytes) -> int:
    """How often an ASCII character is in a text."""
    if len(body) < _MANY_BYTES and not isinstance(body, memoryview):
        return body.count(character)
    values, code = np.frombuffer(body, np.uint8), character[0]
    return sum(int(np.count_nonzero(values[start : start + _CHUNK_BYTES] == code)) for start in range(0, values.size, _CHUNK_BYTES))


def _refuse_duplicates(document: dict[str, Any], body: bytes | bytearray | memoryview, colons: int) -> None:
    """Raise if an object in ``body``, which was parsed to ``document``, gives a name twice; the parser keeps the last and says nothing.

    With as many colons as names there are no duplicates, and nobody comes here. Else the colons within strings have to be told from those
    after names, by writing the document again. Only what then still differs (or could, by escaped colons) is parsed anew, slowly.
    """
    try:
        if colons == _count(orjson.dumps(document), b":") and b"\\u003" not in bytes(body):
            return
    except orjson.JSONEncodeError as error:
        raise InvalidInputError("the request body is nested too deeply") from error
    json.loads(bytes(body), object_pairs_hook=_unique)


def _names(value: Any, depth: int) -> int:
    """Names in an object and what it holds; those beyond ``depth``, or in lists that do not begin with an object, are not found."""
    if depth == 0:
        return 0
    if type(value) is dict:
        count = len(value)
        for member in value.values():
            if type(member) is dict or (type(member) is list and member and type(member[0]) is dict):
                count += _names(member, depth - 1)
        return count
    return sum(_names(item, depth - 1) for item in value if type(item) is dict)


def _unique(pairs: list[tuple[str, Any]]) -> None:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise InvalidInputError(f"the request body gives '{printable(name, 80)}' twice in one object")
        names.add(name)


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
            raise InvalidInputError(f"the model has no output '{printable(name, 80)}'; it has {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def every_output(signature: Signature) -> tuple[str, ...] | None:
    """What a V2 request asks for that names no outputs: all of them; ``None``, as in V1, where the model has one."""
    return tuple([spec.name for spec in signature.outputs]) if len(signature.outputs) > 1 else None


def requested_groups(names: Any, signature: Signature) -> tuple[tuple[str, ...] | None, Groups]:
    """Check the names of requested outputs, where ``predict_proba`` may stand for ``predict_proba_0``, ``predict_proba_1`` …

    Returns the outputs, and the names with what each stands for if one of them stands for such targets.

    Raises
    ------
    InvalidInputError
        Not a list of names, or a name that the model does not have.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return requested_outputs(names, signature), ()
    known = {spec.name for spec in signature.outputs}
    groups = {name: (name,) if name in known else _targets(name, known) or (name,) for name in names}
    outputs = requested_outputs([output for members in groups.values() for output in members], signature)
    is_grouped = any(members != (name,) for name, members in groups.items())
    return outputs, tuple(groups.items()) if is_grouped else ()


def _targets(name: str, known: Collection[str]) -> tuple[str, ...]:
    """The outputs of a method with several targets, which are numbered from 0 on."""
    return tuple(takewhile(known.__contains__, (f"{name}_{number}" for number in range(len(known)))))


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
