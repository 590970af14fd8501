"""The server under examination: how it is asked, and requests made from what it says of its model."""

import gzip
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import httpx
import numpy as np

DTYPES = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    "BYTES": "O",
}
HEAD_LENGTH = "inference-header-content-length"
_TIMEOUT_S = 15.0


class Subject:
    """A server and one of its models.

    Parameters
    ----------
    version
        A version of the model that the server should answer for by name; None when it has no versions.
    grpc
        ``host:port`` of its gRPC side; None when there is none.

    Notes
    -----
    Each request has a connection of its own: a server that closes one after an error is not at fault.
    """

    def __init__(self, url: str, model: str, version: str | None = None, grpc: str | None = None) -> None:
        self.model = model
        self.version = version
        self.grpc = grpc
        self.http = httpx.Client(
            base_url=url, timeout=_TIMEOUT_S, trust_env=False, headers={"accept-encoding": "identity", "connection": "close"}
        )

    def close(self) -> None:
        self.http.close()

    @property
    def path(self) -> str:
        """The model's path in V2."""
        return f"/v2/models/{self.model}"

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the server says of the model; raises ``ValueError`` when that cannot be used to ask it."""
        answer = self.http.get(self.path)
        document = answer.json() if answer.status_code == 200 else {}
        if not document.get("inputs"):
            raise ValueError("the model's metadata names no inputs")
        return dict(document)

    @cached_property
    def has_binary(self) -> bool:
        """Whether the server has the binary extension: it says so, or takes a binary input."""
        document = self.http.get("/v2").json()
        if "binary_tensor_data" in document.get("extensions", []):
            return True
        pairs = [binary_input(name, array) for name, array in self.arrays().items()]
        return self.infer({"inputs": [item for item, _ in pairs]}, tail=b"".join(raw for _, raw in pairs)).status_code == 200

    def arrays(self, rows: int = 2) -> dict[str, np.ndarray]:
        """Values for every input of the model; other rows have other values."""
        return {spec["name"]: _values(spec, rows) for spec in self.metadata["inputs"]}

    def json_inputs(self, rows: int = 2, nested: bool = False) -> list[dict[str, Any]]:
        """The inputs of a JSON request."""
        return [json_input(name, array, nested) for name, array in self.arrays(rows).items()]

    def infer(self, document: Any, *, path: str = "", tail: bytes = b"", headers: Mapping[str, str] | None = None) -> httpx.Response:
        """POST an inference request; with a tail, its JSON is the head of a binary one."""
        head = document if isinstance(document, bytes) else json.dumps(document).encode()
        kind = {"content-type": "application/json"}
        if tail:
            kind = {"content-type": "application/octet-stream", HEAD_LENGTH: str(len(head))}
        return self.http.post(f"{self.path}{path}/infer", content=head + tail, headers={**kind, **(headers or {})})

    def predict(self, document: Any, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """POST a V1 request."""
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        return self.http.post(
            f"/v1/models/{self.model}:predict", content=content, headers={"content-type": "application/json", **(headers or {})}
        )

    def outputs(self, answer: httpx.Response) -> dict[str, np.ndarray]:
        """The tensors of an answer, whatever their form; raises ``ValueError`` when they are not what their description says."""
        length = answer.headers.get(HEAD_LENGTH)
        head = answer.content if length is None else answer.content[: int(length)]
        rest = b"" if length is None else answer.content[int(length) :]
        tensors = {}
        for item in json.loads(head)["outputs"]:
            size = item.get("parameters", {}).get("binary_data_size") if isinstance(item.get("parameters"), dict) else None
            if size is None:
                tensors[item["name"]] = _from_json(item)
            else:
                tensors[item["name"]], rest = _from_bytes(item, rest[:size]), rest[size:]
        if rest:
            raise ValueError(f"{len(rest)} bytes follow the last tensor")
        return tensors


def json_input(name: str, array: np.ndarray, nested: bool = False) -> dict[str, Any]:
    """An input of a JSON request."""
    values = array if nested else array.reshape(-1)
    data = [value.decode() for value in values.tolist()] if array.dtype.kind == "O" else values.tolist()
    return {"name": name, "shape": list(array.shape), "datatype": datatype(array), "data": data}


def binary_input(name: str, array: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """An input of a binary request, and its bytes."""
    raw = b"".join(struct.pack("<I", len(value)) + value for value in array.reshape(-1)) if array.dtype.kind == "O" else array.tobytes()
    item = {"name": name, "shape": list(array.shape), "datatype": datatype(array), "parameters": {"binary_data_size": len(raw)}}
    return item, raw


def datatype(array: np.ndarray) -> str:
    """The protocol's name of an array's type."""
    return next(name for name, dtype in DTYPES.items() if np.dtype(dtype) == array.dtype)


def compressed(body: bytes, encoding: str) -> bytes:
    """A body in a content encoding; ``deflate`` is a zlib stream."""
    return gzip.compress(body) if encoding == "gzip" else zlib.compress(body)


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether answers are equal to the last bit."""
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and one[name].shape == other[name].shape and one[name].tolist() == other[name].tolist()
        for name in one
    )


def agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two answers are the same; floats but for rounding, as numeric libraries sum up batches of other sizes in another order."""
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-9 if one.dtype.itemsize == 8 else 1e-5, atol=1e-12, equal_nan=True)


def _values(spec: Mapping[str, Any], rows: int) -> np.ndarray:
    shape = [rows, *(size if size > 0 else 2 for size in spec["shape"][1:])]
    count = math.prod(shape)
    numbers = (np.arange(count) % 7).reshape(shape)
    if spec["datatype"] == "BYTES":
        return np.array([b"text %d" % number for number in numbers.reshape(-1)], dtype=object).reshape(shape)
    if spec["datatype"] == "BOOL":
        return numbers % 2 == 0
    return (numbers + 0.25 if spec["datatype"].startswith("FP") else numbers).astype(DTYPES[spec["datatype"]])


def _from_json(item: Mapping[str, Any]) -> np.ndarray:
    flat = _flat(item["data"])
    if item["datatype"] == "BYTES":
        flat = [value.encode() for value in flat]
    array = np.empty(len(flat), dtype=DTYPES[item["datatype"]])
    array[:] = flat
    return array.reshape(item["shape"])


def _flat(values: Sequence[Any]) -> list[Any]:
    return [leaf for value in values for leaf in (_flat(value) if isinstance(value, list) else [value])]


def _from_bytes(item: Mapping[str, Any], raw: bytes) -> np.ndarray:
    if item["datatype"] != "BYTES":
        return np.frombuffer(raw, DTYPES[item["datatype"]]).reshape(item["shape"])
    elements = []
    while raw:
        length = struct.unpack_from("<I", raw)[0]
        elements.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return np.array(elements, dtype=object).reshape(item["shape"])
