"""The REST door of the Open Inference Protocol (V2), with its binary-tensor, repository and configuration extensions.

References
----------
Open Inference Protocol, "HTTP/REST" and "Binary tensor data extension"; Triton, "Model repository extension" and "Model configuration
extension".
"""

from collections.abc import Mapping
from functools import partial
from importlib import metadata

from libs.errors import ConflictError, InvalidArgumentError, NotReadyError
from libs.inference import v2
from libs.inference.batches import is_batchable
from libs.inference.bodies import parse_object
from libs.inference.requests import InferRequest
from schemas.inference import Signature, TensorSpec
from schemas.registry import DeploymentSnapshot, DeploymentStatus
from services.gateway.catalog import Catalog
from services.gateway.doors.compression import compressed
from services.gateway.doors.headers import OCTETS, check_content_type, content_of, target_of, timeout_ms, who
from services.gateway.exchange import Incoming, Outgoing, json_answer
from services.gateway.health import Health
from services.gateway.predictions import Ask, Handler, Prediction, Protocol, Read, Target

EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics")
_BINARY = b"application/octet-stream"
_STATES = {DeploymentStatus.PENDING: "LOADING", DeploymentStatus.REMOVING: "UNLOADING", DeploymentStatus.FAILED: "UNAVAILABLE"}


def reads(max_bytes: int) -> Mapping[tuple[str, str], Read]:
    """The infer routes; ``max_bytes`` is the largest body after decompression."""
    read = partial(_read, max_bytes=max_bytes)
    return {("POST", "/v2/models/{model}/infer"): read, ("POST", "/v2/models/{model}/versions/{version}/infer"): read}


def handlers(catalog: Catalog, health: Health, batch_rows: int) -> Mapping[tuple[str, str], Handler]:
    """The routes that tell what there is; ``batch_rows`` are the most rows of a batch."""
    doors = _Told(catalog, health, batch_rows)
    return {
        ("GET", "/healthz"): doors.healthz,
        ("GET", "/v2"): doors.server,
        ("GET", "/v2/"): doors.server,
        ("GET", "/v2/health/live"): doors.live,
        ("GET", "/v2/health/ready"): doors.ready,
        ("GET", "/v2/models"): doors.models,
        ("GET", "/v2/models/{model}"): doors.model,
        ("GET", "/v2/models/{model}/versions/{version}"): doors.model,
        ("GET", "/v2/models/{model}/ready"): doors.model_ready,
        ("GET", "/v2/models/{model}/versions/{version}/ready"): doors.model_ready,
        ("GET", "/v2/models/{model}/config"): doors.config,
        ("GET", "/v2/models/{model}/versions/{version}/config"): doors.config,
        ("POST", "/v2/repository/index"): doors.index,
        ("POST", "/v2/repository/models/{model}/load"): doors.load,
        ("POST", "/v2/repository/models/{model}/unload"): doors.unload,
    }


def _read(incoming: Incoming, max_bytes: int) -> Ask:
    check_content_type(incoming, OCTETS)
    head_length = _head_length(incoming)

    def parse(signature: Signature) -> InferRequest:
        return v2.parse(content_of(incoming, max_bytes), signature, head_length)

    def write(prediction: Prediction) -> Outgoing:
        return compressed(_answer(prediction, incoming.request_id), incoming.headers.get(b"accept-encoding"))

    return Ask(target_of(incoming), Protocol.V2, parse, write, timeout_ms(incoming))


def _answer(prediction: Prediction, request_id: str) -> Outgoing:
    route = prediction.route
    body, head_length = v2.render(prediction.response, prediction.request, route.endpoint_name, str(route.version), request_id)
    if head_length is None:
        return Outgoing(body, headers=who(prediction))
    return Outgoing(body, 200, _BINARY, (*who(prediction), (b"inference-header-content-length", b"%d" % head_length)))


def _head_length(incoming: Incoming) -> int | None:
    value = incoming.headers.get(b"inference-header-content-length")
    if value is None:
        return None
    if not (value.isdigit() and len(value) <= 18):
        raise InvalidArgumentError(f"inference-header-content-length must be a whole number, not {value[:40].decode('latin-1')!r}")
    return int(value)


