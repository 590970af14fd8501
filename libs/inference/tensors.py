"""From JSON values to arrays of a given datatype and back: exact, or refused with a sentence that says where."""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from libs.inference.errors import InvalidInputError
from libs.runner.wire import NUMPY_DTYPES
from schemas.inference import TensorSpec

Array = npt.NDArray[Any]

_EXACT_FLOAT_INTEGER = 2**53
"""Integers up to this one survive a float64."""


def array_from_json(values: Any, datatype: str, what: str) -> Array:
    """Return nested lists of JSON values as an array of ``datatype``.

    Numbers are taken where they are exact: whole floats become integers, integers become floats, ``null`` becomes NaN in floats,
    ``true`` and ``false`` become 1 and 0. Text is never read as a number.

    Parameters
    ----------
    values
        A list, nested or flat; rows of equal length.
    what
        How messages name the values, such as ``input 'x'``.

    Raises
    ------
    InvalidInputError
        A value that the datatype cannot hold, or rows of different lengths.

    Examples
    --------
    >>> array_from_json([[1, 2.0], [3, None]], "FP64", "input 'x'").tolist()
    [[1.0, 2.0], [3.0, nan]]
    >>> array_from_json([1.0, 2], "INT64", "input 'x'").tolist()
    [1, 2]
    """
    if datatype == "BYTES":
        return _bytes_array(values, what)
    try:
        array = np.array(values)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(_ragged(values, what)) from error
    target = NUMPY_DTYPES[datatype]
    if array.size == 0:
        return array.astype(target) if array.dtype.kind in "fiub" else np.empty(array.shape, target)
    return convert(array, target, datatype, what, values)


def convert(array: Array, target: np.dtype[Any], datatype: str, what: str, values: Any = None) -> Array:
    """Convert numbers to another type, exactly, or refuse.

    ``values`` are the JSON values the array was made of, if it was: they are what messages point into.

    Raises
    ------
    InvalidInputError
        A value that the target cannot hold.
    """
    if array.dtype == target:
        return array
    kind = array.dtype.kind
    if kind not in "fiub":
        return _convert_each(array if values is None else values, target, datatype, what)
    if target.kind == "f":
        return _to_floats(array, target, datatype, what)
    if target.kind == "b":
        return _to_booleans(array, datatype, what)
    return _to_integers(array, target, datatype, what, values)


def _to_floats(array: Array, target: np.dtype[Any], datatype: str, what: str) -> Array:
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if target.itemsize < 8 and array.dtype.kind == "f":
        beyond = np.isinf(result) & ~np.isinf(array)
        if beyond.any():
            raise InvalidInputError(f"{what} has {array[beyond].flat[0]!s}, which is beyond the range of {datatype}")
    return result


def _to_booleans(array: Array, datatype: str, what: str) -> Array:
    strange = (array != 0) & (array != 1)
    if strange.any():
        raise InvalidInputError(f"{what} expects {datatype}; {array[strange].flat[0]!s} is neither true nor false")
    return array.astype(np.bool_)


def _to_integers(array: Array, target: np.dtype[Any], datatype: str, what: str, values: Any) -> Array:
    if array.dtype.kind == "b":
        return array.astype(target)
    if array.dtype.kind == "f":
        if values is not None and (np.abs(array) >= _EXACT_FLOAT_INTEGER).any():
            return _convert_each(values, target, datatype, what)
        broken = ~np.isfinite(array) | (array != np.trunc(array))
        if broken.any():
            raise InvalidInputError(f"{what} expects {datatype}; {array[broken].flat[0]!s} is not a whole number")
    limits = np.iinfo(target)
    lowest, highest = array.min(), array.max()
    if int(lowest) < limits.min or int(highest) > limits.max:
        worst = lowest if int(lowest) < limits.min else highest
        raise InvalidInputError(f"{what} has {int(worst)}, which is beyond the range of {datatype}")
    return array.astype(target)


def _convert_each(values: Any, target: np.dtype[Any], datatype: str, what: str) -> Array:
    """Convert element by element: slower, exact for every integer, and able to say which element is wrong."""
    one = {"f": _float, "b": _boolean}.get(target.kind, _integer(target))
    converted = _map_nested(values, lambda value, place: _checked(one, value, place, datatype, what), "")
    try:
        return np.array(converted, dtype=target)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(_ragged(values, what)) from error


