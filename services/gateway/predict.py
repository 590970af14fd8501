"""The predict doors: KServe V1 and the Open Inference Protocol (V2), plain functions from a request to an answer.

References
----------
KServe V1 protocol; Open Inference Protocol, "HTTP/REST" and "Binary tensor data extension".
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from opentelemetry import trace

from libs.errors import DeadlineExceededError, InvalidArgumentError, NotReadyError
from libs.inference import v1, v2
from libs.inference.requests import InferRequest
from schemas.inference import Signature, TensorSpec
from schemas.registry import DeploymentSnapshot
from services.gateway.catalog import Catalog
from services.gateway.exchange import Incoming, Outgoing, decompressed, json_answer
from services.gateway.health import Health
from services.gateway.runners import Prediction, Runners, Target

Handler = Callable[[Incoming], Awaitable[Outgoing]]

MAX_TIMEOUT_MS = 3_600_000
_BINARY = b"application/octet-stream"


class PredictDoors:
    """Answers predictions and the questions around them.

    Parameters
    ----------
    timeout_ms
        Time a request may take when it does not say.
    max_bytes
        Largest body after decompression.
    """

    def __init__(self, catalog: Catalog, runners: Runners, health: Health, timeout_ms: int, max_bytes: int) -> None:
        self._catalog = catalog
        self._runners = runners
        self._health = health
        self._timeout_ms = timeout_ms
        self._max_bytes = max_bytes

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """Handler by method and route template."""
        return {
            ("GET", "/healthz"): self.healthz,
            ("GET", "/v2/health/live"): self.live,
            ("GET", "/v2/health/ready"): self.ready,
            ("GET", "/"): self.alive,
            ("GET", "/v1/models"): self.v1_models,
            ("GET", "/v1/models/{model}"): self.v1_model,
            ("POST", "/v1/models/{model}:predict"): self.v1_predict,
            ("GET", "/v2"): self.v2_server,
            ("GET", "/v2/models/{model}"): self.v2_model,
            ("GET", "/v2/models/{model}/versions/{version}"): self.v2_model,
            ("GET", "/v2/models/{model}/ready"): self.v2_model_ready,
            ("GET", "/v2/models/{model}/versions/{version}/ready"): self.v2_model_ready,
            ("POST", "/v2/models/{model}/infer"): self.v2_infer,
            ("POST", "/v2/models/{model}/versions/{version}/infer"): self.v2_infer,
        }

    async def v1_predict(self, incoming: Incoming) -> Outgoing:
        """``{"instances": …}`` in, ``{"predictions": …}`` out."""
        body = self._body(incoming)
        prediction = await self._infer(incoming, lambda signature: v1.parse(body, signature))
        return Outgoing(v1.render(prediction.response), headers=_who(prediction))

    async def v2_infer(self, incoming: Incoming) -> Outgoing:
        """Tensors in and out, as JSON or raw bytes."""
        body, head_length = self._body(incoming), _head_length(incoming)
        prediction = await self._infer(incoming, lambda signature: v2.parse(body, signature, head_length))
        endpoint, version = prediction.route.endpoint_name, str(prediction.route.version)
        answer, answer_head_length = v2.render(prediction.response, prediction.request, endpoint, version)
        if answer_head_length is None:
            return Outgoing(answer, headers=_who(prediction))
        headers = (*_who(prediction), (b"inference-header-content-length", b"%d" % answer_head_length))
        return Outgoing(answer, media_type=_BINARY, headers=headers)

    async def healthz(self, _incoming: Incoming) -> Outgoing:
        """Whether the gateway can do its work."""
        if not self._health.is_ready:
            raise NotReadyError("the gateway is not ready: it has not read the state yet, or is stopping")
        return json_answer({"status": "ok"})

    async def live(self, _incoming: Incoming) -> Outgoing:
        """Whether the process answers."""
        return json_answer({"live": True})

    async def ready(self, _incoming: Incoming) -> Outgoing:
        """Whether the gateway can do its work, as V2 asks it."""
        return json_answer({"ready": self._health.is_ready}, 200 if self._health.is_ready else 503)

    async def alive(self, _incoming: Incoming) -> Outgoing:
        """KServe V1's liveness."""
        return json_answer({"status": "alive"})

    async def v1_models(self, _incoming: Incoming) -> Outgoing:
        """Names of all endpoints."""
        return json_answer({"models": self._catalog.routing.endpoint_names()})

    async def v1_model(self, incoming: Incoming) -> Outgoing:
        """Whether an endpoint can answer."""
        return self._readiness(incoming)

    async def v2_model_ready(self, incoming: Incoming) -> Outgoing:
        """Whether an endpoint, or one version at it, can answer."""
        return self._readiness(incoming)

    async def v2_server(self, _incoming: Incoming) -> Outgoing:
        """Who this is."""
        return json_answer({"name": "millrace", "version": "1", "extensions": ["binary_tensor_data"]})

    async def v2_model(self, incoming: Incoming) -> Outgoing:
        """What an endpoint takes and gives."""
        target = _target(incoming)
        deployments = self._catalog.routing.deployments_of(target.endpoint_name)
        shown = self._shown(target, deployments)
        return json_answer(
            {
                "name": target.endpoint_name,
                "versions": sorted({str(deployment.version) for deployment in deployments}, key=int),
                "platform": shown.format.value,
                "inputs": [_tensor(spec) for spec in shown.signature.inputs],
                "outputs": [_tensor(spec) for spec in shown.signature.outputs],
            }
        )

    def _shown(self, target: Target, deployments: list[DeploymentSnapshot]) -> DeploymentSnapshot:
        """The deployment that stands for an endpoint: the one asked for, or the one with the most traffic."""
        if target.version is not None or target.alias is not None:
            deployments = self._catalog.routing.named(target.endpoint_name, target.version, target.alias)
        if not deployments:
            raise NotReadyError(f"nothing is deployed to endpoint {target.endpoint_name!r}")
        traffic = self._catalog.endpoint(target.endpoint_name).traffic
        return max(deployments, key=lambda deployment: (traffic.get(deployment.deployment_id, 0), deployment.version))

    def _readiness(self, incoming: Incoming) -> Outgoing:
        target = _target(incoming)
        try:
            self._catalog.routing.check(target.endpoint_name, target.version, target.alias)
        except NotReadyError as error:
            return json_answer({"name": target.endpoint_name, "ready": False, "error": error.message}, 503)
        return json_answer({"name": target.endpoint_name, "ready": True})

    async def _infer(self, incoming: Incoming, parse: Callable[[Signature], InferRequest]) -> Prediction:
        target = _target(incoming)
        timeout_ms = _timeout_ms(incoming, self._timeout_ms)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                prediction = await self._runners.infer(target, parse)
        except TimeoutError as error:
            raise DeadlineExceededError(f"endpoint {target.endpoint_name!r} did not answer within {timeout_ms} ms") from error
        route = prediction.route
        trace.get_current_span().set_attributes(
            {"millrace.endpoint": route.endpoint_name, "millrace.model": route.model_name, "millrace.version": route.version}
        )
        return prediction

    def _body(self, incoming: Incoming) -> bytes | bytearray:
        if not incoming.body:
            raise InvalidArgumentError("the request body is empty")
        return decompressed(incoming.body, incoming.header(b"content-encoding"), self._max_bytes)


def _target(incoming: Incoming) -> Target:
    """What these protocols call a model is an endpoint here."""
    version = incoming.parameters.get("version")
    if version is None or version.isdigit():
        return Target(incoming.parameters["model"], int(version) if version else None)
    return Target(incoming.parameters["model"], alias=version)


def _timeout_ms(incoming: Incoming, default_ms: int) -> int:
    value = incoming.header(b"x-request-timeout-ms")
    if value is None:
        return default_ms
    if not (value.isascii() and value.isdigit() and len(value) <= 9 and 1 <= int(value) <= MAX_TIMEOUT_MS):
        raise InvalidArgumentError(f"x-request-timeout-ms must be a whole number from 1 to {MAX_TIMEOUT_MS}, not {value[:40]!r}")
    return int(value)


def _head_length(incoming: Incoming) -> int | None:
    value = incoming.header(b"inference-header-content-length")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise InvalidArgumentError(f"inference-header-content-length must be a whole number, not {value[:40]!r}")
    return int(value)


def _who(prediction: Prediction) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"x-millrace-model-version", f"{prediction.route.model_name}@{prediction.route.version}".encode()),)


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype.value, "shape": list(spec.shape)}
