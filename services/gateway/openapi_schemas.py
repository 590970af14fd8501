"""Schemas of the bodies that the predict doors take and give, as ``openapi.py`` refers to them by name."""

from collections.abc import Mapping
from typing import Any

from libs.runner.wire import NUMPY_DTYPES

Schema = Mapping[str, Any]

_STRING: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_ANYTHING: Schema = {}
_DATATYPES = (*NUMPY_DTYPES, "BF16")
_NAMES: Schema = {
    "type": "array",
    "items": _STRING,
    "description": "Outputs to answer with; absent: the model's first. `predict_proba` stands for those of all targets.",
}
_ROWS: Schema = {
    "type": "array",
    "minItems": 1,
    "items": _ANYTHING,
    "description": "Rows: each a list, or an object by column (of a model on a table, or one that was trained with names) or by input "
    'name. Optional columns may be left out; `null` is a missing value, and `{"b64": …}` stands for bytes.',
}
_COLUMNS: Schema = {
    "type": ["array", "object"],
    "description": "The rows of the model's one input, or an object of lists: the columns of a table by their names, or whole inputs.",
}
_VERSION_STATUS: Schema = {
    "type": "object",
    "required": ["version", "state", "status"],
    "properties": {"version": _STRING, "state": {"enum": ["LOADING", "AVAILABLE", "END"]}, "status": _OBJECT},
}
_SPEC: Schema = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": _STRING,
        "datatype": _STRING,
        "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}},
        "parameters": {
            "type": "object",
            "description": "Of a column of a table: its dtype, and whether a request may leave it out. Of a matrix: its columns by name.",
            "properties": {"dtype": _STRING, "optional": {"const": True}, "columns": {"type": "array", "items": _STRING}},
        },
    },
}


