"""The V2 form (Open Inference Protocol), JSON and binary tensors.

A body with binary tensors is a JSON head of a length that a header tells (``Inference-Header-Content-Length``), then the tensors' bytes.

References
----------
Open Inference Protocol, "HTTP/REST" and "Binary tensor data extension".
"""

import math
from collections.abc import Mapping
from typing import Any

import orjson

from libs.inference.bodies import object_or_empty, parse_object, requested_outputs
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.tensors import Array, array_from_json, check_shape, convert, json_ready, nested_shape
from libs.runner.wire import NUMPY_DTYPES, Buffer, WireError, datatype_of, decode_tensor, encode_tensor
from schemas.inference import Signature, TensorSpec


def parse(body: bytes | bytearray | memoryview, signature: Signature, head_length: int | None = None) -> InferRequest:
    """Read a V2 body.

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
    return from_document(parse_object(view[:head_length]), signature, view[head_length:])


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
    names, binary = _read_outputs(document.get("outputs"))
    return InferRequest(
        inputs=_read_inputs(document.get("inputs"), signature, tail),
        outputs=requested_outputs(names, signature),
        id=request_id,
        parameters=parameters,
        binary_data_output=parameters.get("binary_data_output") is True,
        binary_data=binary,
    )


def _read_outputs(outputs: Any) -> tuple[list[str] | None, dict[str, bool]]:
    if outputs is None:
        return None, {}
    if not isinstance(outputs, list) or not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in outputs):
        raise InvalidInputError("'outputs' must be a list of objects with a name")
    binary = {}
    for item in outputs:
        choice = object_or_empty(item.get("parameters"), "parameters").get("binary_data")
        if choice is not None:
            binary[item["name"]] = choice is True
    return [item["name"] for item in outputs], binary


def _read_inputs(inputs: Any, signature: Signature, tail: memoryview | None) -> dict[str, Array]:
    if not isinstance(inputs, list) or not inputs:
        raise InvalidInputError("'inputs' must be a non-empty list")
    specs = {spec.name: spec for spec in signature.inputs}
    rest = tail if tail is not None else memoryview(b"")
    arrays: dict[str, Array] = {}
    for item in inputs:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str):
            raise InvalidInputError("each of 'inputs' must be an object with a name")
        if name not in specs:
            raise InvalidInputError(f"the model has no input '{name}'; it has {', '.join(specs)}")
        if name in arrays:
            raise InvalidInputError(f"input '{name}' is given twice")
        arrays[name], rest = _read_input(item, specs[name], rest)
    for name in specs:
        if name not in arrays:
            raise InvalidInputError(f"input '{name}' is missing")
    if rest:
        raise InvalidInputError(f"{len(rest)} bytes follow the last binary tensor")
    return arrays


def _read_input(item: dict[str, Any], spec: TensorSpec, rest: memoryview) -> tuple[Array, memoryview]:
    what = f"input '{spec.name}'"
    datatype, shape = item.get("datatype"), item.get("shape")
    if not isinstance(datatype, str) or datatype not in NUMPY_DTYPES:
        raise InvalidInputError(f"{what} has datatype {datatype!r}, which is not one of {', '.join(NUMPY_DTYPES)}")
    if not isinstance(shape, list) or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape):
        raise InvalidInputError(f"{what} needs a shape of non-negative integers")
    if (datatype == "BYTES") != (spec.datatype == "BYTES"):
        raise InvalidInputError(f"{what} expects {spec.datatype}, got {datatype}")
    size = object_or_empty(item.get("parameters"), "parameters").get("binary_data_size")
    if size is None:
        array = _from_json(item, datatype, shape, what)
    else:
        array, rest = _from_bytes(spec.name, datatype, shape, size, rest)
    return check_shape(convert(array, NUMPY_DTYPES[spec.datatype], spec.datatype, what), spec), rest


def _from_json(item: dict[str, Any], datatype: str, shape: list[int], what: str) -> Array:
    data = item.get("data")
    if not isinstance(data, list):
        raise InvalidInputError(f"{what} has neither a list 'data' nor a binary_data_size")
    array = array_from_json(data, datatype, what)
    if array.size != math.prod(shape):
        raise InvalidInputError(f"{what}: data has {array.size} elements, shape {shape} needs {math.prod(shape)}")
    if array.ndim > 1 and nested_shape(data) != tuple(shape):
        raise InvalidInputError(f"{what}: data is nested as {list(array.shape)}, its shape says {shape}")
    return array.reshape(shape)


def _from_bytes(name: str, datatype: str, shape: list[int], size: Any, rest: memoryview) -> tuple[Array, memoryview]:
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
        raise InvalidInputError(f"input '{name}' announces {size} bytes; {len(rest)} are left after the JSON head")
    try:
        return decode_tensor(name, datatype, shape, rest[:size]), rest[size:]
    except WireError as error:
        raise InvalidInputError(str(error)) from error


def render(response: InferResponse, request: InferRequest, model_name: str, model_version: str) -> tuple[bytes, int | None]:
    """Write the answer; the second value is the length of the JSON head when binary tensors follow it, else ``None``."""
    outputs: list[dict[str, Any]] = []
    tail: list[Buffer] = []
    for name, array in response.outputs.items():
        if request.wants_binary(name):
            description, data = encode_tensor(name, array)
            tail.append(data)
        else:
            description = {"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape)}
            description["data"] = json_ready(array.reshape(-1))
        outputs.append(description)
    document: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request.id is not None:
        document["id"] = request.id
    document["outputs"] = outputs
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([head, *tail]), len(head)) if tail else (head, None)
