"""Frames and tensors as they cross the socket between the platform and a runner.

A frame is ``<u32 meta_len><u32 head_len><u64 tail_len>`` (little-endian), then *meta* (our JSON), *head* (the JSON of
an Open Inference Protocol request or response) and *tail* (its raw tensors in order). Tensors use the protocol's
binary layout: little-endian, row-major; an element of ``BYTES`` is ``<u32 length><bytes>``. In memory a ``BYTES``
tensor is an object array of ``bytes``.

Standard library and NumPy only, in Python 3.9 syntax: the runner and the platform import this same module.

References
----------
Open Inference Protocol, "Binary tensor data extension".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

PREFIX = struct.Struct("<IIQ")
META_LIMIT_BYTES = 64 * 1024
HEAD_LIMIT_BYTES = 64 * 1024 * 1024
TAIL_LIMIT_BYTES = 1024 * 1024 * 1024

Buffer = Union[bytes, bytearray, memoryview]
Arrays = dict[str, "np.ndarray[Any, Any]"]

_LENGTH = struct.Struct("<I")
_JOIN_BELOW_BYTES = 64 * 1024


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


@dataclass(frozen=True)
class Frame:
    """One message. ``tail`` is writable memory of its own."""

    meta: dict[str, Any]
    head: bytes
    tail: memoryview


class FrameReader:
    """Cuts a stream of chunks into frames.

    Parameters
    ----------
    trusted
        Until the peer has proved who it is, only small frames are taken, so that a stranger cannot make us allocate.
    """

    def __init__(self, trusted: bool = True) -> None:
        self.trusted = trusted
        self._prefix = bytearray()
        self._front = bytearray()
        self._tail = bytearray()
        self._meta_length = 0
        self._filled = -1

    def feed(self, data: Buffer) -> list[Frame]:
        """Take the next chunk and return the frames that are complete with it.

        Raises
        ------
        WireError
            A length is beyond its limit or the meta part is not a JSON object; the stream cannot be read further.
        """
        frames: list[Frame] = []
        view = memoryview(data)
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
        return frames

    def _begin(self) -> None:
        meta_length, head_length, tail_length = PREFIX.unpack(self._prefix)
        self._prefix.clear()
        limits = (META_LIMIT_BYTES, HEAD_LIMIT_BYTES, TAIL_LIMIT_BYTES) if self.trusted else (4096, 0, 0)
        names = ("meta", "head", "tail")
        for name, length, limit in zip(names, (meta_length, head_length, tail_length), limits):
            if length > limit:
                raise WireError(f"a frame's {name} part has {length} bytes; at most {limit} are taken")
        if meta_length == 0:
            raise WireError("a frame has no meta part")
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
        meta = parse_json_object(bytes(self._front[: self._meta_length]), "meta")
        return Frame(meta, bytes(self._front[self._meta_length :]), memoryview(self._tail))


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises
    ------
    WireError
        The text is not JSON, or not an object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the {what} part of a frame is not JSON") from error
    if not isinstance(value, dict):
        raise WireError(f"the {what} part of a frame is not a JSON object")
    return value


def encode_frame(meta: Mapping[str, Any], head: bytes = b"", tail: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return a frame as buffers to be written in order; small frames are one buffer, large tensors are not copied."""
    meta_bytes = json.dumps(meta, separators=(",", ":")).encode()
    tail_length = sum(len(part) for part in tail)
    front = PREFIX.pack(len(meta_bytes), len(head), tail_length) + meta_bytes + head
    if tail_length <= _JOIN_BELOW_BYTES:
        return [b"".join([front, *tail])]
    return [front, *tail]


