"""Frames and tensors as they cross the socket between the platform and a runner.

A frame is ``<u32 meta_len><u32 head_len><u64 tail_len>`` (little-endian), then *meta* (our JSON), *head* (the JSON of
an Open Inference Protocol request or response) and *tail* (its raw tensors in order). Tensors use the protocol's
binary layout: little-endian, row-major; an element of ``BYTES`` is ``<u32 length><bytes>``. In memory a ``BYTES``
tensor is an object array of ``bytes``. Beyond the protocol, an element may be missing: ``None`` in memory, the length
``MISSING`` without bytes on the wire; only who asks for it writes or reads that.

A head says names, datatypes, shapes and sizes and nothing that changes from one request to the next, so requests of
equal shapes have equal heads, and both sides remember what a head means.

The first frame of a connection is ``hello``; nothing else is read before it was accepted. *meta* of what a client says:

======================= ==========================================================================================
``op``                  beside it
======================= ==========================================================================================
``hello``               ``token``
``infer``               ``timeout_ms`` (whole milliseconds from when the runner reads the frame; a request that it
                        cannot begin in that time is answered ``expired``), ``traceparent``: both may be absent
``cancel``              ``id`` is that of an earlier request: if it has not begun it is dropped; never answered
``ping``, ``metadata``,
``stop``                nothing
======================= ==========================================================================================

Each has an ``id`` (integer), which its answer repeats. An answer has ``ok``; when that is false, ``error`` with
``kind`` (``invalid_input``, ``model_error``, ``expired``, ``stopping``, ``unauthenticated`` or ``protocol``) and
``message``. What ``infer`` is answered has ``model_s``, the seconds inside the model (0 when it was not asked), and
``span`` when the trace is sampled.

Standard library and NumPy only, in Python 3.9 syntax: the runner and the platform import this same module.

References
----------
Open Inference Protocol, "Binary tensor data extension".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Union

import numpy as np

PREFIX = struct.Struct("<IIQ")
META_LIMIT_BYTES = 64 * 1024
HEAD_LIMIT_BYTES = 64 * 1024 * 1024
TAIL_LIMIT_BYTES = 1024 * 1024 * 1024
REMEMBERED_HEADS = 1024
"""How many heads each side remembers the meaning of, at most."""

REMEMBERED_HEAD_BYTES = 4096
"""Longer heads are not remembered."""

Buffer = Union[bytes, bytearray, memoryview]
Arrays = dict[str, "np.ndarray[Any, Any]"]
Rows = Union["np.ndarray[Any, Any]", "list[np.ndarray[Any, Any]]"]
"""An array, or the arrays whose rows follow one another in it; so written, large ones are not copied."""

MISSING = 0xFFFFFFFF
"""Length of an element of ``BYTES`` that is missing; no bytes follow it."""

_LENGTH = struct.Struct("<I")
_MISSING = _LENGTH.pack(MISSING)
_JOIN_BELOW_BYTES = 64 * 1024
_LIMITS = (META_LIMIT_BYTES, HEAD_LIMIT_BYTES, TAIL_LIMIT_BYTES)
_STRANGERS_LIMITS = (4096, 0, 0)


class WireError(ValueError):
    """The bytes are not a frame or not the tensors that their description says."""


NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("O"),
}
"""Datatype of the protocol -> NumPy dtype. BF16 is absent: NumPy has no such type."""

_DATATYPES = {(dtype.kind, dtype.itemsize): name for name, dtype in NUMPY_DTYPES.items()}
_RAW_DATATYPES = {dtype: name for name, dtype in NUMPY_DTYPES.items() if name != "BYTES"}
"""Of arrays whose memory is what crosses the socket."""

_scan_json = json.JSONDecoder().raw_decode
_encode_json = json.JSONEncoder(separators=(",", ":")).encode


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a NumPy dtype; strings and objects are ``BYTES``.

    Raises
    ------
    WireError
        The protocol has no such type (dates, complex numbers, records).
    """
    if dtype.kind in "OUS":
        return "BYTES"
    name = _DATATYPES.get((dtype.kind, dtype.itemsize))
    if name is None:
        raise WireError(f"arrays of {dtype} have no Open Inference Protocol datatype")
    return name


class Frame(NamedTuple):
    """One message. ``tail`` is writable memory of its own."""

    meta: dict[str, Any]
    head: bytes
    tail: bytearray


