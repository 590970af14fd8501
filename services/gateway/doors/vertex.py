"""The door of Vertex AI's online prediction: ``…/endpoints/{endpoint}:predict`` and ``:rawPredict``, under ``/v1`` and ``/v1beta1``.

``{endpoint}`` is one of our endpoints; project and location may be any valid name and come back in the answer.

References
----------
Vertex AI REST reference, ``projects.locations.endpoints``; google-cloud-aiplatform ``prediction_service/transports/rest_base.py`` and
``models.py`` (``Endpoint.predict``).
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from libs.inference import tabular, v2, vertex
from libs.inference.requests import InferRequest
from schemas.inference import Signature
from schemas.registry import DeploymentSnapshot
from services.gateway.catalog import Catalog
from services.gateway.doors.compression import compressed
from services.gateway.doors.headers import NPY, OCTETS, check_content_type, content_of, timeout_ms, who
from services.gateway.doors.invocations import MEDIA_TYPES, Form, answer_form, content_form, parse_content, writable, write_content
from services.gateway.exchange import Incoming, Outgoing, json_answer
from services.gateway.predictions import Ask, Handler, Prediction, Protocol, Read, Target

_BASES = ("/v1", "/v1beta1")
_ENDPOINT = "/projects/{project}/locations/{location}/endpoints/{endpoint}"


def reads(max_bytes: int) -> Mapping[tuple[str, str], Read]:
    """The predict routes; ``max_bytes`` is the largest body after decompression."""
    methods: Mapping[str, Read] = {
        ":predict": partial(_predict, max_bytes=max_bytes),
        ":rawPredict": partial(_raw_predict, max_bytes=max_bytes),
    }
    return {("POST", f"{base}{_ENDPOINT}{method}"): read for base in _BASES for method, read in methods.items()}


def handlers(catalog: Catalog) -> Mapping[tuple[str, str], Handler]:
    """The endpoint itself, which Google's SDK reads before its first prediction; the rest of the management surface is not here."""

    async def endpoint(incoming: Incoming) -> Outgoing:
        """An endpoint, its deployments and their traffic."""
        return json_answer(_endpoint(catalog, incoming))

    return {("GET", f"{base}{_ENDPOINT}"): endpoint for base in _BASES}


def _predict(incoming: Incoming, max_bytes: int) -> Ask:
    check_content_type(incoming)

    def parse(signature: Signature) -> InferRequest:
        return vertex.parse(content_of(incoming, max_bytes), signature)

    def write(prediction: Prediction) -> Outgoing:
        about = {
            "deployedModelId": prediction.route.deployment_id,
            "model": _model_name(incoming, prediction.route.model_name),
            "modelDisplayName": prediction.route.model_name,
            "modelVersionId": str(prediction.route.version),
        }
        answer = Outgoing(vertex.render(prediction.response, about, prediction.request.groups), headers=who(prediction))
        return compressed(answer, incoming.headers.get(b"accept-encoding"))

    return Ask(Target(incoming.parameters["endpoint"]), Protocol.VERTEX, parse, write, timeout_ms(incoming))


def _raw_predict(incoming: Incoming, max_bytes: int) -> Ask:
    check_content_type(incoming, OCTETS, NPY)
    raw = _Raw(incoming, max_bytes)
    return Ask(Target(incoming.parameters["endpoint"]), Protocol.VERTEX, raw.parse, raw.write, timeout_ms(incoming))


