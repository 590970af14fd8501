"""Which deployment answers a request: a table folded from the snapshots of models, endpoints and deployments.

No I/O and no clock; the random number is a parameter, so every choice can be repeated.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from libs.errors import NotFoundError, NotReadyError
from schemas.base import Payload
from schemas.inference import Signature
from schemas.registry import DeploymentSnapshot, DeploymentStatus, EndpointSnapshot, ModelSnapshot, Replica

_SERVING = (DeploymentStatus.READY, DeploymentStatus.DEGRADED)

_MAX_PLANS = 10_000
"""Only what exists gets a plan; the bound is a safeguard."""


class NoReplicaError(NotReadyError):
    """Deployments that should answer have no live replica at this moment; one may appear soon."""


class ClusterAwayError(NotReadyError):
    """Deployments that should answer have no live replica, and what runs replicas does not answer: none will appear soon."""


class NothingDeployedError(NotReadyError):
    """The endpoint exists and nothing is deployed to it: nobody will answer before somebody deploys."""


class UnknownEndpointError(NotFoundError):
    """There is no endpoint of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no endpoint {name!r}")


@dataclass(frozen=True, slots=True)
class Route:
    """A choice: the deployment, and its live replicas in the order to try them."""

    endpoint_name: str
    deployment_id: str
    model_name: str
    version: int
    signature: Signature
    replicas: tuple[Replica, ...]
    is_cluster_away: bool = False


class RoutingTable:
    """The routes of all endpoints.

    Snapshots may arrive in any order: a deployment is part of an endpoint while both say so.

    Examples
    --------
    >>> RoutingTable().pick("cancer", random=0.5)
    Traceback (most recent call last):
    libs.inference.routing.UnknownEndpointError: there is no endpoint 'cancer'
    """

    def __init__(self) -> None:
        self._endpoints: dict[str, EndpointSnapshot] = {}
        self._deployments: dict[str, DeploymentSnapshot] = {}
        self._aliases: dict[str, Mapping[str, int]] = {}
        self._plans: dict[tuple[str, str | None, int | None], _Plan] = {}
        self._turns: dict[str, int] = {}

    def apply(self, snapshot: Payload) -> None:
        """Fold a snapshot in; of other payloads nothing is needed here."""
        match snapshot:
            case EndpointSnapshot():
                self._endpoints[snapshot.endpoint_name] = snapshot
            case DeploymentSnapshot():
                self._deployments[snapshot.deployment_id] = snapshot
            case ModelSnapshot():
                self._aliases[snapshot.model_name] = snapshot.aliases
            case _:
                return
        self._plans.clear()

    def remove(self, topic: str, entity: str) -> None:
        """Forget the entity whose tombstone stood on a state topic."""
        if topic == EndpointSnapshot.topic:
            self._endpoints.pop(entity, None)
        elif topic == DeploymentSnapshot.topic:
            self._deployments.pop(entity, None)
            self._turns.pop(entity, None)
        elif topic == ModelSnapshot.topic:
            self._aliases.pop(entity, None)
        self._plans.clear()

    def endpoint_names(self) -> list[str]:
        """Names of all endpoints, sorted."""
        return sorted(self._endpoints)

    def deployments_of(self, endpoint_name: str) -> list[DeploymentSnapshot]:
        """Deployments of an endpoint in the order they were added, those being removed left out.

        Raises
        ------
        NotFoundError
            When there is no such endpoint.
        """
        endpoint = self._endpoints.get(endpoint_name)
        if endpoint is None:
            raise UnknownEndpointError(endpoint_name)
        found = (self._deployments.get(deployment_id) for deployment_id in endpoint.deployment_ids)
        return [deployment for deployment in found if deployment is not None and deployment.status is not DeploymentStatus.REMOVING]

    def pick(self, endpoint_name: str, version: int | None = None, alias: str | None = None, *, random: float) -> Route:
        """Choose the deployment that answers one request, and whose turn it is among its replicas.

        Without a version the deployments share requests by their percent; the share of one without live replicas goes to the others
        that have traffic, in their proportions. A deployment with no traffic is reached only by its version or alias.

        Parameters
        ----------
        random
            Uniform in [0, 1).

        Raises
        ------
        NotFoundError
            When the endpoint does not exist, or the version or alias is not deployed to it.
        NoReplicaError
            When something is deployed and nobody answers at the moment.
        ClusterAwayError
            The same while what runs the replicas does not answer.
        NotReadyError
            When nothing has been deployed that could answer.
        """
        route = self.choose(endpoint_name, version, alias, random=random)
        turn = self._turns.get(route.deployment_id, 0)
        self._turns[route.deployment_id] = turn + 1
        start = turn % len(route.replicas)
        return replace(route, replicas=route.replicas[start:] + route.replicas[:start])

    def choose(self, endpoint_name: str, version: int | None = None, alias: str | None = None, *, random: float) -> Route:
        """Choose the deployment as ``pick`` does; whoever balances replicas by other means takes nobody's turn.

        The same object comes back until something changes.
        """
        return self._planned(endpoint_name, version, alias).choose(random)

    def check(self, endpoint_name: str, version: int | None = None, alias: str | None = None) -> None:
        """Raise what ``pick`` would raise; nobody's turn is taken."""
        self._planned(endpoint_name, version, alias)

    def _planned(self, endpoint_name: str, version: int | None, alias: str | None) -> "_Plan":
        key = (endpoint_name, alias, version)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(endpoint_name, version, alias)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _plan(self, endpoint_name: str, version: int | None, alias: str | None) -> "_Plan":
        deployments = self.deployments_of(endpoint_name)
        traffic = self._endpoints[endpoint_name].traffic
        if version is not None or alias is not None:
            wanted = self.named(endpoint_name, version, alias)
            weights = [float(traffic.get(deployment.deployment_id, 0)) for deployment in wanted]
            if not any(weights):
                weights = [1.0] * len(wanted)
        else:
            wanted = deployments
            weights = [float(traffic.get(deployment.deployment_id, 0)) for deployment in wanted]
            if not any(weights):
                raise (NotReadyError if deployments else NothingDeployedError)(_nothing_ready(endpoint_name, deployments))
        live = [
            (deployment, weight)
            for deployment, weight in zip(wanted, weights, strict=True)
            if weight > 0 and deployment.replicas and deployment.status in _SERVING
        ]
        if not live:
            raise _sent_away(wanted)(_nothing_ready(endpoint_name, wanted))
        return _Plan([_route(endpoint_name, deployment) for deployment, _ in live], list(accumulate(weight for _, weight in live)))

    def named(self, endpoint_name: str, version: int | None, alias: str | None) -> list[DeploymentSnapshot]:
        """Deployments of a version or alias at an endpoint, ready or not: several, when it has several models.

        Raises
        ------
        NotFoundError
            When there is none.
        """
        deployments = self.deployments_of(endpoint_name)
        wanted = [
            deployment
            for deployment in deployments
            if (version is None or deployment.version == version)
            and (alias is None or self._aliases.get(deployment.model_name, {}).get(alias) == deployment.version)
        ]
        if not wanted:
            what = f"version {version}" if version is not None else f"no version with the alias {alias!r}"
            verb = "is not" if version is not None else "is"
            deployed = ", ".join(f"{deployment.model_name}@{deployment.version}" for deployment in deployments) or "nothing"
            raise NotFoundError(f"{what} {verb} deployed to endpoint {endpoint_name!r}; deployed: {deployed}")
        return wanted


