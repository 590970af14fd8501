"""Asking a runner for a prediction: which one, and another when that one is gone."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from libs.errors import DeadlineExceededError, NotReadyError
from libs.inference.errors import RunnerGoneError
from libs.inference.pool import RunnerPool
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import NoReplicaError, Route
from schemas.inference import Signature
from schemas.registry import Replica
from services.gateway.catalog import Catalog

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
    replica_wait_s
        Longest time a request waits for a replica that is being restarted.
    """

    def __init__(self, catalog: Catalog, pool: RunnerPool, replica_wait_s: float, choose: Callable[[], float] = random.random) -> None:
        self._catalog = catalog
        self._pool = pool
        self._replica_wait_s = replica_wait_s
        self._choose = choose

    async def start(self) -> None:
        self._pool.open()

    async def run(self) -> None:
        """Forget runners that no deployment names any more."""
        while True:
            await self._catalog.changes.next(60.0)
            self._pool.keep({replica for deployment in self._catalog.deployments.values() for replica in deployment.replicas})

    async def stop(self) -> None:
        await self._pool.close()

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
                    await self._pool.ping(replica, timeout_s=_PING_TIMEOUT_S)
                except (RunnerGoneError, DeadlineExceededError, NotReadyError):
                    continue
                return route, replica
            if loop.time() >= deadline:
                raise NotReadyError(f"no runner of endpoint {target.endpoint_name!r} answers at the moment")
            await self._catalog.changes.next(_RETRY_PAUSE_S)

    async def _ask(self, route: Route, replica: Replica, request: InferRequest) -> Prediction:
        return Prediction(route, request, await self._pool.infer(route, replica, request))

    def _pick(self, target: Target) -> Route:
        return self._catalog.routing.pick(target.endpoint_name, target.version, target.alias, random=self._choose())

    def _pick_or_none(self, target: Target) -> Route | None:
        try:
            return self._pick(target)
        except NoReplicaError:
            return None
