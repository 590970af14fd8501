"""From JSON values to arrays of a given datatype and back: exact, or refused with a sentence that says where."""

import base64
import binascii
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from libs.inference.errors import InvalidInputError
from libs.runner.wire import NUMPY_DTYPES
from schemas.inference import TensorSpec

Array = npt.NDArray[Any]

MAX_DIMENSIONS = 16
"""Deeper nested lists, and shapes with more dimensions, are refused; models take one to four."""

_PIECE = 4096
"""Values that are looked through at once for one that is no number."""

_CODES = {
    "BOOL": "B",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""Datatype -> code of ``struct``, which takes numbers only and no text, and is twice as fast as ``numpy.array``.

``numpy.array`` must not see a caller's values: among numbers, one long string makes it allocate the string's length for each of them.
"""


def array_from_json(values: Any, datatype: str, what: str, *, may_miss: bool = False) -> Array:
    """Return nested lists of JSON values as an array of ``datatype``.

    Numbers are taken where they are exact: whole floats become integers, integers become floats, ``null`` becomes NaN in floats,
    ``true`` and ``false`` become 1 and 0. Text is never read as a number.

    Parameters
    ----------
    values
        A list, nested or flat; rows of equal length.
    what
        How messages name the values, such as ``input 'x'``.
    may_miss
        Whether ``null`` (and NaN, in forms that know it) is taken among texts, as a missing one: ``None``.

    Raises
    ------
    InvalidInputError
        A value that the datatype cannot hold, rows of different lengths, or lists nested too deeply.

    Examples
    --------
    >>> array_from_json([[1, 2.0], [3, None]], "FP64", "input 'x'").tolist()
    [[1.0, 2.0], [3.0, nan]]
    >>> array_from_json([1.0, 2], "INT64", "input 'x'").tolist()
    [1, 2]
    """
    flat, shape = _flattened(values, what)
    if datatype == "BYTES":
        return _strings(flat, shape, what, values, may_miss)
    if not flat:
        return np.empty(shape, NUMPY_DTYPES[datatype])
    try:
        return _packed(flat, shape, datatype)
    except (struct.error, OverflowError, ValueError):
        return _repaired(flat, shape, datatype, what, values)


def _flattened(values: Any, what: str) -> tuple[list[Any], tuple[int, ...]]:
    """The values of evenly nested lists in row-major order, and the shape."""
    if type(values) is not list:
        raise InvalidInputError(f"{what} is not a list")
    level: list[Any] = values
    shape = [len(level)]
    while level and type(level[0]) is list:
        if len(shape) == MAX_DIMENSIONS:
            raise InvalidInputError(f"{what} is nested deeper than {MAX_DIMENSIONS} lists")
        shape.append(len(level[0]))
        if len(level) == 1:
            level = level[0]
            continue
        if set(map(type, level)) != {list} or len(set(map(len, level))) > 1:
            raise InvalidInputError(_ragged(values, what))
        level = list(chain.from_iterable(level))
    return level, tuple(shape)


def _packed(flat: list[Any], shape: tuple[int, ...], datatype: str) -> Array:
    """Values as an array, when they are numbers that the datatype holds as they are; raises what ``struct`` raises, or ``ValueError``."""
    packed = struct.pack(f"<{len(flat)}{_CODES[datatype]}", *flat)
    if datatype == "BOOL" and max(packed) > 1:
        raise ValueError
    return np.ndarray(shape, NUMPY_DTYPES[datatype], packed)


def _repaired(flat: list[Any], shape: tuple[int, ...], datatype: str, what: str, values: Any) -> Array:
    """Values as an array, where one was no number of the datatype as it stood: null, or a whole number written as a float."""
    repaired = _with_nan(flat) if NUMPY_DTYPES[datatype].kind == "f" else _whole(flat)
    try:
        return _packed(repaired, shape, datatype)
    except (struct.error, OverflowError, ValueError) as error:
        raise InvalidInputError(_misfit(repaired, shape, datatype, what, values)) from error


def _with_nan(flat: list[Any]) -> list[Any]:
    """NaN for null; everything else as it is."""
    nan = float("nan")
    return [nan if value is None else value for value in flat]


def _whole(flat: list[Any]) -> list[Any]:
    """Whole floats as integers; everything else as it is, and all if there is something among it that is no number."""
    if None in flat:
        return flat
    return [int(value) if type(value) is float and value.is_integer() else value for value in flat]


def _misfit(flat: list[Any], shape: tuple[int, ...], datatype: str, what: str, values: Any) -> str:
    """A sentence on the first value that an array of this datatype cannot hold; looked for by pieces, as there may be millions."""
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE]
        try:
            _packed(piece, (len(piece),), datatype)
        except (struct.error, OverflowError, ValueError):
            for index, value in enumerate(piece, start):
                reason = _no_number(value, index, shape, datatype, what, values)
                if reason is not None:
                    return reason
    return f"{what} does not hold numbers of {datatype}"


def _no_number(value: Any, index: int, shape: tuple[int, ...], datatype: str, what: str, values: Any) -> str | None:
    if isinstance(value, list):
        return _ragged(values, what)
    if value is None or isinstance(value, str | dict):
        return f"{what} expects {datatype}; element {_place(index, shape)} is {show(value)}"
    reason = _out_of(datatype, value)
    return None if reason is None else f"{what} {reason}"


def _out_of(datatype: str, value: Any) -> str | None:
    """Why a number is none of a datatype; None if it is one."""
    target = NUMPY_DTYPES[datatype]
    if target.kind == "b":
        return None if value in (0, 1) else f"expects {datatype}; {value} is neither true nor false"
    if target.kind == "f":
        return f"has {value}, which is beyond the range of {datatype}" if abs(value) > float(np.finfo(target).max) else None
    if value != value or value in (float("inf"), float("-inf")) or int(value) != value:
        return f"expects {datatype}; {value} is not a whole number"
    limits = np.iinfo(target)
    return None if limits.min <= value <= limits.max else f"has {int(value)}, which is beyond the range of {datatype}"


def _place(index: int, shape: tuple[int, ...]) -> str:
    return "".join(f"[{part}]" for part in np.unravel_index(index, shape))


def _strings(flat: list[Any], shape: tuple[int, ...], what: str, values: Any, may_miss: bool) -> Array:
    array = np.empty(len(flat), dtype=object)
    try:
        array[:] = [value.encode() for value in flat]
    except (AttributeError, UnicodeEncodeError):
        for index, value in enumerate(flat):
            if isinstance(value, list):
                raise InvalidInputError(_ragged(values, what)) from None
            is_missing = may_miss and (value is None or value != value)
            array[index] = None if is_missing else _element(value, _place(index, shape), what)
    return array if len(shape) == 1 else array.reshape(shape)


def _element(value: Any, place: str, what: str) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInputError(f"{what}: element {place} is not base64") from error
    raise InvalidInputError(f"{what} expects strings (BYTES); element {place} is {show(value)}")


def convert(array: Array, target: np.dtype[Any], datatype: str, what: str) -> Array:
    """Convert numbers to another type, exactly, or refuse; floats are rounded to the nearest of a narrower float.

    Raises
    ------
    InvalidInputError
        A value that the target cannot hold, or text.
    """
    if array.dtype == target:
        return array
    if array.dtype.kind not in "fiub" or target.kind not in "fiub":
        raise InvalidInputError(f"{what} expects {datatype}, and text and numbers are not turned into each other")
    if array.size == 0 or array.dtype.kind == "b":
        return array.astype(target)
    if target.kind == "f":
        return _to_floats(array, target, datatype, what)
    if target.kind == "b":
        return _to_booleans(array, datatype, what)
    return _to_integers(array, target, datatype, what)


def _to_floats(array: Array, target: np.dtype[Any], datatype: str, what: str) -> Array:
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if target.itemsize < array.dtype.itemsize:
        beyond = np.isinf(result) & ~np.isinf(array)
        if beyond.any():
            raise InvalidInputError(f"{what} has {array[beyond].flat[0]!s}, which is beyond the range of {datatype}")
    return result


def _to_booleans(array: Array, datatype: str, what: str) -> Array:
    strange = (array != 0) & (array != 1)
    if strange.any():
        raise InvalidInputError(f"{what} expects {datatype}; {array[strange].flat[0]!s} is neither true nor false")
    return array.astype(np.bool_)


def _to_integers(array: Array, target: np.dtype[Any], datatype: str, what: str) -> Array:
    if array.dtype.kind == "f":
        broken = ~np.isfinite(array) | (array != np.trunc(array))
        if broken.any():
            raise InvalidInputError(f"{what} expects {datatype}; {array[broken].flat[0]!s} is not a whole number")
    limits = np.iinfo(target)
    lowest, highest = int(array.min()), int(array.max())
    if lowest < limits.min or highest > limits.max:
        worst = lowest if lowest < limits.min else highest
        raise InvalidInputError(f"{what} has {worst}, which is beyond the range of {datatype}")
    return array.astype(target)


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


def show_shape(shape: Sequence[Any]) -> str:
    """Return a shape as a message shows it, also one that a caller made up."""
    shown = ", ".join(str(size)[:40] for size in shape[:MAX_DIMENSIONS])
    return f"[{shown}]" if len(shape) <= MAX_DIMENSIONS else f"[{shown}, …] of {len(shape)} dimensions"


def nested_shape(values: Any, depth: int = MAX_DIMENSIONS) -> tuple[int, ...] | None:
    """Return the shape of nested lists, or ``None`` when they are not rectangular.

    Raises
    ------
    InvalidInputError
        They are nested deeper than ``depth``.
    """
    if not isinstance(values, list):
        return ()
    if list not in map(type, values):
        return (len(values),)
    if depth == 1:
        raise InvalidInputError(f"lists are nested deeper than {MAX_DIMENSIONS}")
    shapes = {nested_shape(value, depth - 1) for value in values}
    if len(shapes) > 1 or None in shapes:
        return None
    inner = shapes.pop() if shapes else ()
    assert inner is not None  # noqa: S101 (excluded above; for the type checker)
    return (len(values), *inner)


def _ragged(values: list[Any], what: str) -> str:
    first = nested_shape(values[0]) if values else ()
    for index, row in enumerate(values):
        shape = nested_shape(row)
        if shape is None:
            return f"{what}: element [{index}] has rows of different lengths"
        if shape != first:
            return f"{what}: element [0] has {_count(first)}, element [{index}] has {_count(shape)}"
    return f"{what} is not a list of rows"


def _count(shape: Sequence[int] | None) -> str:
    if not shape:
        return "a single value"
    return f"{shape[0]} values" if len(shape) == 1 else f"shape {list(shape)}"


def has_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether a shape has the wanted dimensions, -1 standing for any."""
    if len(shape) != len(wanted):
        return False
    if shape[1:] == wanted[1:]:
        return not wanted or wanted[0] == -1 or wanted[0] == shape[0]
    return all(size in (got, -1) for got, size in zip(shape, wanted, strict=True))


def check_shape(array: Array, spec: TensorSpec) -> Array:
    """Return the array if it has the shape of the signature.

    Raises
    ------
    InvalidInputError
        Another rank or dimension, or no rows at all.
    """
    if not has_shape(array.shape, spec.shape):
        raise InvalidInputError(f"{spec.label} expects shape {list(spec.shape)}, got {list(array.shape)}")
    if array.size == 0:
        raise InvalidInputError(f"{spec.label} is empty: its shape is {list(array.shape)}")
    return array


def json_ready(array: Array) -> Any:
    """Return an array as a value that orjson writes exactly.

    Floats are widened to float64, so that what JSON carries equals ``float(element)``; NaN and infinities become ``null``; ``BYTES``
    become text, or ``{"b64": …}`` where they are not UTF-8; what is missing is ``null``.
    """
    kind = array.dtype.kind
    if kind == "O":
        return _texts(array)
    if kind == "f" and array.dtype.itemsize < 8:
        array = array.astype(np.float64)
    if array.ndim == 0:
        return array.item()
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _texts(array: Array) -> Any:
    flat = array.reshape(-1)
    texts = np.empty(flat.size, dtype=object)
    texts[:] = [_readable(value) for value in flat.tolist()]
    return texts.reshape(array.shape).tolist()


def _readable(value: Any) -> Any:
    if not isinstance(value, bytes):
        return None if value is None else str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(value).decode("ascii")}
