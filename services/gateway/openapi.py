"""The OpenAPI document of all routes: what FastAPI knows of the management API, and a table of the routes that it does not answer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from services.gateway.doors.headers import MAX_TIMEOUT_MS
from services.gateway.openapi_schemas import EXAMPLES, SCHEMAS, ref
from services.gateway.routes import PATTERNS, ROUTES, HttpRoute

Document = dict[str, Any]

JSON = "application/json"
_CSV, _NPY, _BINARY, _EVENT, _TEXT, _HTML = (
    "text/csv",
    "application/x-npy",
    "application/octet-stream",
    "application/cloudevents+json",
    "text/plain",
    "text/html",
)

DESCRIPTION = """
The predict doors, what they tell of themselves, and the management API.

What the protocols call a model is an *endpoint*; its traffic split decides which version answers. Every answer has `x-request-id`, and
every prediction `x-millrace-model-version`. Errors have the form that the clients of a path know. What is no proper HTTP (or has too long a
URL, too large a head, …) is refused by the server with 400, 408, 413, 414, 417, 431, 501 or 505 and `{"error": "one sentence"}`.
"""

_ERRORS: Mapping[int, str] = {
    400: "Malformed, or it does not fit; the message names the place, what is expected and what came.",
    401: "No key, or an unknown one.",
    403: "The key may not do this; or, without keys, a web page of another site asks.",
    404: "There is nothing of this name.",
    405: "The path does not take this method.",
    406: "None of the forms that the caller accepts is known.",
    409: "Its state does not allow it.",
    413: "The body, also uncompressed, is too large.",
    415: "A content type, or a character set, that is not taken here.",
    422: "The content cannot be used.",
    429: "Too many requests wait already.",
    500: "The model raised on a request that fits it, or there is a bug; the gateway's log has it under `x-request-id`.",
    503: "Nothing is deployed, or nobody answers at the moment.",
    504: "No answer within the request's time.",
}
_USUAL = (400, 401, 403, 405, 413)
_PREDICT = (*_USUAL, 404, 429, 500, 503, 504)

_PREDICT_HEADERS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "x-request-id": (
        {"type": "string", "pattern": "^[A-Za-z0-9._:/+=-]{1,128}$"},
        "Id of this request, which the answer, the log and the traces carry; absent, or of other characters: one is made.",
    ),
    "x-request-timeout-ms": (
        {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
        "Time that the request may take, in milliseconds; then it is answered 504.",
    ),
    "traceparent": ({"type": "string"}, "W3C trace context, continued through the gateway and the runner; a malformed one is passed over."),
    "prefer": ({"type": "string", "examples": ["respond-async"]}, "`respond-async`: answer 202 at once; the result is fetched later."),
    "x-millrace-webhook": ({"type": "string", "format": "uri"}, "With `respond-async`: URL that is told of the end."),
    "x-millrace-expires-s": (
        {"type": "integer", "minimum": 1, "maximum": 604_800},
        "With `respond-async`: time after which the operation is forgotten, in seconds.",
    ),
    "inference-header-content-length": (
        {"type": "integer", "minimum": 1},
        "Bytes of the JSON head when binary tensors follow it.",
    ),
    "x-amzn-sagemaker-target-variant": ({"type": "string"}, "A version, an alias or a deployment id of the endpoint."),
}
_COMMON_HEADERS = ("x-request-id", "x-request-timeout-ms", "traceparent", "prefer", "x-millrace-webhook", "x-millrace-expires-s")

_ANSWER_HEADERS: Mapping[str, str] = {
    "x-request-id": "Id of the request.",
    "x-millrace-model-version": "`<model>@<version>` that answered.",
    "inference-header-content-length": "Bytes of the JSON head when binary tensors follow it.",
    "retry-after": "Seconds after which to come back.",
}


@dataclass(frozen=True)
class Operation:
    """A row of the table.

    Attributes
    ----------
    takes, gives
        Schema names by content type; an empty name stands for anything. ``gives`` is what 200 is answered with.
    also
        Answers beside 200 and errors: schema names by status.
    errors
        Statuses that are answered with ``error``, the schema of the family.
    """

    tag: str
    summary: str
    gives: Mapping[str, str]
    takes: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[int, str] = field(default_factory=dict)
    errors: tuple[int, ...] = _USUAL
    error: str = "Error"
    headers: tuple[str, ...] = ()
    predicts: bool = False


def _told(tag: str, summary: str, schema: str = "", *, errors: tuple[int, ...] = (), content: str = JSON, **more: Any) -> Operation:
    return Operation(tag, summary, {content: schema}, errors=(*_USUAL, *errors), **more)


def _predicts(tag: str, summary: str, takes: Mapping[str, str], gives: Mapping[str, str], *headers: str, **more: Any) -> Operation:
    shown = (*_COMMON_HEADERS, *headers)
    return Operation(tag, summary, gives, takes, {202: "AcceptedOperation"}, **{"errors": _PREDICT, **more}, headers=shown, predicts=True)


_TYPED = (*_PREDICT, 415)
_V1 = _predicts("V1", "Predict.", {JSON: "V1Request", _EVENT: "CloudEvent"}, {JSON: "V1Response", _EVENT: "CloudEvent"}, errors=_TYPED)
_V1_MODEL = _told("V1", "Whether an endpoint answers, and the state of its versions.", "V1Model", errors=(404,), also={503: "V1Model"})
_V2 = _predicts(
    "V2",
    "Infer.",
    {JSON: "V2Request", _BINARY: ""},
    {JSON: "V2Response", _BINARY: ""},
    "inference-header-content-length",
    errors=_TYPED,
)
_V2_MODEL = _told("V2", "What an endpoint takes and gives.", "V2Model", errors=(404, 503))
_V2_READY = _told("V2", "Whether an endpoint answers.", "V2Ready", errors=(404,), also={503: "NotReady"})
_V2_CONFIG = _told("V2", "The same in the words of Triton's model configuration.", "V2Config", errors=(404, 503))
_V2_STATS = _told("V2", "How many requests and executions there were, and what they took (Triton's statistics).", "V2Stats", errors=(404,))
_V2_SERVER = _told("V2", "Name, version and extensions of the server.", "V2Server")
_GOOGLE: Mapping[str, Any] = {"error": "GoogleError"}
_VERTEX = _predicts("Vertex AI", "Predict.", {JSON: "VertexRequest"}, {JSON: "VertexResponse"}, errors=_TYPED, **_GOOGLE)
_RAW_FORMS = {_CSV: "", _NPY: "", _BINARY: ""}
_VERTEX_RAW = _predicts(
    "Vertex AI",
    "Predict on a body that any other door takes; it is answered as that door answers.",
    {JSON: "RawRequest", **_RAW_FORMS},
    {JSON: "", _CSV: "", _NPY: ""},
    errors=(*_PREDICT, 406, 415),
    **_GOOGLE,
)
_VERTEX_ENDPOINT = _told("Vertex AI", "An endpoint, its deployments and their traffic.", "VertexEndpoint", errors=(404,), **_GOOGLE)
_SCORE = _predicts(
    "SageMaker, MLflow",
    "Predict; the answer is in the form that `Accept` asks for.",
    {JSON: "ScoringRequest", **_RAW_FORMS},
    {JSON: "V1Response", _CSV: "", _NPY: ""},
    "x-amzn-sagemaker-target-variant",
    errors=(*_PREDICT, 406, 415),
    error="ScoringError",
)
_PING = _told("SageMaker, MLflow", "Whether the gateway can do its work.", errors=(503,), error="ScoringError")
_VERTEX_BASE = "/projects/{project}/locations/{location}/endpoints/{endpoint}"

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/healthz"): _told("health", "Whether the gateway can do its work.", errors=(503,)),
    ("GET", "/metrics"): Operation("health", "Metrics, as Prometheus reads them.", {_TEXT: "", "application/openmetrics-text": ""}),
    ("GET", "/"): _told("V1", "KServe's liveness."),
    ("GET", "/v1/models"): _told("V1", "Names of all endpoints.", "V1Models"),
    ("POST", "/v1/models/{model}:predict"): _V1,
    ("POST", "/v1/models/{model}/versions/{version}:predict"): _V1,
    ("POST", "/v1/models/{model}/labels/{alias}:predict"): _V1,
    ("GET", "/v1/models/{model}"): _V1_MODEL,
    ("GET", "/v1/models/{model}/versions/{version}"): _V1_MODEL,
    ("GET", "/v1/models/{model}/labels/{alias}"): _V1_MODEL,
    ("GET", "/v2/health/live"): _told("V2", "Whether the process answers."),
    ("GET", "/v2/health/ready"): _told("V2", "Whether the gateway can do its work.", also={503: "NotReady"}),
    ("GET", "/v2"): _V2_SERVER,
    ("GET", "/v2/"): _V2_SERVER,
    ("GET", "/v2/models"): _told("V2", "Names of all endpoints.", "V1Models"),
    ("GET", "/v2/models/{model}"): _V2_MODEL,
    ("GET", "/v2/models/{model}/versions/{version}"): _V2_MODEL,
    ("GET", "/v2/models/{model}/ready"): _V2_READY,
    ("GET", "/v2/models/{model}/versions/{version}/ready"): _V2_READY,
    ("POST", "/v2/models/{model}/infer"): _V2,
    ("POST", "/v2/models/{model}/versions/{version}/infer"): _V2,
    ("GET", "/v2/models/{model}/config"): _V2_CONFIG,
    ("GET", "/v2/models/{model}/versions/{version}/config"): _V2_CONFIG,
    ("GET", "/v2/models/stats"): _told("V2", "The statistics of every version at every endpoint.", "V2Stats"),
    ("GET", "/v2/models/{model}/stats"): _V2_STATS,
    ("GET", "/v2/models/{model}/versions/{version}/stats"): _V2_STATS,
    ("POST", "/v2/repository/index"): _told("V2", "Every version at every endpoint.", "V2Index", takes={JSON: "V2IndexRequest"}),
    ("POST", "/v2/repository/models/{model}/load"): _told("V2", "Whether what is deployed answers.", errors=(404, 503)),
    ("POST", "/v2/repository/models/{model}/unload"): _told("V2", "Refused: deployments say what is loaded.", errors=(404, 409)),
    ("GET", "/ping"): _PING,
    ("GET", "/health"): _PING,
    ("GET", "/version"): _told("SageMaker, MLflow", "Millrace's version.", content=_TEXT, error="ScoringError"),
    ("POST", "/invocations"): _SCORE,
    ("POST", "/endpoints/{endpoint}/invocations"): _SCORE,
    ("GET", "/api/2.0/endpoints/"): _told("SageMaker, MLflow", "All endpoints.", "ScoringEndpoints", error="ScoringError"),
    ("GET", "/api/2.0/endpoints/{endpoint}"): _told(
        "SageMaker, MLflow", "One endpoint.", "ScoringEndpoint", errors=(404,), error="ScoringError"
    ),
    **{("POST", f"{base}{_VERTEX_BASE}:predict"): _VERTEX for base in ("/v1", "/v1beta1")},
    **{("POST", f"{base}{_VERTEX_BASE}:rawPredict"): _VERTEX_RAW for base in ("/v1", "/v1beta1")},
    **{("GET", f"{base}{_VERTEX_BASE}"): _VERTEX_ENDPOINT for base in ("/v1", "/v1beta1")},
    ("GET", "/api/v1/predictions/{operation_id}"): _told("asynchronous", "How an operation is doing.", "Operation", errors=(404,)),
    ("GET", "/api/v1/predictions/{operation_id}/result"): Operation(
        "asynchronous",
        "The answer that the request would have got if it had waited, its status too; 202 while there is none.",
        {JSON: "", _CSV: "", _NPY: "", _BINARY: ""},
        also={202: "PendingResult"},
        errors=(*_PREDICT, 406, 415),
        error="",
    ),
    ("POST", "/api/v1/predictions/{operation_id}:cancel"): _told(
        "asynchronous", "End an operation that has not ended.", "Operation", errors=(404, 503)
    ),
    ("GET", "/docs"): _told("about", "This page.", content=_HTML),
    ("GET", "/docs/oauth2-redirect"): _told("about", "Part of this page.", content=_HTML),
    ("GET", "/static-offline-docs/{file}"): _told("about", "Part of this page.", errors=(404,), content="*/*"),
    ("GET", "/openapi.json"): _told("about", "This document."),
}
"""By method and route template: all routes that the management API does not declare itself."""

_COMMANDED: Mapping[int, str] = {
    200: "Done, or there was nothing to do.",
    201: "Done; something new is there.",
    202: "Not done yet; the body names the operation.",
}
_MANAGEMENT_ERRORS = (400, 401, 403, 404, 405, 409, 413, 422, 503)


def document(management: Document) -> Document:
    """The document of all routes.

    Parameters
    ----------
    management
        The document that FastAPI makes of the management API; not changed.
    """
    paths: dict[str, Document] = {}
    for route in ROUTES:
        declared = management["paths"].get(route.template, {}).get(route.method.lower())
        described = _described(route, OPERATIONS[route.method, route.template]) if declared is None else _managed(declared)
        described["security"] = [] if route.permission is None else [{"bearer": []}, {"google": []}]
        paths.setdefault(route.template, {})[route.method.lower()] = described
    schemas = {**management["components"]["schemas"], **SCHEMAS}
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "google": {"type": "apiKey", "in": "header", "name": "x-goog-api-key"},
    }
    return {
        **management,
        "info": {**management["info"], "description": DESCRIPTION.strip()},
        "paths": paths,
        "components": {**management["components"], "schemas": schemas, "securitySchemes": keys},
    }


def _described(route: HttpRoute, row: Operation) -> Document:
    responses = {"200": _answer("As asked.", row.gives, predicts=row.predicts)}
    for status, schema in row.also.items():
        responses[str(status)] = _answer(HTTPStatus(status).phrase, {JSON: schema})
    for status in row.errors:
        responses.setdefault(str(status), _answer(_ERRORS[status], {JSON: row.error}))
    described: Document = {
        "tags": [row.tag],
        "summary": row.summary.rstrip("."),
        "description": row.summary,
        "operationId": _operation_id(route),
        "parameters": [*_path_parameters(route.template), *map(_header, row.headers)],
        "responses": dict(sorted(responses.items())),
    }
    if row.takes:
        content = {media_type: _content(schema) for media_type, schema in row.takes.items()}
        described["requestBody"] = {"required": row.predicts, "content": content}
    return described


def _managed(declared: Document) -> Document:
    """An operation as FastAPI declares it, with the errors that are really answered."""
    parameters = [_with_pattern(each) for each in declared.get("parameters", ())]
    responses = {status: answer for status, answer in declared["responses"].items() if status != "422"}
    if "prefer" in [each["name"] for each in parameters]:
        for status, meaning in _COMMANDED.items():
            responses[str(status)] = _answer(meaning, {JSON: ""})
    for status in _MANAGEMENT_ERRORS:
        responses[str(status)] = _answer(_ERRORS[status], {JSON: "Error"})
    return {**declared, "parameters": parameters, "responses": dict(sorted(responses.items()))}


def _answer(description: str, contents: Mapping[str, str], *, predicts: bool = False) -> Document:
    names = ("x-request-id", *(("x-millrace-model-version",) if predicts else ()))
    headers = {name: {"description": _ANSWER_HEADERS[name], "schema": {"type": "string"}, "required": True} for name in names}
    return {"description": description, "headers": headers, "content": {each: _content(schema) for each, schema in contents.items()}}


def _content(schema: str) -> Document:
    if not schema:
        return {"schema": {}}
    examples = {name: {"value": value} for name, value in EXAMPLES.get(schema, {}).items()}
    return {"schema": ref(schema), **({"examples": examples} if examples else {})}


def _header(name: str) -> Document:
    schema, description = _PREDICT_HEADERS[name]
    return {"name": name, "in": "header", "required": False, "schema": dict(schema), "description": description}


def _path_parameters(template: str) -> Iterator[Document]:
    for segment in template.split("/"):
        if segment.startswith("{"):
            name = segment[1 : segment.index("}")]
            yield _with_pattern({"name": name, "in": "path", "required": True, "schema": {"type": "string"}})


def _with_pattern(parameter: Document) -> Document:
    if parameter["in"] != "path":
        return parameter
    return {**parameter, "schema": {**parameter["schema"], "pattern": f"^(?:{PATTERNS[parameter['name']]})$"}}


def _operation_id(route: HttpRoute) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in f"{route.method.lower()} {route.template}").split()
    return "_".join(words) + ("_" if route.template.endswith("/") and route.template != "/" else "")