def _map_nested(values: Any, function: Callable[[Any, str], Any], place: str) -> Any:
    if isinstance(values, list):
        return [_map_nested(value, function, f"{place}[{index}]") for index, value in enumerate(values)]
    return function(values, place)


def _checked(one: Callable[[Any], Any], value: Any, place: str, datatype: str, what: str) -> Any:
    try:
        return one(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(f"{what} expects {datatype}; element {place} is {show(value)}") from error


def _float(value: Any) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, str | dict):
        raise TypeError
    return float(value)


def _boolean(value: Any) -> bool:
    if value in (0, 1) and not isinstance(value, str):
        return bool(value)
    raise ValueError


def _integer(target: np.dtype[Any]) -> Callable[[Any], int]:
    if target.kind not in "iu":
        return int
    limits = np.iinfo(target)

    def one(value: Any) -> int:
        if isinstance(value, str | dict) or int(value) != value or not limits.min <= value <= limits.max:
            raise ValueError
        return int(value)

    return one


def show(value: Any) -> str:
    """Return a JSON value as a message shows it: its kind and, if short, itself."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return str(value).lower() if isinstance(value, bool) else str(value)[:40]


def _bytes_array(values: Any, what: str) -> Array:
    encoded = _map_nested(values, lambda value, place: _element(value, place, what), "")
    shape = nested_shape(values)
    if shape is None:
        raise InvalidInputError(_ragged(values, what))
    array = np.empty(shape, dtype=object)
    flat = array.reshape(-1)
    for index, element in enumerate(_leaves(encoded)):
        flat[index] = element
    return array


def _element(value: Any, place: str, what: str) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInputError(f"{what}: element {place} is not base64") from error
    raise InvalidInputError(f"{what} expects strings (BYTES); element {place} is {show(value)}")


def _leaves(values: Any) -> list[bytes]:
    if not isinstance(values, list):
        return [values]
    return [leaf for value in values for leaf in _leaves(value)]


def nested_shape(values: Any) -> tuple[int, ...] | None:
    """Return the shape of nested lists, or ``None`` when they are not rectangular."""
    if not isinstance(values, list):
        return ()
    shapes = {nested_shape(value) for value in values}
    if len(shapes) > 1 or None in shapes:
        return None
    inner = shapes.pop() if shapes else ()
    assert inner is not None  # noqa: S101 (excluded above; for the type checker)
    return (len(values), *inner)


def _ragged(values: Any, what: str) -> str:
    if isinstance(values, list) and values:
        first = nested_shape(values[0])
        for index, row in enumerate(values):
            shape = nested_shape(row)
            if shape is None:
                return f"{what}: element [{index}] has rows of different lengths"
            if shape != first:
                return f"{what}: element [0] has {_count(first)}, element [{index}] has {_count(shape)}"
    return f"{what} is not a list of numbers"


def _count(shape: Sequence[int] | None) -> str:
    if not shape:
        return "a single value"
    return f"{shape[0]} values" if len(shape) == 1 else f"shape {list(shape)}"


def has_shape(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Tell whether a shape has the wanted dimensions, -1 standing for any."""
    return len(shape) == len(wanted) and all(size in (got, -1) for got, size in zip(shape, wanted, strict=True))


def check_shape(array: Array, spec: TensorSpec) -> Array:
    """Return the array if it has the shape of the signature.

    Raises
    ------
    InvalidInputError
        Another rank or dimension, or no rows at all.
    """
    if not has_shape(array.shape, spec.shape):
        raise InvalidInputError(f"input '{spec.name}' expects shape {list(spec.shape)}, got {list(array.shape)}")
    if array.size == 0:
        raise InvalidInputError(f"input '{spec.name}' is empty: its shape is {list(array.shape)}")
    return array


def json_ready(array: Array) -> Any:
    """Return an array as a value that orjson writes exactly.

    Floats are widened to float64, so that what JSON carries equals ``float(element)``; NaN and infinities become ``null``; ``BYTES``
    become text, or ``{"b64": …}`` where they are not UTF-8.
    """
    if array.dtype.kind == "O":
        return _map_nested(array.tolist(), lambda value, _: _readable(value), "")
    if array.dtype.kind == "f":
        array = array.astype(np.float64, copy=False)
    return np.ascontiguousarray(array) if array.ndim else array.item()


def _readable(value: Any) -> Any:
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(value).decode("ascii")}