class _Told:
    """Answers the questions around inference."""

    def __init__(self, catalog: Catalog, health: Health, batch_rows: int) -> None:
        self._batch_rows = batch_rows
        self._catalog = catalog
        self._health = health
        self._version = metadata.version("millrace")

    async def healthz(self, _incoming: Incoming) -> Outgoing:
        """Whether the gateway can do its work."""
        if not self._health.is_ready:
            raise NotReadyError("the gateway is not ready: it has not read the state yet, or is stopping")
        return json_answer({"status": "ok"})

    async def live(self, _incoming: Incoming) -> Outgoing:
        """Whether the process answers."""
        return json_answer({"live": True})

    async def ready(self, _incoming: Incoming) -> Outgoing:
        """Whether the gateway can do its work."""
        if self._health.is_ready:
            return json_answer({"ready": True})
        return json_answer({"ready": False, "error": "the gateway has not read the state yet, or is stopping"}, 503)

    async def server(self, _incoming: Incoming) -> Outgoing:
        """Who this is."""
        return json_answer({"name": "millrace", "version": self._version, "extensions": EXTENSIONS})

    async def models(self, _incoming: Incoming) -> Outgoing:
        """Names of all endpoints, which V2 calls models; KServe's addition to the protocol."""
        return json_answer({"models": self._catalog.routing.endpoint_names()})

    async def model(self, incoming: Incoming) -> Outgoing:
        """What an endpoint takes and gives."""
        target = target_of(incoming)
        shown = self._shown(target)
        versions = {deployment.version for deployment in self._catalog.routing.deployments_of(target.endpoint_name)}
        return json_answer(
            {
                "name": target.endpoint_name,
                "versions": [str(version) for version in sorted(versions)],
                "platform": shown.format.value,
                "inputs": [_tensor(spec, shown.signature.feature_names) for spec in shown.signature.inputs],
                "outputs": [_tensor(spec) for spec in shown.signature.outputs],
            }
        )

    async def model_ready(self, incoming: Incoming) -> Outgoing:
        """Whether an endpoint, or one version at it, can answer."""
        target = target_of(incoming)
        try:
            self._catalog.routing.check(target.endpoint_name, target.version, target.alias)
        except NotReadyError as error:
            return json_answer({"name": target.endpoint_name, "ready": False, "error": error.message}, 503)
        return json_answer({"name": target.endpoint_name, "ready": True})

    async def config(self, incoming: Incoming) -> Outgoing:
        """The same as the metadata in the words of Triton's model configuration.

        ``max_batch_size`` is 0 where requests are never joined. Where they are, ``dims`` are those of a row, as Triton has it.
        """
        target = target_of(incoming)
        shown = self._shown(target)
        is_batched = is_batchable(shown.signature)
        return json_answer(
            {
                "name": target.endpoint_name,
                "platform": shown.format.value,
                "backend": shown.format.value,
                "max_batch_size": self._batch_rows if is_batched else 0,
                "input": [_configured(spec, is_batched) for spec in shown.signature.inputs],
                "output": [_configured(spec, is_batched) for spec in shown.signature.outputs],
            }
        )

    async def index(self, incoming: Incoming) -> Outgoing:
        """Every version at every endpoint; with ``{"ready": true}`` those that answer."""
        asked = parse_object(incoming.body) if incoming.body else {}
        ready = asked.get("ready", False)
        if not isinstance(ready, bool):
            raise InvalidArgumentError("'ready' must be true or false")
        routing = self._catalog.routing
        entries = [_entry(deployment) for name in routing.endpoint_names() for deployment in routing.deployments_of(name)]
        return json_answer([entry for entry in entries if entry["state"] == "READY" or not ready])

    async def load(self, incoming: Incoming) -> Outgoing:
        """Whether what is deployed answers; there is nothing to load that deployments have not loaded."""
        target = target_of(incoming)
        self._catalog.routing.check(target.endpoint_name)
        return json_answer({"name": target.endpoint_name, "load": True})

    async def unload(self, incoming: Incoming) -> Outgoing:
        """Refused: deployments say what is loaded."""
        target = target_of(incoming)
        deployments = self._catalog.routing.deployments_of(target.endpoint_name)
        if not deployments:
            return json_answer({"name": target.endpoint_name, "unload": True})
        paths = ", ".join(f"/api/v1/endpoints/{target.endpoint_name}/deployments/{item.deployment_id}" for item in deployments)
        raise ConflictError(
            f"unload does not change endpoint {target.endpoint_name!r}: what it has loaded follows from its deployments; "
            f"to undeploy, DELETE {paths}"
        )

    def _shown(self, target: Target) -> DeploymentSnapshot:
        """The deployment that stands for an endpoint: the one asked for, or the one with the most traffic."""
        name = target.endpoint_name
        if target.version is not None or target.alias is not None:
            deployments = self._catalog.routing.named(name, target.version, target.alias)
        else:
            deployments = self._catalog.routing.deployments_of(name)
        if not deployments:
            raise NotReadyError(f"nothing is deployed to endpoint {name!r}")
        traffic = self._catalog.endpoint(name).traffic
        return max(deployments, key=lambda deployment: (traffic.get(deployment.deployment_id, 0), deployment.version))


def _tensor(spec: TensorSpec, columns: tuple[str, ...] | None = None) -> dict[str, object]:
    """A tensor; ``parameters`` tell the dtype of a column and whether it may be left out, or the ``columns`` that a matrix has by name."""
    described: dict[str, object] = {"name": spec.name, "datatype": spec.datatype.value, "shape": list(spec.shape)}
    parameters: dict[str, object] = {"columns": list(columns)} if columns is not None else {}
    if spec.dtype is not None:
        parameters = {"dtype": spec.dtype, **({"optional": True} if spec.optional else {})}
    return {**described, "parameters": parameters} if parameters else described


def _configured(spec: TensorSpec, is_batched: bool) -> dict[str, object]:
    datatype = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype.value}"
    configured: dict[str, object] = {
        "name": spec.name,
        "data_type": datatype,
        "dims": list(spec.shape[1:] if is_batched else spec.shape) or [1],
    }
    if spec.optional:
        configured["optional"] = True
    return configured


def _entry(deployment: DeploymentSnapshot) -> dict[str, str]:
    """A deployment in the words of the repository extension."""
    state = _STATES.get(deployment.status, "READY" if deployment.replicas else "UNAVAILABLE")
    reason = "" if state == "READY" else deployment.reason or ""
    return {"name": deployment.endpoint_name, "version": str(deployment.version), "state": state, "reason": reason}
