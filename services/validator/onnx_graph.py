"""The parts of an ONNX file that are looked at without ONNX: versions, operator sets, and where its weights are.

A walk over protobuf's wire format, in place.

References
----------
Protocol Buffers, "Encoding"; ``onnx/onnx.proto`` (ModelProto, GraphProto, TensorProto).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from services.validator.errors import BrokenArtifactError

_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""Field number of ModelProto -> wire type."""

_IR_VERSION, _GRAPH, _OPSET_IMPORT = 1, 7, 8
_PLAUSIBLE_IR_VERSIONS = range(1, 64)
_STANDARD_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft"}
_MAX_DEPTH = 32
_MAX_PATH_BYTES = 2048

# Where tensors may be, by message: field number -> message that it holds.
_PATHS: dict[str, dict[int, str]] = {
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14


@dataclass(frozen=True, slots=True)
class OnnxSummary:
    """What the file says of itself.

    Attributes
    ----------
    opsets
        Operator sets by domain; the empty domain is ONNX's own.
    external_data
        Files that weights are said to be in, relative to this one's folder; an empty text where none is named.
    """

    ir_version: int
    opsets: tuple[tuple[str, int], ...]
    external_data: frozenset[str] = frozenset()

    @property
    def custom_domains(self) -> tuple[str, ...]:
        """Domains of operators that ONNX Runtime does not bring."""
        return tuple(domain for domain, _ in self.opsets if domain not in _STANDARD_DOMAINS)


def read_onnx(view: memoryview) -> OnnxSummary | None:
    """Read a file that may be an ONNX graph; ``None`` when it does not begin as one.

    Raises
    ------
    BrokenArtifactError
        It begins as one but ends too early or has no graph.
    """
    ir_version: int | None = None
    graph: memoryview | None = None
    opsets: list[tuple[str, int]] = []
    try:
        for number, wire_type, value in _fields(view):
            if _MODEL_FIELDS.get(number) != wire_type:
                return None if graph is None else _fail("has a part that an ONNX graph does not have")
            if number == _IR_VERSION and isinstance(value, int):
                ir_version = value
                if ir_version not in _PLAUSIBLE_IR_VERSIONS:
                    return None
            elif number == _GRAPH and isinstance(value, memoryview):
                graph = value
            elif number == _OPSET_IMPORT and isinstance(value, memoryview):
                opsets.append(_opset(value))
        if graph is None or ir_version is None:
            return None if not opsets or ir_version is None else _fail("has no graph")
        return OnnxSummary(ir_version, tuple(opsets), frozenset(_external_data(graph, "graph", 0)))
    except _TruncatedError as error:
        if ir_version is None or view[0] != 0x08:
            return None
        raise BrokenArtifactError("ends too early: the file is truncated") from error
    except UnicodeDecodeError:
        return None


class _TruncatedError(Exception):
    pass


def _fail(reason: str) -> OnnxSummary:
    raise BrokenArtifactError(reason)


def _fields(view: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield (field number, wire type, value) of one message."""
    position, end = 0, len(view)
    while position < end:
        tag, position = _varint(view, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(view, position)
            yield number, wire_type, value
            continue
        if wire_type == 2:
            size, position = _varint(view, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            yield number, wire_type, 0
            raise _TruncatedError
        if position + size > end:
            raise _TruncatedError
        yield number, wire_type, view[position : position + size]
        position += size


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise _TruncatedError
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise _TruncatedError


def _opset(view: memoryview) -> tuple[str, int]:
    domain, version = "", 0
    for number, _, value in _fields(view):
        if number == 1 and isinstance(value, memoryview):
            domain = bytes(value[:256]).decode("utf-8")
        elif number == 2 and isinstance(value, int):
            version = value
    return domain, version


def _external_data(view: memoryview, message: str, depth: int) -> Iterator[str]:
    """Look for tensors that say their data are in another file. Nesting deeper than any real graph counts as one without a name."""
    if depth > _MAX_DEPTH:
        yield ""
    elif message == "tensor":
        yield from _location(view)
    else:
        inner = _PATHS[message]
        for number, _, value in _fields(view):
            if number in inner and isinstance(value, memoryview):
                yield from _external_data(value, inner[number], depth + 1)


def _location(tensor: memoryview) -> Iterator[str]:
    is_external, found = False, ""
    for number, _, value in _fields(tensor):
        is_external = is_external or number == _TENSOR_EXTERNAL_DATA or (number == _TENSOR_DATA_LOCATION and value == 1)
        if number == _TENSOR_EXTERNAL_DATA and isinstance(value, memoryview):
            entry = {part: bytes(text[:_MAX_PATH_BYTES]) for part, _, text in _fields(value) if isinstance(text, memoryview)}
            if entry.get(1) == b"location":
                found = entry.get(2, b"").decode("utf-8", "replace")
    if is_external:
        yield found