class _Raw:
    """A ``:rawPredict``: whatever the other doors take, told by content, and answered as they answer.

    Google's REST transport wraps the body in a ``google.api.HttpBody``, and wants the answer wrapped. What a body is, is known once
    ``parse`` has seen it; ``write`` comes after.
    """

    def __init__(self, incoming: Incoming, max_bytes: int) -> None:
        self._incoming = incoming
        self._max_bytes = max_bytes
        self._form = answer_form(incoming.header(b"accept"))
        self._is_wrapped = False
        self._is_v2 = False

    def parse(self, signature: Signature) -> InferRequest:
        """The body as tensors, whichever form it has."""
        body: bytes | bytearray = content_of(self._incoming, self._max_bytes)
        content_type = _useful(self._incoming.header(b"content-type"))
        document = _document(body, content_type)
        wrapped = None if document is None else vertex.read_http_body(document)
        if wrapped is not None:
            self._is_wrapped, self._form = True, Form.JSON
            body, content_type = wrapped[1], _useful(wrapped[0])
            document = _document(body, content_type)
        if document is None:
            return writable(parse_content(body, content_type, signature), self._form, signature)
        self._is_v2 = _is_v2(document)
        if self._is_v2:
            return replace(v2.from_document(document, signature), binary_data_output=False, binary_data={})
        return writable(tabular.from_document(document, signature), self._form, signature)

    def write(self, prediction: Prediction) -> Outgoing:
        """The answer in the form that the request came in."""
        route = prediction.route
        form = Form.JSON if self._is_v2 else self._form
        if self._is_v2:
            version, request_id = str(route.version), self._incoming.request_id
            content, _ = v2.render(prediction.response, prediction.request, route.endpoint_name, version, request_id)
        else:
            content = write_content(prediction, form)
        media_type = MEDIA_TYPES[form]
        if self._is_wrapped:
            content, media_type = vertex.render_http_body(media_type, content), MEDIA_TYPES[Form.JSON]
        headers = (*who(prediction), *_vertex_headers(self._incoming, prediction))
        return compressed(Outgoing(content, 200, media_type.encode(), headers), self._incoming.headers.get(b"accept-encoding"))


def _document(body: bytes | bytearray, content_type: str | None) -> dict[str, Any] | None:
    """The body as an object, if it is JSON."""
    return tabular.parse_lenient(body) if body and content_form(body, content_type)[0] is Form.JSON else None


def _useful(content_type: str | None) -> str | None:
    """The content type, if it says something of the content that can be used."""
    media_type = (content_type or "").split(";")[0].strip().lower()
    return content_type if media_type in MEDIA_TYPES.values() else None


def _is_v2(document: Mapping[str, Any]) -> bool:
    inputs = document.get("inputs")
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], dict) and "datatype" in inputs[0]


def _location(parameters: Mapping[str, str]) -> str:
    return f"projects/{parameters['project']}/locations/{parameters['location']}"


def _model_name(incoming: Incoming, model_name: str) -> str:
    return f"{_location(incoming.parameters)}/models/{model_name}"


def _vertex_headers(incoming: Incoming, prediction: Prediction) -> tuple[tuple[bytes, bytes], ...]:
    route = prediction.route
    return (
        (b"x-vertex-ai-endpoint-id", route.endpoint_name.encode()),
        (b"x-vertex-ai-deployed-model-id", route.deployment_id.encode()),
        (b"x-vertex-ai-model", _model_name(incoming, route.model_name).encode()),
        (b"x-vertex-ai-model-version-id", str(route.version).encode()),
    )


def _endpoint(catalog: Catalog, incoming: Incoming) -> dict[str, Any]:
    name = incoming.parameters["endpoint"]
    endpoint = catalog.endpoint(name)
    return {
        "name": f"{_location(incoming.parameters)}/endpoints/{name}",
        "displayName": name,
        "description": endpoint.description,
        "deployedModels": [_deployed_model(incoming, deployment) for deployment in catalog.routing.deployments_of(name)],
        "trafficSplit": endpoint.traffic,
        "createTime": _timestamp(endpoint.created_at),
        "updateTime": _timestamp(endpoint.updated_at),
    }


def _deployed_model(incoming: Incoming, deployment: DeploymentSnapshot) -> dict[str, Any]:
    return {
        "id": deployment.deployment_id,
        "model": _model_name(incoming, deployment.model_name),
        "modelVersionId": str(deployment.version),
        "displayName": deployment.model_name,
        "createTime": _timestamp(deployment.created_at),
        "dedicatedResources": {"minReplicaCount": deployment.min_replicas, "maxReplicaCount": deployment.max_replicas},
    }


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
