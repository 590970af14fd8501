"""The V2 form (Open Inference Protocol), JSON and binary tensors.

A body with binary tensors is a JSON head of a length that a header tells (``Inference-Header-Content-Length``), then the tensors' bytes.

References
----------
Open Inference Protocol, "HTTP/REST" and "Binary tensor data extension".
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from libs.inference.bodies import every_output, object_or_empty, parse_object, requested_outputs
from libs.inference.columns import NULLABLE, assembled, check_complete, specs_for, unknown_input
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.tensors import (
    MAX_DIMENSIONS,
    Array,
    array_from_json,
    check_shape,
    convert,
    has_shape,
    json_ready,
    nested_shape,
    show,
    show_shape,
)
from libs.runner.wire import NUMPY_DTYPES, Buffer, WireError, datatype_of, decode_tensor, encode_tensor
from schemas.inference import Signature, TensorSpec

MAX_STRINGS = 1_000_000
"""Elements of one binary BYTES tensor; they are taken apart one by one, about a quarter of a second for so many."""

_BEYOND_ANY_SIZE = 2**63
"""Lenient JSON knows integers of thousands of digits, whose products nothing can print."""

_DATATYPES = ", ".join([*NUMPY_DTYPES, "BF16"])


def parse(body: bytes | bytearray | memoryview, signature: Signature, head_length: int | None = None) -> InferRequest:
    """Read a V2 body. Arrays of binary tensors are views of ``body``, which may not be aligned.

    Parameters
    ----------
    head_length
        Bytes of the JSON head when binary tensors follow it; ``None`` when all is JSON.

    Raises
    ------
    InvalidInputError
        The body is malformed or does not fit the signature.
    """
    if head_length is None:
        return from_document(parse_object(body), signature)
    if not 0 < head_length <= len(body):
        raise InvalidInputError(f"the JSON head is said to have {head_length} bytes; the body has {len(body)}")
    view = memoryview(body)
    return from_document(parse_object(bytes(view[:head_length])), signature, view[head_length:])


def from_document(document: Mapping[str, Any], signature: Signature, tail: memoryview | None = None) -> InferRequest:
    """Read a V2 head that is parsed already, with the bytes that follow it.

    Raises
    ------
    InvalidInputError
        The body is malformed or does not fit the signature.
    """
    parameters = object_or_empty(document.get("parameters"), "parameters")
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidInputError("'id' must be a string")
    asked = document.get("outputs")
    names, binary = _read_outputs(asked, signature) if asked is not None else (None, {})
    return InferRequest(
        inputs=_read_inputs(document.get("inputs"), signature, tail),
        outputs=names or every_output(signature),
        id=request_id,
        parameters=parameters,
        binary_data_output=_flag(parameters, "binary_data_output") is True,
        binary_data=binary,
    )


def _flag(parameters: Mapping[str, Any], name: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidInputError(f"the parameter '{name}' must be true or false, got {show(value)}")
    return value


def _read_outputs(outputs: Any, signature: Signature) -> tuple[tuple[str, ...] | None, dict[str, bool]]:
    if not isinstance(outputs, list):
        raise InvalidInputError("'outputs' must be a list of objects with a name")
    binary: dict[str, bool] = {}
    names: list[str] = []
    for item in outputs:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise InvalidInputError("'outputs' must be a list of objects with a name")
        choice = _flag(object_or_empty(item.get("parameters"), "parameters"), "binary_data")
        if choice is not None:
            binary[item["name"]] = choice
        names.append(item["name"])
    return requested_outputs(names, signature), binary


def _read_inputs(inputs: Any, signature: Signature, tail: memoryview | None) -> dict[str, Array]:
    if not isinstance(inputs, list) or not inputs:
        raise InvalidInputError("'inputs' must be a non-empty list")
    specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in signature.inputs}
    names = [item["name"] for item in inputs if isinstance(item, dict) and isinstance(item.get("name"), str)]
    if names and names[0] not in specs:
        specs = specs_for(names, signature)
    rest = tail if tail is not None else memoryview(b"")
    arrays: dict[str, Array] = {}
    for item in inputs:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str):
            raise InvalidInputError("each of 'inputs' must be an object with a name")
        spec = specs.get(name)
        if spec is None:
            if name not in signature.ignored_columns:
                raise unknown_input(name, specs)
            rest = _passed_over(item, rest)
            continue
        if name in arrays:
            raise InvalidInputError(f"{spec.label} is given twice")
        arrays[name], rest = _read_input(item, spec, rest)
    if len(arrays) < len(specs):
        check_complete(arrays, specs)
    if rest:
        raise InvalidInputError(f"{len(rest)} bytes follow the last binary tensor")
    return assembled(arrays, signature)


def _passed_over(item: dict[str, Any], rest: memoryview) -> memoryview:
    """The bytes behind those of a column that the model does not use."""
    size = object_or_empty(item.get("parameters"), "parameters").get("binary_data_size", 0)
    if type(size) is not int or not 0 <= size <= len(rest):
        raise InvalidInputError(f"column '{item['name']}' announces {show(size)} bytes; {len(rest)} are left after the JSON head")
    return rest[size:]


def _read_input(item: dict[str, Any], spec: TensorSpec, rest: memoryview) -> tuple[Array, memoryview]:
    what = spec.label
    datatype = item.get("datatype")
    if not isinstance(datatype, str) or (datatype not in NUMPY_DTYPES and datatype != "BF16"):
        shown = repr(datatype[:40]) if isinstance(datatype, str) else show(datatype)
        raise InvalidInputError(f"{what} has datatype {shown}, which is not one of {_DATATYPES}")
    shape = read_shape(item.get("shape"), spec, what)
    if datatype != spec.datatype and "BYTES" in (datatype, spec.datatype):
        raise InvalidInputError(f"{what} expects {spec.datatype.value}, got {datatype}")
    parameters = item.get("parameters")
    size = None if parameters is None else object_or_empty(parameters, "parameters").get("binary_data_size")
    if size is None:
        if spec.dtype in NULLABLE and datatype != "BF16":
            datatype = spec.datatype.value  # the data may have null in it, which integers and booleans cannot hold
        array = _from_json(item, datatype, shape, what, may_miss=spec.dtype is not None)
    elif type(size) is not int or not 0 <= size <= len(rest):
        raise InvalidInputError(f"{what} announces {show(size)} bytes; {len(rest)} are left after the JSON head")
    elif "data" in item:
        raise InvalidInputError(f"{what} has both 'data' and a binary_data_size")
    else:
        array, rest = tensor_from_bytes(datatype, shape, rest[:size], what), rest[size:]
    if array.ndim == 2 and len(spec.shape) == 1:
        array = array.reshape(-1)
    if datatype != spec.datatype:
        array = converted(array, datatype, spec, what)
    return array, rest


def read_shape(shape: Any, spec: TensorSpec, what: str) -> tuple[int, ...]:
    """The shape that an input announces, which must be one of the signature's; ``[n, 1]`` does for ``[n]``."""
    if type(shape) is not list:
        raise InvalidInputError(f"{what} needs a shape of non-negative integers")
    if len(shape) <= MAX_DIMENSIONS:
        for size in shape:
            if type(size) is not int or not 0 <= size < _BEYOND_ANY_SIZE:
                raise InvalidInputError(f"{what} needs a shape of non-negative integers")
    given = tuple(shape)
    if not has_shape(given, spec.shape) and not (len(given) == 2 and given[1] == 1 and spec.shape == (-1,)):
        raise InvalidInputError(f"{what} expects shape {list(spec.shape)}, got {show_shape(shape)}")
    if 0 in given:
        raise InvalidInputError(f"{what} is empty: its shape is {show_shape(shape)}")
    return given


