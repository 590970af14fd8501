"""The runners that the gateway talks to: one connection to each, and the choice of another when one is gone."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opentelemetry import trace

from libs import telemetry
from libs.errors import ConfigurationError, DeadlineExceededError, NotReadyError, UnauthenticatedError
from libs.inference.client import RunnerClient
from libs.inference.errors import RunnerGoneError
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import NoReplicaError, Route
from libs.inference.tokens import runner_token
from schemas.inference import Signature
from schemas.registry import Replica
from services.gateway.catalog import Catalog
from services.gateway.spans import RunnerSpans

Parse = Callable[[Signature], InferRequest]

_PING_TIMEOUT_S = 1.0
_RETRY_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """Which deployment a request is for; neither a version nor an alias: whichever the traffic split says."""

    endpoint_name: str
    version: int | None = None
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer, the request as it was understood, and who answered."""

    route: Route
    request: InferRequest
    response: InferResponse


class Runners:
    """Asks runners; a component that owns the connections.

    Parameters
    ----------
    key_file
        File with the platform's runner key; read by ``start``.
    replica_wait_s
        Longest time a request waits for a replica that is being restarted.
    """

    def __init__(
        self, catalog: Catalog, spans: RunnerSpans, key_file: Path, replica_wait_s: float, choose: Callable[[], float] = random.random
    ) -> None:
        self._catalog = catalog
        self._spans = spans
        self._key_file = key_file
        self._key = b""
        self._replica_wait_s = replica_wait_s
        self._choose = choose
        self._clients: dict[Replica, RunnerClient] = {}

    async def start(self) -> None:
        try:
            self._key = self._key_file.read_bytes().strip()
        except OSError as error:
            raise ConfigurationError(f"the runner key {self._key_file} cannot be read: {error.strerror}") from error
        if not self._key:
            raise ConfigurationError(f"the runner key {self._key_file} is empty")

    async def run(self) -> None:
        """Forget runners that no deployment names any more; requests they still answer end as they would."""
        while True:
            await self._catalog.changes.next(60.0)
            live = {replica for deployment in self._catalog.deployments.values() for replica in deployment.replicas}
            for replica in self._clients.keys() - live:
                del self._clients[replica]

    async def stop(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        self._spans.shutdown()

    async def infer(self, target: Target, parse: Parse) -> Prediction:
        """Ask a replica of what the target means; if it is gone before it answered, ask once more, another one if there is one.

        A request may therefore run twice, never more often.

        Raises
        ------
        NotFoundError
            The endpoint does not exist, or the version or alias is not deployed to it.
        NotReadyError
            Nobody can answer, also after a short wait.
        InvalidInputError, ModelError
            What ``parse`` or the runner says.
        """
        route = await self._route(target)
        request = parse(route.signature)
        try:
            return await self._ask(route, route.replicas[0], request)
        except RunnerGoneError:
            route, replica = await self._another(target, route.replicas[0])
        request = parse(route.signature)
        try:
            return await self._ask(route, replica, request)
        except RunnerGoneError as error:
            raise NotReadyError(f"endpoint {target.endpoint_name!r} lost two runners over this request: {error}") from error

    async def _route(self, target: Target) -> Route:
        try:
            return self._pick(target)
        except NoReplicaError as error:
            route = await self._catalog.changes.until(lambda: self._pick_or_none(target), self._replica_wait_s)
            if route is None:
                raise error
            return route

    async def _another(self, target: Target, gone: Replica) -> tuple[Route, Replica]:
        """A replica that answers a ping: another one, or the same after it came back."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._replica_wait_s
        while True:
            route = await self._route(target)
            for replica in sorted(route.replicas, key=lambda replica: replica == gone):
                try:
                    await self._client(replica).ping(timeout_s=_PING_TIMEOUT_S)
                except (RunnerGoneError, DeadlineExceededError, UnauthenticatedError):
                    continue
                return route, replica
            if loop.time() >= deadline:
                raise NotReadyError(f"no runner of endpoint {target.endpoint_name!r} answers at the moment")
            await self._catalog.changes.next(_RETRY_PAUSE_S)

    async def _ask(self, route: Route, replica: Replica, request: InferRequest) -> Prediction:
        parent = trace.get_current_span().get_span_context()
        traceparent = telemetry.current_traceparent() if parent.trace_flags.sampled else None
        try:
            response = await self._client(replica).infer(request.inputs, outputs=request.outputs, traceparent=traceparent)
        except UnauthenticatedError as error:
            raise NotReadyError(f"the runner {replica.replica_id} does not accept the gateway's key") from error
        if response.span is not None:
            self._spans.export(response.span, parent, route, replica.replica_id)
        return Prediction(route, request, response)

    def _client(self, replica: Replica) -> RunnerClient:
        client = self._clients.get(replica)
        if client is None:
            client = RunnerClient(replica.address, runner_token(self._key, replica.replica_id))
            self._clients[replica] = client
        return client

    def _pick(self, target: Target) -> Route:
        return self._catalog.routing.pick(target.endpoint_name, target.version, target.alias, random=self._choose())

    def _pick_or_none(self, target: Target) -> Route | None:
        try:
            return self._pick(target)
        except NoReplicaError:
            return None
