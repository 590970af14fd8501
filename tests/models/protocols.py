"""A table as a request of each protocol, and the predictions out of its answer."""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grpc
import httpx
import numpy as np
from confluent_kafka import Consumer, Producer, TopicPartition

from libs.inference.oip_proto.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from libs.runner.wire import encode_tensor
from tests.models.zoo import Rows

_KAFKA_S = 60.0


class Platform(Protocol):
    """Where requests go (``tests.e2e.platforms.RunningPlatform``)."""

    http: httpx.Client
    grpc_port: int
    kafka_port: int


def _cells(rows: Rows) -> dict[str, list[Any]]:
    """The columns as JSON values; a missing one is null."""
    return {str(name): [None if value != value else value for value in rows[name].tolist()] for name in rows.columns}


def _objects(rows: Rows) -> list[dict[str, Any]]:
    cells = _cells(rows)
    return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


def _tensor(name: str, values: list[Any], shape: list[int]) -> dict[str, Any]:
    datatype = "BYTES" if isinstance(values[0], str) else "BOOL" if isinstance(values[0], bool) else "FP64"
    return {"name": name, "shape": shape, "datatype": datatype, "data": values}


def _array(tensor: Mapping[str, Any]) -> Any:
    values = tensor["data"]
    if tensor["datatype"] == "BYTES":
        array = np.empty(len(values), dtype=object)
        array[:] = [value.encode() for value in values]
        return array
    if tensor["datatype"] == "BOOL":
        return np.array(values, dtype=bool)
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _said(answer: httpx.Response) -> Any:
    if answer.status_code != 200:
        raise AssertionError(f"{answer.status_code} {answer.text[:200]}")
    return answer.json()


def v1_rows(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """V1, a list for each row."""
    return _said(platform.http.post(f"/v1/models/{name}:predict", json={"instances": [list(row.values()) for row in _objects(rows)]}))[
        "predictions"
    ]


def v1_objects(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """V1, an object for each row."""
    return _said(platform.http.post(f"/v1/models/{name}:predict", json={"instances": _objects(rows)}))["predictions"]


def v1_columns(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """V1, a list for each column."""
    return _said(platform.http.post(f"/v1/models/{name}:predict", json={"inputs": _cells(rows)}))["predictions"]


def v2(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """V2, a tensor [n] for each column."""
    return _v2(platform, name, [_tensor(column, values, [len(rows)]) for column, values in _cells(rows).items()])


def v2_matrix_columns(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """V2, a tensor [n, 1] for each column."""
    return _v2(platform, name, [_tensor(column, values, [len(rows), 1]) for column, values in _cells(rows).items()])


def _v2(platform: Platform, name: str, tensors: list[dict[str, Any]]) -> list[Any]:
    answer = _said(platform.http.post(f"/v2/models/{name}/infer", json={"inputs": tensors}))
    return answer["outputs"][0]["data"]


def v2_binary(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """V2 with binary tensors."""
    inputs, tail = [], b""
    for column, values in _cells(rows).items():
        tensor = _tensor(column, values, [len(rows)])
        data = bytes(encode_tensor(column, _array(tensor))[1])
        inputs.append({"name": column, "shape": [len(rows)], "datatype": tensor["datatype"], "parameters": {"binary_data_size": len(data)}})
        tail += data
    head = json.dumps({"inputs": inputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "content-type": "application/octet-stream"}
    return _said(platform.http.post(f"/v2/models/{name}/infer", content=head + tail, headers=headers))["outputs"][0]["data"]


def v2_grpc(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """V2 over gRPC, typed contents."""
    request = ModelInferRequest(model_name=name)
    for column, values in _cells(rows).items():
        tensor = _tensor(column, values, [len(rows)])
        added = request.inputs.add(name=column, datatype=tensor["datatype"], shape=tensor["shape"])
        field = {"BYTES": "bytes_contents", "BOOL": "bool_contents", "FP64": "fp64_contents"}[tensor["datatype"]]
        getattr(added.contents, field).extend(_array(tensor).tolist())
    with grpc.insecure_channel(f"127.0.0.1:{platform.grpc_port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )
        contents = call(request, timeout=60).outputs[0].contents
    if contents.bytes_contents:
        return [value.decode() for value in contents.bytes_contents]
    return list(contents.int64_contents or contents.fp64_contents or contents.bool_contents or contents.int_contents)


def vertex(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """Vertex AI."""
    path = f"/v1/projects/p/locations/us-central1/endpoints/{name}:predict"
    return _said(platform.http.post(path, json={"instances": _objects(rows)}))["predictions"]


def mlflow_split(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """MLflow, ``dataframe_split``."""
    cells = _cells(rows)
    split = {"columns": list(cells), "data": [list(row) for row in zip(*cells.values(), strict=True)]}
    return _said(platform.http.post(f"/endpoints/{name}/invocations", json={"dataframe_split": split}))["predictions"]


def mlflow_records(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """MLflow, ``dataframe_records``."""
    return _said(platform.http.post(f"/endpoints/{name}/invocations", json={"dataframe_records": _objects(rows)}))["predictions"]


def csv(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """CSV as ``DataFrame.to_csv`` writes it."""
    content = rows.to_csv(index=False).encode()
    return _said(platform.http.post(f"/endpoints/{name}/invocations", content=content, headers={"content-type": "text/csv"}))["predictions"]


def kafka(platform: Platform, name: str, rows: Rows) -> list[Any]:
    """Streaming inference, a V1 body."""
    servers, topic, key = f"127.0.0.1:{platform.kafka_port}", f"millrace.inference.{name}", uuid.uuid4().hex
    consumer = Consumer({"bootstrap.servers": servers, "group.id": key, "enable.auto.commit": False, "isolation.level": "read_committed"})
    try:
        partitions = consumer.list_topics(f"{topic}.results", timeout=10).topics[f"{topic}.results"].partitions
        places = [TopicPartition(f"{topic}.results", partition) for partition in partitions]
        for place in places:
            place.offset = consumer.get_watermark_offsets(place, timeout=10)[1]
        consumer.assign(places)
        producer = Producer({"bootstrap.servers": servers})
        producer.produce(f"{topic}.requests", json.dumps({"instances": _objects(rows)}), key)
        producer.flush(10)
        end = time.monotonic() + _KAFKA_S
        while time.monotonic() < end:
            message = consumer.poll(0.5)
            if message is not None and not message.error() and message.key() == key.encode():
                result = json.loads(message.value())
                if result["status"] != "completed":
                    raise AssertionError(result["error"])
                return list(result["predictions"])
    finally:
        consumer.close()
    raise AssertionError(f"no result within {_KAFKA_S:g} s")


PROTOCOLS: tuple[Callable[[Platform, str, Rows], list[Any]], ...] = (
    v1_rows,
    v1_objects,
    v1_columns,
    v2,
    v2_matrix_columns,
    v2_binary,
    v2_grpc,
    vertex,
    mlflow_split,
    mlflow_records,
    csv,
    kafka,
)