class FrameReader:
    """Cuts a stream of chunks into frames.

    Parameters
    ----------
    trusted
        Until the peer has proved who it is, only small frames are taken, so that a stranger cannot make us allocate.
    loads
        Parses the meta part; raises ``ValueError``.
    """

    def __init__(self, trusted: bool = True, loads: Callable[[bytes], Any] | None = None) -> None:
        self.trusted = trusted
        self._loads = loads or loads_json
        self._prefix = bytearray()
        self._front = bytearray()
        self._tail = bytearray()
        self._meta_length = 0
        self._filled = -1

    def feed(self, data: bytes) -> list[Frame]:
        """Take the next chunk and return the frames that are complete with it.

        Raises
        ------
        WireError
            A length is beyond its limit or the meta part is not a JSON object; the stream cannot be read further.
        """
        frames: list[Frame] = []
        position = self._cut(data, frames) if self._filled < 0 and not self._prefix else 0
        if position < len(data):
            self._feed_slowly(memoryview(data)[position:], frames)
        return frames

    @property
    def room(self) -> memoryview | None:
        """Where the rest of a half-read tail belongs, so that it can be received in its place; None when nothing is."""
        start = self._filled - len(self._front)
        return memoryview(self._tail)[start:] if self._filled >= 0 and start >= 0 else None

    def fill(self, size: int) -> list[Frame]:
        """Count in ``size`` bytes that were received into ``room``, and return the frame if that was the rest of it."""
        self._filled += size
        return [self._finish()] if self._filled == len(self._front) + len(self._tail) else []

    def _cut(self, data: bytes, frames: list[Frame]) -> int:
        """Take the frames that a chunk has whole, and return where they end."""
        position, end = 0, len(data)
        while end - position >= PREFIX.size:
            lengths = PREFIX.unpack_from(data, position)
            head_begin = position + PREFIX.size + lengths[0]
            tail_begin = head_begin + lengths[1]
            tail_end = tail_begin + lengths[2]
            if tail_end > end:
                break
            self._check(*lengths)
            meta = self._parse(data[position + PREFIX.size : head_begin])
            frames.append(Frame(meta, data[head_begin:tail_begin], bytearray(data[tail_begin:tail_end])))
            position = tail_end
        return position

    def _check(self, meta_length: int, head_length: int, tail_length: int) -> None:
        limits = _LIMITS if self.trusted else _STRANGERS_LIMITS
        if meta_length > limits[0] or head_length > limits[1] or tail_length > limits[2]:
            for name, length, limit in zip(("meta", "head", "tail"), (meta_length, head_length, tail_length), limits):
                if length > limit:
                    raise WireError(f"a frame's {name} part has {length} bytes; at most {limit} are taken")
        if meta_length == 0:
            raise WireError("a frame has no meta part")

    def _feed_slowly(self, view: memoryview, frames: list[Frame]) -> None:
        while view:
            if self._filled < 0:
                missing = PREFIX.size - len(self._prefix)
                self._prefix += view[:missing]
                view = view[missing:]
                if len(self._prefix) < PREFIX.size:
                    break
                self._begin()
            view = self._fill(view)
            if self._filled == len(self._front) + len(self._tail):
                frames.append(self._finish())

    def _begin(self) -> None:
        meta_length, head_length, tail_length = PREFIX.unpack(self._prefix)
        self._prefix.clear()
        self._check(meta_length, head_length, tail_length)
        self._meta_length = meta_length
        self._front = bytearray(meta_length + head_length)
        self._tail = bytearray(tail_length)
        self._filled = 0

    def _fill(self, view: memoryview) -> memoryview:
        """Copy from ``view`` into the parts of the frame and return what is left over."""
        front_missing = len(self._front) - self._filled
        if front_missing > 0:
            chunk = view[:front_missing]
            self._front[self._filled : self._filled + len(chunk)] = chunk
            self._filled += len(chunk)
            view = view[len(chunk) :]
        start = self._filled - len(self._front)
        if start >= 0:
            chunk = view[: len(self._tail) - start]
            self._tail[start : start + len(chunk)] = chunk
            self._filled += len(chunk)
            view = view[len(chunk) :]
        return view

    def _finish(self) -> Frame:
        self._filled = -1
        meta = self._parse(bytes(self._front[: self._meta_length]))
        tail, self._tail = self._tail, bytearray()
        return Frame(meta, bytes(self._front[self._meta_length :]), tail)

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            value = self._loads(data)
        except (ValueError, RecursionError) as error:
            raise WireError("the meta part of a frame is not JSON") from error
        if not isinstance(value, dict):
            raise WireError("the meta part of a frame is not a JSON object")
        return value


