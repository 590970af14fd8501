"""Requests in the forms that the servers take, and the labels in their answers; by hand, so that no server's own code is under them.

References
----------
Open Inference Protocol, "HTTP/REST", "Binary tensor data extension" and "gRPC" (``ModelInferRequest``); Protocol Buffers, "Encoding".
"""

import struct
from collections.abc import Mapping

import numpy as np
import orjson

JSON_TYPE = "application/json"
BINARY_TYPE = "application/octet-stream"
HEAD_LENGTH = "inference-header-content-length"


def instances(rows: np.ndarray) -> bytes:
    """``{"instances": […]}``, as V1 and most others take it."""
    return orjson.dumps({"instances": rows.tolist()})


def predictions(answer: bytes) -> list[int]:
    """Labels of a V1 answer."""
    return list(orjson.loads(answer)["predictions"])


def v2_json(rows: np.ndarray, name: str) -> bytes:
    """A V2 request in JSON that asks for the labels."""
    tensor = {"name": name, "datatype": "FP64", "shape": list(rows.shape), "data": rows.ravel().tolist()}
    return orjson.dumps({"inputs": [tensor], "outputs": [{"name": "predict"}]})


def v2_labels(answer: bytes) -> list[int]:
    """Labels of a V2 answer in JSON."""
    return list(orjson.loads(answer)["outputs"][0]["data"])


def v2_binary(rows: np.ndarray, name: str, output: str | None = "predict") -> tuple[bytes, dict[str, str]]:
    """A V2 request with binary tensors that asks for a binary answer, and the headers it needs."""
    tail = np.ascontiguousarray(rows, dtype="<f8").tobytes()
    tensor = {"name": name, "datatype": "FP64", "shape": list(rows.shape), "parameters": {"binary_data_size": len(tail)}}
    document: dict[str, object] = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    if output is not None:
        document["outputs"] = [{"name": output, "parameters": {"binary_data": True}}]
    head = orjson.dumps(document)
    return head + tail, {"content-type": BINARY_TYPE, HEAD_LENGTH: str(len(head))}


def v2_binary_labels(answer: bytes, headers: Mapping[str, str]) -> list[int]:
    """Labels of a V2 answer with binary tensors; a server may answer in JSON all the same."""
    if HEAD_LENGTH not in headers:
        return v2_labels(answer)
    head_length = int(headers[HEAD_LENGTH])
    (output,) = orjson.loads(answer[:head_length])["outputs"]
    dtype = {"INT64": "<i8", "INT32": "<i4"}[output["datatype"]]
    return np.frombuffer(answer[head_length:], dtype).tolist()


def v2_protobuf(model_name: str, rows: np.ndarray, name: str, output: str | None = "predict") -> bytes:
    """A serialized ``inference.ModelInferRequest`` with raw contents."""
    shape = b"".join(_varint(length) for length in rows.shape)
    tensor = _field(1, name.encode()) + _field(2, b"FP64") + _field(3, shape)
    wanted = _field(6, _field(1, output.encode())) if output is not None else b""
    raw = np.ascontiguousarray(rows, dtype="<f8").tobytes()
    return _field(1, model_name.encode()) + _field(5, tensor) + wanted + _field(7, raw)


def raw_doubles(rows: np.ndarray) -> bytes:
    """The bare numbers, row by row, as little-endian doubles."""
    return np.ascontiguousarray(rows, dtype="<f8").tobytes()


def raw_labels(answer: bytes) -> list[int]:
    """Labels as bare little-endian 64-bit integers."""
    return [value for (value,) in struct.iter_unpack("<q", answer)]


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
