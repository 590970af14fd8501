"""The door of V1 (KServe, TensorFlow Serving): ``{"instances": …}`` in, ``{"predictions": …}`` out.

References
----------
KServe, "V1 Inference Protocol"; TensorFlow Serving, "RESTful API".
"""

from collections.abc import Mapping
from functools import partial

from libs.errors import NotReadyError
from libs.inference import v1
from libs.inference.requests import InferRequest
from schemas.inference import Signature
from schemas.registry import DeploymentSnapshot, DeploymentStatus
from services.gateway.catalog import Catalog
from services.gateway.doors import events
from services.gateway.doors.compression import compressed
from services.gateway.doors.headers import check_content_type, content_of, target_of, timeout_ms, who
from services.gateway.exchange import Incoming, Outgoing, json_answer
from services.gateway.predictions import Ask, Handler, Prediction, Protocol, Read

_STATES = {DeploymentStatus.PENDING: "LOADING", DeploymentStatus.FAILED: "END"}


def reads(max_bytes: int) -> Mapping[tuple[str, str], Read]:
    """The predict routes; ``max_bytes`` is the largest body after decompression."""
    read = partial(_read, max_bytes=max_bytes)
    return {
        ("POST", "/v1/models/{model}:predict"): read,
        ("POST", "/v1/models/{model}/versions/{version}:predict"): read,
        ("POST", "/v1/models/{model}/labels/{alias}:predict"): read,
    }


def handlers(catalog: Catalog) -> Mapping[tuple[str, str], Handler]:
    """The routes that tell what there is."""
    doors = _Told(catalog)
    return {
        ("GET", "/"): doors.alive,
        ("GET", "/v1/models"): doors.models,
        ("GET", "/v1/models/{model}"): doors.model,
        ("GET", "/v1/models/{model}/versions/{version}"): doors.model,
        ("GET", "/v1/models/{model}/labels/{alias}"): doors.model,
    }


def _read(incoming: Incoming, max_bytes: int) -> Ask:
    check_content_type(incoming)
    if events.is_structured(incoming.headers) or b"ce-specversion" in incoming.headers:
        return _read_event(incoming, max_bytes)

    def parse(signature: Signature) -> InferRequest:
        return v1.parse(content_of(incoming, max_bytes), signature)

    def write(prediction: Prediction) -> Outgoing:
        return compressed(_answer(prediction), incoming.headers.get(b"accept-encoding"))

    return Ask(target_of(incoming), Protocol.V1, parse, write, timeout_ms(incoming))


def _read_event(incoming: Incoming, max_bytes: int) -> Ask:
    binary = events.binary_event(incoming.headers)
    if binary is None:
        event, document = events.structured_event(content_of(incoming, max_bytes))

    def parse(signature: Signature) -> InferRequest:
        return v1.from_document(document, signature) if binary is None else v1.parse(content_of(incoming, max_bytes), signature)

    def write(prediction: Prediction) -> Outgoing:
        endpoint_name = prediction.route.endpoint_name
        if binary is None:
            answer = events.structured_answer(_answer(prediction), event, endpoint_name)
        else:
            answer = events.binary_answer(_answer(prediction), binary, endpoint_name)
        return compressed(answer, incoming.headers.get(b"accept-encoding"))

    return Ask(target_of(incoming), Protocol.V1, parse, write, timeout_ms(incoming))


def _answer(prediction: Prediction) -> Outgoing:
    return Outgoing(v1.render(prediction.response, prediction.request.groups), headers=who(prediction))


class _Told:
    """Answers the questions around predictions."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def alive(self, _incoming: Incoming) -> Outgoing:
        """KServe's liveness."""
        return json_answer({"status": "alive"})

    async def models(self, _incoming: Incoming) -> Outgoing:
        """Names of all endpoints, which V1 calls models."""
        return json_answer({"models": self._catalog.routing.endpoint_names()})

    async def model(self, incoming: Incoming) -> Outgoing:
        """Whether an endpoint, or one version at it, can answer; with the state of its versions, as TensorFlow Serving has it."""
        target = target_of(incoming)
        routing = self._catalog.routing
        if target.version is None and target.alias is None:
            deployments = routing.deployments_of(target.endpoint_name)
        else:
            deployments = routing.named(target.endpoint_name, target.version, target.alias)
        answer = {"name": target.endpoint_name, "ready": True, "model_version_status": [_status(deployment) for deployment in deployments]}
        try:
            routing.check(target.endpoint_name, target.version, target.alias)
        except NotReadyError as error:
            return json_answer({**answer, "ready": False, "error": error.message}, 503)
        return json_answer(answer)


def _status(deployment: DeploymentSnapshot) -> dict[str, object]:
    state = _STATES.get(deployment.status, "AVAILABLE" if deployment.replicas else "LOADING")
    failed = deployment.status is DeploymentStatus.FAILED
    status = {"error_code": "UNKNOWN" if failed else "OK", "error_message": (deployment.reason or "") if failed else ""}
    return {"version": str(deployment.version), "state": state, "status": status}