def loads_json(data: bytes) -> Any:
    """Parse JSON; much faster than ``json.loads`` for small texts. Raises ``ValueError``; white space before the value is an error too."""
    text = data.decode()
    value, end = _scan_json(text)
    return value if end == len(text) else json.loads(text)


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises
    ------
    WireError
        The text is not JSON, or not an object.
    """
    try:
        value = loads_json(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the {what} part of a frame is not JSON") from error
    if not isinstance(value, dict):
        raise WireError(f"the {what} part of a frame is not a JSON object")
    return value


def encode_json(value: Any) -> bytes:
    """Return JSON without spaces; for what is not worth remembering."""
    return _encode_json(value).encode()


def encode_frame(meta: Mapping[str, Any], head: bytes = b"", tail: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return a frame as buffers to be written in order; small frames are one buffer, large tensors are not copied."""
    return join_frame(encode_json(meta), head, tail)


def join_frame(meta: bytes, head: bytes = b"", tail: Sequence[Buffer] = ()) -> list[Buffer]:
    """As ``encode_frame``, for a meta part that is encoded already."""
    tail_length = sum(map(len, tail))
    prefix = PREFIX.pack(len(meta), len(head), tail_length)
    if tail_length <= _JOIN_BELOW_BYTES:
        return [b"".join((prefix, meta, head, *tail))]
    return [b"".join((prefix, meta, head)), *tail]


class TensorSpec(NamedTuple):
    """What a head says of a tensor; ``size_bytes`` is its part of the tail."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size_bytes: int

    def describe(self) -> dict[str, Any]:
        """Return it as the Open Inference Protocol writes it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "datatype": self.datatype,
            "parameters": {"binary_data_size": self.size_bytes},
        }


def encode_tensor(name: str, array: np.ndarray[Any, Any], *, may_miss: bool = False) -> tuple[dict[str, Any], Buffer]:
    """Return a tensor's description for the JSON head, and its bytes; ``may_miss``: elements of ``BYTES`` may be missing.

    Raises
    ------
    WireError
        The array's type has no datatype in the protocol, or an element is missing that may not be.
    """
    spec, data = _encode(name, array, may_miss)
    return spec.describe(), data


def _encode(name: str, array: np.ndarray[Any, Any], may_miss: bool = True) -> tuple[TensorSpec, Buffer]:
    datatype = _RAW_DATATYPES.get(array.dtype)
    data: Buffer
    if datatype is not None and array.nbytes <= _JOIN_BELOW_BYTES:
        data = array.tobytes()
    else:
        datatype = datatype or datatype_of(array.dtype)
        data = _encode_elements(name, array, may_miss) if datatype == "BYTES" else _memory(array, NUMPY_DTYPES[datatype])
    return TensorSpec(name, datatype, array.shape, len(data)), data


