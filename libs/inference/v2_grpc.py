"""The V2 form as protobuf: a serialised ``ModelInferRequest`` to arrays, and arrays to a serialised ``ModelInferResponse``.

Tensors come raw (all of them) or typed (each in the field of its datatype), and go back as they came.

References
----------
Open Inference Protocol, "gRPC".
"""

import math
from collections.abc import Mapping, MutableSequence, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from libs.inference import v2
from libs.inference.bodies import every_output, requested_outputs
from libs.inference.columns import assembled, check_complete, specs_for, unknown_input
from libs.inference.errors import InvalidInputError, printable
from libs.inference.oip_proto.open_inference_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.tensors import Array, convert, show_shape
from libs.runner.wire import NUMPY_DTYPES, Arrays, WireError, datatype_of, encode_tensor
from schemas.inference import Signature, TensorSpec

_Levels = Mapping[int, "_Levels"]

CONTENT_TYPE = "application/vnd.oip.v2+protobuf"
"""Content type of a record whose value is a serialised ``ModelInferRequest`` or ``ModelInferResponse``."""

_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype -> its field in typed contents; FP16 has none."""

_MISSING = "a text of a tensor is missing, which protobuf cannot hold; use JSON"
_MANY_BYTES = 256 * 1024
_MOST_FIELDS = 100_000
"""A field of two bytes can become an object of fifty in memory: a larger request may have so many fields, and so many typed strings."""

_COUNTED: _Levels = {5: {5: {}}}
"""Messages inside a request that can hold many fields: ``inputs``, and in them ``contents``."""

Tensor = ModelInferRequest.InferInputTensor | ModelInferResponse.InferOutputTensor


def read(body: bytes) -> ModelInferRequest:
    """Parse a serialised ``ModelInferRequest``, as far as that goes without the model's signature.

    Raises
    ------
    InvalidInputError
        It is none, or names no model.
    """
    if len(body) > _MANY_BYTES:
        _count_fields(body, 0, len(body), _COUNTED, _MOST_FIELDS)
    try:
        message = ModelInferRequest.FromString(body)
    except DecodeError as error:
        raise InvalidInputError("the request is not a serialised ModelInferRequest") from error
    if not message.model_name:
        raise InvalidInputError("the request has no model_name")
    return message


def parse(body: bytes, signature: Signature) -> InferRequest:
    """Read a serialised ``ModelInferRequest``.

    Raises
    ------
    InvalidInputError
        It is none, or does not fit the signature.
    """
    return from_message(read(body), signature)


def from_message(message: ModelInferRequest, signature: Signature) -> InferRequest:
    """Read a request that is parsed already.

    Raises
    ------
    InvalidInputError
        It does not fit the signature.
    """
    raw: Sequence[bytes] = message.raw_input_contents
    outputs = message.outputs
    return InferRequest(
        inputs=_read_inputs(message, signature, raw),
        outputs=requested_outputs([output.name for output in outputs], signature) if outputs else every_output(signature),
        id=message.id or None,
        parameters=_read_parameters(message.parameters) if message.parameters else {},
        binary_data_output=bool(raw),
    )


def render(response: InferResponse, request: InferRequest, model_name: str, model_version: str, request_id: str = "") -> bytes:
    """Write the answer: raw when the request was raw, or when an output has no typed form (FP16).

    ``request_id`` stands in for the caller's own id when the request has none.
    """
    message = ModelInferResponse(model_name=model_name, model_version=model_version, id=request.id or request_id)
    _write(response.outputs, request.binary_data_output, message.outputs, message.raw_output_contents)
    return message.SerializeToString()


def write_request(request: InferRequest, model_name: str, model_version: str = "") -> bytes:
    """Write a request, as a client does: raw if ``binary_data_output``, else typed (FP16 is raw always)."""
    message = ModelInferRequest(model_name=model_name, model_version=model_version, id=request.id or "")
    _write(request.inputs, request.binary_data_output, message.inputs, message.raw_input_contents)
    message.outputs.extend(ModelInferRequest.InferRequestedOutputTensor(name=name) for name in request.outputs or ())
    return message.SerializeToString()


def read_response(body: bytes) -> InferResponse:
    """Read an answer, as a client does.

    Raises
    ------
    InvalidInputError
        It is no serialised ``ModelInferResponse``, or its contents do not make its shapes.
    """
    try:
        message = ModelInferResponse.FromString(body)
    except DecodeError as error:
        raise InvalidInputError("the answer is not a serialised ModelInferResponse") from error
    raw = message.raw_output_contents
    outputs: Arrays = {}
    for place, tensor in enumerate(message.outputs):
        what, shape = f"output '{tensor.name}'", tuple(tensor.shape)
        if raw:
            outputs[tensor.name] = v2.tensor_from_bytes(tensor.datatype, shape, memoryview(raw[place]), what)
        else:
            outputs[tensor.name] = _from_typed(tensor, shape, what)
    return InferResponse(outputs)


def _read_inputs(message: ModelInferRequest, signature: Signature, raw: Sequence[bytes]) -> dict[str, Array]:
    tensors = message.inputs
    if not tensors:
        raise InvalidInputError("the request has no inputs")
    if raw and len(raw) != len(tensors):
        raise InvalidInputError(f"the request has {len(tensors)} inputs and {len(raw)} raw_input_contents; it needs one for each, or none")
    specs = specs_for([tensor.name for tensor in tensors], signature)
    arrays: dict[str, Array] = {}
    for place, tensor in enumerate(tensors):
        name = tensor.name
        spec = specs.get(name)
        if spec is None:
            if name in signature.ignored_columns:
                continue
            raise unknown_input(name, specs)
        if name in arrays:
            raise InvalidInputError(f"{spec.label} is given twice")
        arrays[name] = _read_input(tensor, spec, raw[place] if raw else None)
    check_complete(arrays, specs)
    return assembled(arrays, signature)


def _read_input(tensor: Tensor, spec: TensorSpec, raw: bytes | None) -> Array:
    what, datatype = spec.label, tensor.datatype
    if datatype not in NUMPY_DTYPES and datatype != "BF16":
        raise InvalidInputError(f"{what} has datatype '{printable(datatype, 40)}', which is not one of {', '.join(NUMPY_DTYPES)}, BF16")
    shape = v2.read_shape(list(tensor.shape), spec, what)
    wanted = spec.datatype.value
    if datatype != wanted and "BYTES" in (datatype, wanted):
        raise InvalidInputError(f"{what} expects {wanted}, got {datatype}")
    if raw is None:
        array = _from_typed(tensor, shape, what)
    elif tensor.HasField("contents"):
        raise InvalidInputError(f"{what} has contents although the request has raw_input_contents")
    else:
        array = v2.tensor_from_bytes(datatype, shape, memoryview(raw), what)
    if array.ndim == 2 and len(spec.shape) == 1:
        array = array.reshape(-1)
    return array if datatype == wanted else v2.converted(array, datatype, spec, what)


def _from_typed(tensor: Tensor, shape: tuple[int, ...], what: str) -> Array:
    datatype = tensor.datatype
    field = _FIELDS.get(datatype)
    if field is None:
        raise InvalidInputError(f"{what} is {datatype}, which has no typed contents; send it in raw_input_contents")
    values = getattr(tensor.contents, field)
    if len(values) != math.prod(shape):
        raise InvalidInputError(f"{what}: {field} has {len(values)} elements, shape {show_shape(shape)} needs {math.prod(shape)}")
    if datatype == "BYTES":
        array = np.empty(len(values), dtype=object)
        array[:] = list(values)
    else:
        # Protobuf gives its numbers to NumPy as they lie in memory.
        array = convert(np.asarray(values), NUMPY_DTYPES[datatype], datatype, what)
    return array.reshape(shape)


def _count_fields(body: bytes, position: int, end: int, levels: _Levels, left: int) -> int:
    """How many fields may still come; raises when there are too many. What is malformed is left to the parser."""
    while position < end:
        tag, position = _varint(body, position)
        kind = tag & 7
        if kind == 2:
            length, position = _varint(body, position)
            inner = levels.get(tag >> 3)
            if inner is not None:
                left = _count_fields(body, position, min(position + length, end), inner, left)
            position += length
        elif kind == 0:
            _, position = _varint(body, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise InvalidInputError("the request is not a serialised ModelInferRequest")
        left -= 1
        if left < 0:
            raise InvalidInputError(f"the request has more than {_MOST_FIELDS} fields; send tensors in raw_input_contents")
    return left


def _varint(body: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    for octet in body[position : position + 10]:
        value |= (octet & 0x7F) << shift
        position += 1
        if octet < 0x80:
            return value, position
        shift += 7
    raise InvalidInputError("the request is not a serialised ModelInferRequest")


def _write(arrays: Arrays, wants_raw: bool, tensors: Any, raw: MutableSequence[bytes]) -> None:
    """Add arrays to a message's tensors: raw all of them, or none."""
    datatypes = [datatype_of(array.dtype) for array in arrays.values()]
    is_raw = wants_raw or not _FIELDS.keys() >= set(datatypes)
    for (name, array), datatype in zip(arrays.items(), datatypes, strict=True):
        tensor = tensors.add(name=name, datatype=datatype, shape=array.shape)
        if is_raw:
            try:
                raw.append(bytes(encode_tensor(name, array)[1]))
            except WireError as error:
                raise InvalidInputError(_MISSING) from error
        else:
            getattr(tensor.contents, _FIELDS[datatype]).extend(_values(array, datatype))


def _values(array: Array, datatype: str) -> list[Any]:
    if datatype != "BYTES":
        values: list[Any] = array.reshape(-1).tolist()
        return values
    if any(element is None for element in array.flat):
        raise InvalidInputError(_MISSING)
    return [element if isinstance(element, bytes) else str(element).encode("utf-8", "surrogateescape") for element in array.flat]


def _read_parameters(parameters: Mapping[str, InferParameter]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        read[name] = None if choice is None else getattr(parameter, choice)
    return read
