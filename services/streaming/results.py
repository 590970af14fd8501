"""How results are written. No I/O.

A result is a CloudEvent in binary mode. Its body has the form of its request: an ``InferenceResult`` with ``predictions`` for V1, one with
``outputs`` for V2 (which is a V2 response, too), V2 with binary tensors, or a ``ModelInferResponse``. A failed one is always an
``InferenceResult`` with ``error``.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import orjson

from libs.errors import MillraceError
from libs.inference import v1, v2, v2_grpc
from libs.inference.errors import printable
from libs.inference.requests import Groups, InferRequest, InferResponse
from libs.inference.routing import Route
from libs.inference.tensors import Array, json_ready
from libs.messaging.records import MAX_RECORD_BYTES
from libs.runner.wire import datatype_of
from schemas.topics import inference_results
from services.streaming.log import Given, Header
from services.streaming.requests import REFERENCE, Form, Request

COMPLETED = "millrace.serving.inference.completed.v1"
FAILED = "millrace.serving.inference.failed.v1"
SOURCE = "/millrace/streaming"

MAX_KEY_BYTES = 4096
"""A longer key is not repeated on the result: beside it there would be no room for the answer."""

MAX_VALUE_BYTES = MAX_RECORD_BYTES - 32 * 1024
"""A larger body goes to the artifact store; the rest is for key and headers, whose attributes are bounded."""

_JSON = b"application/json"


class ResultWriter:
    """Writes results of one endpoint that belong to one moment.

    Parameters
    ----------
    now
        The ``ce_time`` of all of them.
    """

    def __init__(self, endpoint_name: str, now: datetime) -> None:
        self._topic = inference_results(endpoint_name).name
        self._common: list[Header] = [
            ("ce_specversion", b"1.0"),
            ("ce_source", SOURCE.encode()),
            ("ce_time", now.isoformat().replace("+00:00", "Z").encode()),
            ("ce_subject", endpoint_name.encode()),
        ]
        self._completed = self._head(COMPLETED, _JSON)
        self._endpoint = orjson.dumps(endpoint_name)

    def rows(
        self, requests: Sequence[Request], counts: Sequence[int], route: Route, response: InferResponse, groups: Groups = ()
    ) -> list[Given]:
        """Results of V1 requests whose rows were asked together; several only if the response has exactly their rows, in their order."""
        predictions = _as_list(v1.predictions(response, groups))
        model = orjson.dumps(route.model_name)
        middle = b',"endpoint_name":%b,"status":"completed","model_name":%b,"model_version":%d,"predictions":' % (
            self._endpoint,
            model,
            route.version,
        )
        results = []
        begin = 0
        for request, count in zip(requests, counts, strict=True):
            body = predictions[begin : begin + count] if len(requests) > 1 else predictions
            begin += count
            value = b'{"request_id":%b%b%b}' % (orjson.dumps(request.id), middle, orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
            results.append(self._given(request, self._completed, value))
        return results

    def outputs(self, requests: Sequence[Request], counts: Sequence[int], route: Route, response: InferResponse) -> list[Given]:
        """Results of plain V2 requests that were asked together; ``response`` has exactly their rows, in their order."""
        beginning = b',"endpoint_name":%b,"status":"completed","model_name":%b,"model_version":"%d","outputs":[' % (
            self._endpoint,
            orjson.dumps(route.model_name),
            route.version,
        )
        outputs = [_Output(name, array) for name, array in response.outputs.items()]
        results = []
        begin = 0
        for request, count in zip(requests, counts, strict=True):
            tensors = b",".join([output.rows(begin, count) for output in outputs])
            begin += count
            value = b'{"request_id":%b%b%b]}' % (orjson.dumps(request.id), beginning, tensors)
            results.append(self._given(request, self._completed, value))
        return results

    def tensors(self, request: Request, asked: InferRequest, route: Route, response: InferResponse) -> Given:
        """The result of a request in one of the V2 forms."""
        version = str(route.version)
        if request.form is Form.PROTOBUF:
            value = v2_grpc.render(response, asked, route.model_name, version)
            return self._given(request, self._head(COMPLETED, request.content_type or v2_grpc.CONTENT_TYPE.encode()), value)
        value, head_length = v2.render(response, asked, route.model_name, version)
        if head_length is not None:
            head = self._head(COMPLETED, b"application/octet-stream")
            return self._given(request, [*head, ("inference-header-content-length", b"%d" % head_length)], value)
        beginning = {"request_id": request.id, "endpoint_name": request.endpoint_name, "status": "completed"}
        return self._given(request, self._completed, orjson.dumps(beginning)[:-1] + b"," + value[1:])

    def failed(self, request: Request, error: MillraceError) -> Given:
        """The result that says why there is no answer."""
        body = {
            "request_id": request.id,
            "endpoint_name": request.endpoint_name,
            "status": "failed",
            "error": printable(error.message),
        }
        return self._given(request, self._head(FAILED, _JSON), orjson.dumps(body))

    def reference(self, result: Given, sha256: str) -> Given:
        """The same result with its body in the artifact store."""
        return result._replace(value=b"", headers=[*result.headers, ("ce_dataref", f"{REFERENCE}{sha256}".encode())])

    def _head(self, event_type: str, content_type: bytes) -> list[Header]:
        return [("content-type", content_type), *self._common, ("ce_type", event_type.encode())]

    def _given(self, request: Request, head: Sequence[Header], value: bytes) -> Given:
        headers: list[Header] = [
            *head,
            ("ce_id", request.result_id.encode()),
            ("ce_correlationid", request.correlation_bytes),
            ("ce_causationid", request.id_bytes),
        ]
        if request.traceparent is not None:
            headers.append(("traceparent", request.traceparent.encode()))
        headers += request.tracing
        key = request.taken.key
        return Given(self._topic, key if key and len(key) <= MAX_KEY_BYTES else request.id_bytes, value, headers)


class _Output:
    """One output of a batch, from which the rows of each request are written as a V2 tensor."""

    def __init__(self, name: str, array: Array) -> None:
        self._head = b'{"name":%b,"datatype":"%b","shape":[' % (orjson.dumps(name), datatype_of(array.dtype).encode())
        self._rest = b"".join(b",%d" % size for size in array.shape[1:])
        self._width = math.prod(array.shape[1:])
        self._values = _as_list(json_ready(array.reshape(-1)))

    def rows(self, begin: int, count: int) -> bytes:
        values = self._values[begin * self._width : (begin + count) * self._width]
        return b'%b%d%b],"data":%b}' % (self._head, count, self._rest, orjson.dumps(values))


def _as_list(predictions: Any) -> Any:
    """Arrays as lists, whose slices cost nothing to write."""
    return predictions.tolist() if hasattr(predictions, "tolist") else predictions