def encode_tensor(name: str, array: np.ndarray[Any, Any]) -> tuple[dict[str, Any], Buffer]:
    """Return a tensor's description for the JSON head, and its bytes.

    Raises
    ------
    WireError
        The array's type has no datatype in the protocol.
    """
    datatype = datatype_of(array.dtype)
    data: Buffer
    if datatype == "BYTES":
        data = _encode_elements(array)
    elif array.size == 0:
        data = b""
    else:
        wanted = np.ascontiguousarray(array, dtype=NUMPY_DTYPES[datatype])
        data = wanted.reshape(-1).view(np.uint8).data
    description = {
        "name": name,
        "shape": list(array.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": len(data)},
    }
    return description, data


def _encode_elements(array: np.ndarray[Any, Any]) -> bytes:
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        encoded = element if isinstance(element, bytes) else str(element).encode("utf-8", "surrogateescape")
        parts.append(_LENGTH.pack(len(encoded)))
        parts.append(encoded)
    return b"".join(parts)


def encode_tensors(arrays: Mapping[str, np.ndarray[Any, Any]]) -> tuple[list[dict[str, Any]], list[Buffer]]:
    """Encode named arrays in their order."""
    descriptions: list[dict[str, Any]] = []
    buffers: list[Buffer] = []
    for name, array in arrays.items():
        description, data = encode_tensor(name, array)
        descriptions.append(description)
        buffers.append(data)
    return descriptions, buffers


def decode_tensors(descriptions: Iterable[Any], tail: Buffer) -> Arrays:
    """Return the named arrays that ``descriptions`` cut out of ``tail``, without copying when they are aligned.

    Raises
    ------
    WireError
        A description is malformed, a name occurs twice, or the sizes and the bytes do not agree.
    """
    arrays: Arrays = {}
    view = memoryview(tail)
    for description in descriptions:
        name, datatype, shape, size = _read_description(description)
        if name in arrays:
            raise WireError(f"tensor '{name}' occurs twice")
        if size > len(view):
            raise WireError(f"tensor '{name}' announces {size} bytes but only {len(view)} are left")
        arrays[name] = decode_tensor(name, datatype, shape, view[:size])
        view = view[size:]
    if view:
        raise WireError(f"{len(view)} bytes follow the last tensor")
    return arrays


def _read_description(description: Any) -> tuple[str, str, list[int], int]:
    if not isinstance(description, dict):
        raise WireError("a tensor's description is not an object")
    name = description.get("name")
    if not isinstance(name, str) or not name:
        raise WireError("a tensor has no name")
    datatype = description.get("datatype")
    if datatype not in NUMPY_DTYPES:
        raise WireError(f"tensor '{name}' has datatype {datatype!r}, which is not supported")
    shape = description.get("shape")
    if not isinstance(shape, list) or not all(_is_count(dimension) for dimension in shape):
        raise WireError(f"tensor '{name}' needs a shape of non-negative integers, got {shape!r}")
    parameters = description.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if not _is_count(size):
        raise WireError(f"tensor '{name}' has no binary_data_size")
    return name, datatype, shape, size  # type: ignore[return-value]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def decode_tensor(name: str, datatype: str, shape: Sequence[int], data: memoryview) -> np.ndarray[Any, Any]:
    """Return one tensor; ``shape`` has been checked to be non-negative integers.

    Raises
    ------
    WireError
        The number of bytes does not agree with datatype and shape.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _decode_elements(name, count, data).reshape(shape)
    dtype = NUMPY_DTYPES[datatype]
    if count * dtype.itemsize != len(data):
        raise WireError(f"tensor '{name}' has {len(data)} bytes; {datatype} of shape {list(shape)} takes {count * dtype.itemsize}")
    array = np.frombuffer(data, dtype=dtype, count=count).reshape(shape)
    return array if array.flags.aligned else array.copy()


def _decode_elements(name: str, count: int, data: memoryview) -> np.ndarray[Any, Any]:
    raw = bytes(data)
    if count * _LENGTH.size > len(raw):
        raise WireError(f"tensor '{name}' has fewer than {count} elements")
    elements = np.empty(count, dtype=object)
    position = 0
    for index in range(count):
        end_of_length = position + _LENGTH.size
        if end_of_length > len(raw):
            raise WireError(f"tensor '{name}' ends inside element {index}")
        position = end_of_length + _LENGTH.unpack_from(raw, position)[0]
        if position > len(raw):
            raise WireError(f"tensor '{name}' ends inside element {index}")
        elements[index] = raw[end_of_length:position]
    if position != len(raw):
        raise WireError(f"tensor '{name}' has {len(raw) - position} bytes after its last element")
    return elements