def _from_json(item: dict[str, Any], datatype: str, shape: tuple[int, ...], what: str, may_miss: bool) -> Array:
    data = item.get("data")
    if type(data) is not list:
        raise InvalidInputError(f"{what} has neither a list 'data' nor a binary_data_size")
    if datatype == "BF16":
        raise InvalidInputError(f"{what}: BF16 has no JSON form; send it as a binary tensor, or as FP32")
    array = array_from_json(data, datatype, what, may_miss=may_miss)
    if array.shape == shape:
        return array
    if array.size != math.prod(shape):
        raise InvalidInputError(f"{what}: data has {array.size} elements, shape {show_shape(shape)} needs {math.prod(shape)}")
    if array.ndim > 1 and nested_shape(data) != shape:
        raise InvalidInputError(f"{what}: data is nested as {show_shape(array.shape)}, its shape says {show_shape(shape)}")
    return array.reshape(shape)


def tensor_from_bytes(datatype: str, shape: tuple[int, ...], data: memoryview, what: str) -> Array:
    """A tensor from raw bytes; BF16 becomes FP32. Raises ``InvalidInputError``."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings(count, shape, data, what)
    dtype = np.dtype("<u2") if datatype == "BF16" else NUMPY_DTYPES[datatype]
    if count * dtype.itemsize != len(data):
        wanted = f"{datatype} of shape {show_shape(shape)} takes {count * dtype.itemsize}"
        raise InvalidInputError(f"{what} has {len(data)} bytes; {wanted}")
    if datatype == "BF16":
        return (np.ndarray(shape, dtype, data).astype("<u4") << 16).view("<f4")
    if datatype == "BOOL" and np.ndarray(shape, np.uint8, data).max() > 1:
        raise InvalidInputError(f"{what} expects BOOL; a byte in it is neither 0 nor 1")
    return np.ndarray(shape, dtype, data)


def _strings(count: int, shape: tuple[int, ...], data: memoryview, what: str) -> Array:
    if count > MAX_STRINGS:
        raise InvalidInputError(f"{what} has {count} elements; {MAX_STRINGS} are the most of a BYTES tensor")
    try:
        return decode_tensor("", "BYTES", shape, data)
    except WireError as error:
        raise InvalidInputError(str(error).replace("tensor ''", what)) from error


def converted(array: Array, datatype: str, spec: TensorSpec, what: str) -> Array:
    """An input of another datatype than the model's in the model's; raises ``InvalidInputError`` where that is not exact."""
    target = NUMPY_DTYPES[spec.datatype]
    if datatype == "BF16" and target.kind != "f":
        raise InvalidInputError(f"{what} expects {spec.datatype.value}, got BF16")
    return check_shape(convert(array, target, spec.datatype.value, what), spec)


def render(
    response: InferResponse, request: InferRequest, model_name: str, model_version: str, request_id: str | None = None
) -> tuple[bytes, int | None]:
    """Write the answer; the second value is the length of the JSON head when binary tensors follow it, else ``None``.

    ``request_id`` stands in for the caller's own id when the request has none.

    Raises
    ------
    InvalidInputError
        A text that is asked for in binary form is missing.
    """
    outputs: list[dict[str, Any]] = []
    tail: list[Buffer] = []
    for name, array in response.outputs.items():
        if request.wants_binary(name):
            try:
                description, data = encode_tensor(name, array)
            except WireError as error:
                raise InvalidInputError(f"output '{name}' has a missing text, which binary tensors cannot hold; ask for JSON") from error
            tail.append(data)
        else:
            flat = array if array.ndim == 1 else array.reshape(-1)
            description = {"name": name, "datatype": datatype_of(array.dtype), "shape": array.shape, "data": json_ready(flat)}
        outputs.append(description)
    document: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    given = request.id or request_id
    if given is not None:
        document["id"] = given
    document["outputs"] = outputs
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([head, *tail]), len(head)) if tail else (head, None)