def _memory(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> Buffer:
    if array.size == 0:
        return b""
    return np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data


def _encode_elements(name: str, array: np.ndarray[Any, Any], may_miss: bool) -> bytes:
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        if isinstance(element, bytes):
            encoded = element
        elif is_missing(element):
            if not may_miss:
                raise WireError(f"tensor '{name}' has a missing element, which its binary form cannot hold")
            parts.append(_MISSING)
            continue
        else:
            encoded = str(element).encode("utf-8", "surrogateescape")
        parts.append(_LENGTH.pack(len(encoded)))
        parts.append(encoded)
    return b"".join(parts)


def is_missing(element: Any) -> bool:
    """Tell whether an element of an object array stands for a missing value: None, NaN, or what pandas has for them."""
    return element is None or (isinstance(element, float) and element != element) or type(element).__name__ in ("NAType", "NaTType")


def encode_tensors(arrays: Mapping[str, Rows]) -> tuple[tuple[TensorSpec, ...], list[Buffer]]:
    """Encode named arrays in their order, with what is missing in them; what comes first can be the key of a remembered head."""
    specs: list[TensorSpec] = []
    buffers: list[Buffer] = []
    for name, rows in arrays.items():
        pieces = [_encode(name, piece) for piece in (rows if isinstance(rows, list) else (rows,))]
        buffers += [data for _, data in pieces]
        specs.append(pieces[0][0] if len(pieces) == 1 else _spec_of_all([spec for spec, _ in pieces]))
    return tuple(specs), buffers


def _spec_of_all(pieces: Sequence[TensorSpec]) -> TensorSpec:
    """The tensor whose rows are those of the pieces, one after the other."""
    first = pieces[0]
    shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
    return TensorSpec(first.name, first.datatype, shape, sum(piece.size_bytes for piece in pieces))


def describe_tensors(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """Return the list ``inputs`` or ``outputs`` of a head."""
    return [spec.describe() for spec in specs]


def read_descriptions(descriptions: Iterable[Any]) -> tuple[TensorSpec, ...]:
    """Check the list ``inputs`` or ``outputs`` of a head as far as that needs no tail.

    Raises
    ------
    WireError
        A description is malformed, its size and shape do not agree, or a name occurs twice.
    """
    specs: dict[str, TensorSpec] = {}
    for description in descriptions:
        spec = _read_description(description)
        if spec.name in specs:
            raise WireError(f"tensor '{spec.name}' occurs twice")
        specs[spec.name] = spec
    return tuple(specs.values())


def _read_description(description: Any) -> TensorSpec:
    if not isinstance(description, dict):
        raise WireError("a tensor's description is not an object")
    name = description.get("name")
    if not isinstance(name, str) or not name:
        raise WireError("a tensor has no name")
    datatype = description.get("datatype")
    if not isinstance(datatype, str) or datatype not in NUMPY_DTYPES:
        raise WireError(f"tensor '{name}' has datatype {datatype!r}, which is not supported")
    shape = description.get("shape")
    if not isinstance(shape, list) or not all(_is_count(dimension) for dimension in shape):
        raise WireError(f"tensor '{name}' needs a shape of non-negative integers, got {shape!r}")
    parameters = description.get("parameters")
    size: Any = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if not _is_count(size):
        raise WireError(f"tensor '{name}' has no binary_data_size")
    if datatype != "BYTES":
        _check_size(name, datatype, shape, size)
    return TensorSpec(name, datatype, tuple(shape), size)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def decode_tensors(specs: Iterable[TensorSpec], tail: Buffer, may_miss: Container[str] | None = ()) -> Arrays:
    """Return the named arrays that ``specs`` cut out of ``tail``, without copying when they are aligned.

    Parameters
    ----------
    may_miss
        Names of the tensors whose elements may be missing; None: all.

    Raises
    ------
    WireError
        The sizes and the bytes do not agree, or an element is missing that may not be.
    """
    arrays: Arrays = {}
    position = 0
    for name, datatype, shape, size_bytes in specs:
        if position + size_bytes > len(tail):
            raise WireError(f"tensor '{name}' announces {size_bytes} bytes but only {len(tail) - position} are left")
        if datatype == "BYTES":
            raw = bytes(memoryview(tail)[position : position + size_bytes])
            arrays[name] = _decode_elements(name, shape, raw, may_miss is None or name in may_miss)
        else:
            arrays[name] = _view(name, datatype, shape, tail, position)
        position += size_bytes
    if position != len(tail):
        raise WireError(f"{len(tail) - position} bytes follow the last tensor")
    return arrays


def decode_tensor(name: str, datatype: str, shape: Sequence[int], data: memoryview, *, may_miss: bool = False) -> np.ndarray[Any, Any]:
    """Return one tensor; ``shape`` has been checked to be non-negative integers.

    Raises
    ------
    WireError
        The number of bytes does not agree with datatype and shape, or an element is missing although ``may_miss`` is false.
    """
    if datatype == "BYTES":
        return _decode_elements(name, shape, bytes(data), may_miss)
    _check_size(name, datatype, shape, len(data))
    return _view(name, datatype, shape, data, 0)


def _check_size(name: str, datatype: str, shape: Sequence[int], size_bytes: int) -> None:
    taken = math.prod(shape) * NUMPY_DTYPES[datatype].itemsize
    if taken != size_bytes:
        raise WireError(f"tensor '{name}' has {size_bytes} bytes; {datatype} of shape {list(shape)} takes {taken}")


def _view(name: str, datatype: str, shape: Sequence[int], tail: Buffer, position: int) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.ndarray(shape, NUMPY_DTYPES[datatype], tail, position)
    except (ValueError, OverflowError) as error:
        raise WireError(f"tensor '{name}' cannot have shape {list(shape)}") from error
    return array if array.flags.aligned else array.copy()


def _decode_elements(name: str, shape: Sequence[int], raw: bytes, may_miss: bool) -> np.ndarray[Any, Any]:
    count = math.prod(shape)
    if count * _LENGTH.size > len(raw):
        raise WireError(f"tensor '{name}' has fewer than {count} elements")
    elements = np.empty(count, dtype=object)
    position = 0
    for index in range(count):
        end_of_length = position + _LENGTH.size
        if end_of_length > len(raw):
            raise WireError(f"tensor '{name}' ends inside element {index}")
        length = _LENGTH.unpack_from(raw, position)[0]
        if may_miss and length == MISSING:
            position = end_of_length  # the element is None already
            continue
        position = end_of_length + length
        if position > len(raw):
            raise WireError(f"tensor '{name}' ends inside element {index}")
        elements[index] = raw[end_of_length:position]
    if position != len(raw):
        raise WireError(f"tensor '{name}' has {len(raw) - position} bytes after its last element")
    try:
        return elements.reshape(shape)
    except ValueError as error:
        raise WireError(f"tensor '{name}' cannot have shape {list(shape)}") from error