@dataclass(frozen=True, slots=True)
class _Plan:
    """Routes to deployments that can answer, with the running sum of their weights."""

    routes: list[Route]
    bounds: list[float]

    def choose(self, random: float) -> Route:
        return self.routes[min(bisect_right(self.bounds, random * self.bounds[-1]), len(self.routes) - 1)]


def _route(endpoint_name: str, deployment: DeploymentSnapshot) -> Route:
    return Route(
        endpoint_name,
        deployment.deployment_id,
        deployment.model_name,
        deployment.version,
        deployment.signature,
        deployment.replicas,
        deployment.is_cluster_away,
    )


def _sent_away(wanted: Sequence[DeploymentSnapshot]) -> type[NotReadyError]:
    serving = [deployment for deployment in wanted if deployment.status in _SERVING]
    if not serving:
        return NotReadyError
    return ClusterAwayError if all(deployment.is_cluster_away for deployment in serving) else NoReplicaError


def _nothing_ready(endpoint_name: str, deployments: Sequence[DeploymentSnapshot]) -> str:
    if not deployments:
        return f"nothing is deployed to endpoint {endpoint_name!r}"
    states = ", ".join(f"{deployment.model_name}@{deployment.version} is {_state(deployment)}" for deployment in deployments)
    return f"endpoint {endpoint_name!r} cannot answer now: {states}"


def _state(deployment: DeploymentSnapshot) -> str:
    if deployment.status in _SERVING:
        if deployment.is_cluster_away and not deployment.replicas:
            return f"without a live replica ({deployment.reason})"
        return f"{deployment.status} without traffic" if deployment.replicas else "without a live replica"
    return f"{deployment.status} ({deployment.reason})" if deployment.reason else str(deployment.status)