def _object(required: str = "", **properties: Schema) -> Schema:
    """An object; ``required`` are names with spaces between."""
    return {"type": "object", **({"required": required.split()} if required else {}), "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def ref(name: str) -> Schema:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


_MLFLOW_FORMS: Mapping[str, Schema] = {
    "instances": _ROWS,
    "inputs": _COLUMNS,
    "dataframe_split": _object(
        "data", columns=_list({"type": ["string", "integer"]}), index=_list(_ANYTHING), data=_list(_list(_ANYTHING))
    ),
    "dataframe_records": {**_list(_OBJECT), "minItems": 1},
}

_COUNT = {"type": "integer", "minimum": 0}
_TOOK = _object("count ns", count=_COUNT, ns=_COUNT)
_COMPUTED = {"compute_input": _TOOK, "compute_infer": _TOOK, "compute_output": _TOOK}
_STATS = _object(
    "name version last_inference inference_count execution_count inference_stats batch_stats",
    name=_STRING,
    version=_STRING,
    last_inference={**_COUNT, "description": "When the last request came, in milliseconds since 1970; 0: none did."},
    inference_count={**_COUNT, "description": "Rows of requests with success."},
    execution_count={**_COUNT, "description": "Batches that the model has answered."},
    inference_stats=_object(
        "success fail queue compute_input compute_infer compute_output",
        success=_TOOK,
        fail=_TOOK,
        queue=_TOOK,
        **_COMPUTED,
        cache_hit=_TOOK,
        cache_miss=_TOOK,
    ),
    batch_stats=_list(_object("batch_size compute_input compute_infer compute_output", batch_size=_COUNT, **_COMPUTED)),
)

SCHEMAS: Mapping[str, Schema] = {
    "Error": _object("error", error=_STRING),
    "GoogleError": _object("error", error=_object("code message status", code={"type": "integer"}, message=_STRING, status=_STRING)),
    "ScoringError": _object("error_code message", error_code=_STRING, message=_STRING),
    "NotReady": _object("ready error", name=_STRING, ready={"const": False}, error=_STRING),
    "V1Request": {
        **_object(instances=_ROWS, inputs=_COLUMNS, outputs=_NAMES, parameters={"type": ["object", "null"]}),
        "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
    },
    "V1Response": _object("predictions", predictions={"description": "One prediction for each row; with several outputs, an object each."}),
    "V1Models": _object("models", models=_list(_STRING)),
    "V1Model": _object("name ready", name=_STRING, ready={"type": "boolean"}, error=_STRING, model_version_status=_list(_VERSION_STATUS)),
    "CloudEvent": _object("specversion id source type", specversion=_STRING, id=_STRING, source=_STRING, type=_STRING, data=_OBJECT),
    "V2Request": _object(
        "inputs",
        id={"type": ["string", "null"], "description": "Comes back in the answer."},
        parameters=_object(binary_data_output={"type": "boolean"}),
        inputs={
            **_list(ref("V2Input")),
            "minItems": 1,
            "description": "A tensor for each input; of a table (or a matrix with names) one for each column. The metadata names them.",
        },
        outputs={
            **_list(_object("name", name=_STRING, parameters=_object(binary_data={"type": "boolean"}))),
            "description": "Outputs to answer with; absent or empty: all of them.",
        },
    ),
    "V2Input": _object(
        "name shape datatype",
        name=_STRING,
        shape=_list({"type": "integer", "minimum": 1}),
        datatype={"enum": _DATATYPES},
        parameters=_object(binary_data_size={"type": "integer", "minimum": 0}),
        data={"type": "array", "description": "Flat or nested; absent when the tensor is binary."},
    ),
    "V2Response": _object(
        "model_name model_version id outputs",
        model_name=_STRING,
        model_version=_STRING,
        id=_STRING,
        outputs=_list(
            _object("name shape datatype", name=_STRING, shape=_list({"type": "integer"}), datatype=_STRING, data={"type": "array"})
        ),
    ),
    "V2Server": _object("name version extensions", name=_STRING, version=_STRING, extensions=_list(_STRING)),
    "V2Model": _object(
        "name versions platform inputs outputs",
        name=_STRING,
        versions=_list(_STRING),
        platform=_STRING,
        inputs={**_list(_SPEC), "description": "One input for each column where the model is on a table, else its tensors."},
        outputs=_list(_SPEC),
    ),
    "V2Ready": _object("name ready", name=_STRING, ready={"const": True}),
    "V2Config": _object("name platform backend max_batch_size input output", name=_STRING, platform=_STRING, backend=_STRING),
    "V2Stats": _object("model_stats", model_stats=_list(_STATS)),
    "V2IndexRequest": _object(ready={"type": "boolean", "description": "Only versions that answer."}),
    "V2Index": _list(_object("name version state reason", name=_STRING, version=_STRING, state=_STRING, reason=_STRING)),
    "VertexRequest": _object("instances", instances=_ROWS, parameters={"type": ["object", "null"]}),
    "VertexResponse": _object(
        "predictions deployedModelId model modelDisplayName modelVersionId",
        predictions=_list(_ANYTHING),
        deployedModelId=_STRING,
        model=_STRING,
        modelDisplayName=_STRING,
        modelVersionId=_STRING,
    ),
    "VertexEndpoint": _object(
        "name displayName deployedModels trafficSplit", name=_STRING, displayName=_STRING, deployedModels=_list(_OBJECT)
    ),
    "HttpBody": _object("httpBody", httpBody=_object("data", contentType=_STRING, data={"type": "string", "contentEncoding": "base64"})),
    "RawRequest": {"anyOf": [ref("HttpBody"), ref("ScoringRequest"), ref("V2Request")]},
    "ScoringRequest": {
        "type": "object",
        "properties": {**_MLFLOW_FORMS, "params": {"type": ["object", "null"]}},
        "oneOf": [{"required": [form]} for form in _MLFLOW_FORMS],
    },
    "ScoringEndpoint": _object("name endpoint_type model endpoint_url limit", name=_STRING, endpoint_type=_STRING, model=_OBJECT),
    "ScoringEndpoints": _object("endpoints", endpoints=_list(ref("ScoringEndpoint"))),
    "AcceptedOperation": _object(
        "operation_id operation_url result_url status expires_at",
        operation_id=_STRING,
        operation_url=_STRING,
        result_url=_STRING,
        status={"const": "pending"},
        expires_at={"type": "string", "format": "date-time"},
    ),
    "Operation": _object(
        "operation_id endpoint_name status done accepted_at expires_at",
        operation_id=_STRING,
        endpoint_name=_STRING,
        status={"enum": ["pending", "completed", "failed", "expired", "cancelled"]},
        done={"type": "boolean"},
        http_status={"type": "integer"},
        result_url=_STRING,
        webhook=_STRING,
    ),
    "PendingResult": _object("operation_id status", operation_id=_STRING, status={"const": "pending"}),
}
"""By name; a body may have members beside those listed, which are passed over."""

_IRIS = [[5.1, 3.5, 1.4, 0.2]]
_TENSOR = {"name": "input", "shape": [1, 4], "datatype": "FP64"}

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "V1Request": {
        "rows": {"instances": _IRIS},
        "rows by column": {"instances": [{"age": 34, "city": "Lyon"}]},
        "other outputs": {"instances": _IRIS, "outputs": ["predict_proba"]},
        "columns": {"inputs": {"age": [34, None], "city": ["Lyon", "Paris"]}},
    },
    "V2Request": {
        "one input": {"id": "42", "inputs": [{**_TENSOR, "data": _IRIS[0]}], "outputs": [{"name": "predict"}]},
        "columns of a table": {
            "inputs": [
                {"name": "age", "shape": [2], "datatype": "FP64", "data": [34, None]},
                {"name": "city", "shape": [2], "datatype": "BYTES", "data": ["Lyon", "Paris"]},
            ]
        },
    },
    "VertexRequest": {"rows": {"instances": _IRIS}, "other outputs": {"instances": _IRIS, "parameters": {"outputs": ["predict_proba"]}}},
    "RawRequest": {"V1": {"instances": _IRIS}, "V2": {"inputs": [{**_TENSOR, "data": _IRIS[0]}]}},
    "ScoringRequest": {
        "instances": {"instances": _IRIS},
        "a data frame": {"dataframe_split": {"columns": ["age", "city"], "data": [[34, "Lyon"]]}},
        "records": {"dataframe_records": [{"age": 34, "city": "Lyon"}]},
    },
    "CloudEvent": {"rows": {"specversion": "1.0", "id": "1", "source": "/me", "type": "ask", "data": {"instances": _IRIS}}},
    "V2IndexRequest": {"ready": {"ready": True}},
}
"""By the name of a request's schema."""
