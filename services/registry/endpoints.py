"""Rules of endpoints, deployments and traffic."""

from collections.abc import Mapping

from schemas.predictions import PredictionLogSettings
from schemas.registry import (
    CreateEndpoint,
    DeleteEndpoint,
    DeploymentRemovalRequested,
    DeploymentRequested,
    DeploymentSnapshot,
    DeploymentStatus,
    DeployVersion,
    EndpointCreated,
    EndpointDeleted,
    EndpointSnapshot,
    PredictionLogChanged,
    Replica,
    SetPredictionLog,
    SetTraffic,
    TrafficChanged,
    UndeployVersion,
    VersionSnapshot,
    VersionStatus,
)
from schemas.serving import DeploymentChanged, DeploymentFailed, DeploymentReady, DeploymentRemoved
from services.registry import traffic
from services.registry.errors import conflict, invalid, not_found
from services.registry.state import Context, Decision, Deletion, State


def create(state: State, command: CreateEndpoint, context: Context) -> Decision:
    """A new endpoint; the same one again is answered as it is."""
    name = command.endpoint_name
    existing = state.endpoints.get(name)
    if existing is not None and (existing.labels, existing.description) != (command.labels, command.description):
        raise conflict(f"endpoint {name!r} exists already, with other labels or another description")
    if existing is not None and command.prediction_log not in (None, existing.prediction_log):
        raise conflict(f"endpoint {name!r} exists already, with another prediction log")
    said = {"endpoint_name": name, "labels": command.labels, "description": command.description}
    prediction_log = existing.prediction_log if existing is not None else command.prediction_log or PredictionLogSettings()
    fact = EndpointCreated(**said, prediction_log=prediction_log)
    if existing is not None:
        return Decision((fact,))
    endpoint = EndpointSnapshot(**said, prediction_log=prediction_log, created_at=context.now, updated_at=context.now)
    return Decision((fact,), (endpoint,))


def set_prediction_log(state: State, command: SetPredictionLog, context: Context) -> Decision:
    """Another way of logging an endpoint's requests; the same one again is answered as it is."""
    endpoint = state.endpoint(command.endpoint_name)
    fact = PredictionLogChanged(
        endpoint_name=endpoint.endpoint_name, prediction_log=command.prediction_log, previous=endpoint.prediction_log
    )
    if command.prediction_log == endpoint.prediction_log:
        return Decision((fact,))
    return Decision((fact,), (endpoint.model_copy(update={"prediction_log": command.prediction_log, "updated_at": context.now}),))


def deploy(state: State, command: DeployVersion, context: Context) -> Decision:
    """A version shall run for an endpoint; deploying one that is there changes its replicas and its share."""
    endpoint = state.endpoint(command.endpoint_name)
    version = _deployable(state, command)
    deployment_id = f"{endpoint.endpoint_name}.{version.model_name}.{version.version}"
    existing = state.deployments.get(deployment_id)
    deployment = _requested(existing, command, deployment_id, version, context)
    fact = DeploymentRequested(
        endpoint_name=endpoint.endpoint_name,
        deployment_id=deployment_id,
        generation=deployment.generation,
        model_name=version.model_name,
        version=version.version,
        traffic_percent=command.traffic_percent,
        min_replicas=command.min_replicas,
        max_replicas=command.max_replicas,
    )
    joined = endpoint.model_copy(
        update={"deployment_ids": tuple(dict.fromkeys((*endpoint.deployment_ids, deployment_id))), "updated_at": context.now}
    )
    decision = Decision((fact,), (deployment, joined))
    if deployment.status is DeploymentStatus.PENDING:
        return decision
    share = traffic.with_share(joined.traffic, deployment_id, command.traffic_percent)
    return decision + _split(joined, share, context)


def undeploy(state: State, command: UndeployVersion, context: Context) -> Decision:
    """A deployment shall stop, unless it takes traffic."""
    endpoint = state.endpoint(command.endpoint_name)
    deployment = state.deployments.get(command.deployment_id)
    if deployment is None or deployment.endpoint_name != endpoint.endpoint_name:
        raise not_found(f"endpoint {endpoint.endpoint_name!r} has no deployment {command.deployment_id!r}")
    share = endpoint.traffic.get(command.deployment_id, 0)
    if share and not command.force:
        raise conflict(f"deployment {command.deployment_id!r} takes {share} % of the traffic; move it away first, or force")
    return _removal(deployment, context) + _left(endpoint, command.deployment_id, context)


def set_traffic(state: State, command: SetTraffic, context: Context) -> Decision:
    """The whole split at once; every deployment named must be able to answer."""
    endpoint = state.endpoint(command.endpoint_name)
    total = sum(command.traffic.values())
    if total != 100:
        raise invalid(f"the traffic of endpoint {endpoint.endpoint_name!r} must sum to 100, not {total}")
    for deployment_id, share in command.traffic.items():
        deployment = state.deployments.get(deployment_id)
        if deployment is None or deployment_id not in endpoint.deployment_ids:
            raise not_found(f"endpoint {endpoint.endpoint_name!r} has no deployment {deployment_id!r}")
        status = deployment.status
        if share and status not in (DeploymentStatus.READY, DeploymentStatus.DEGRADED):
            raise conflict(f"deployment {deployment_id!r} is {status}; it cannot take traffic")
    return _split(endpoint, {name: share for name, share in command.traffic.items() if share}, context, always=True)


def delete(state: State, command: DeleteEndpoint, context: Context) -> Decision:
    """An endpoint ends, and with it its deployments; refused while one of them takes traffic."""
    endpoint = state.endpoint(command.endpoint_name)
    if endpoint.traffic and not command.force:
        split = ", ".join(f"{name} {share} %" for name, share in endpoint.traffic.items())
        raise conflict(f"endpoint {endpoint.endpoint_name!r} takes traffic ({split}); force to delete it with its deployments")
    decision = Decision()
    for deployment in state.deployments_of(endpoint.endpoint_name):
        decision += _removal(deployment, context)
    gone = Deletion(EndpointSnapshot, endpoint.endpoint_name)
    return decision + Decision((EndpointDeleted(endpoint_name=endpoint.endpoint_name, keep_topics=command.keep_topics),), (gone,))


def ready(state: State, outcome: DeploymentReady, context: Context) -> Decision:
    """All replicas answer; traffic that was waiting for this moves now."""
    deployment = _current(state, outcome.deployment_id, outcome.generation)
    if deployment is None or deployment.status is DeploymentStatus.REMOVING:
        return Decision()
    moved = _with_replicas(deployment, outcome.replicas, DeploymentStatus.READY, context)
    share = deployment.pending_traffic_percent
    endpoint = state.endpoints.get(deployment.endpoint_name)
    if share is None or endpoint is None:
        return Decision(changes=(moved,))
    moved = moved.model_copy(update={"pending_traffic_percent": None})
    split = traffic.with_share(endpoint.traffic, deployment.deployment_id, share)
    return Decision(changes=(moved,)) + _split(endpoint, split, context)


def changed(state: State, outcome: DeploymentChanged, context: Context) -> Decision:
    """Other replicas answer now than before."""
    deployment = _current(state, outcome.deployment_id, outcome.generation)
    if deployment is None or deployment.status not in (DeploymentStatus.READY, DeploymentStatus.DEGRADED):
        return Decision()
    status = DeploymentStatus.READY if len(outcome.replicas) >= deployment.min_replicas else DeploymentStatus.DEGRADED
    moved = _with_replicas(deployment, outcome.replicas, status, context, outcome.reason or None)
    return Decision(changes=(moved.model_copy(update={"is_cluster_away": outcome.is_cluster_away}),))


def failed(state: State, outcome: DeploymentFailed, context: Context) -> Decision:
    """A deployment cannot be made to run; what takes traffic goes on taking it."""
    deployment = _current(state, outcome.deployment_id, outcome.generation)
    if deployment is None or deployment.status is DeploymentStatus.REMOVING:
        return Decision()
    return Decision(changes=(_with_replicas(deployment, (), DeploymentStatus.FAILED, context, outcome.reason),))


def removed(state: State, outcome: DeploymentRemoved, _context: Context) -> Decision:
    """A deployment that was to stop has stopped."""
    deployment = _current(state, outcome.deployment_id, outcome.generation)
    if deployment is None or deployment.status is not DeploymentStatus.REMOVING:
        return Decision()
    return Decision(changes=(Deletion(DeploymentSnapshot, outcome.deployment_id),))


def _deployable(state: State, command: DeployVersion) -> VersionSnapshot:
    model = state.model(command.model_name)
    if command.alias is not None and command.alias not in model.aliases:
        raise not_found(f"model {command.model_name!r} has no alias {command.alias!r}")
    number = command.version if command.alias is None else model.aliases[command.alias]
    if number is None:
        usable = [version for version in state.versions_of(command.model_name) if version.status is VersionStatus.VALIDATED]
        waiting = [version for version in state.versions_of(command.model_name) if version.status is VersionStatus.NEEDS_EXAMPLE]
        if not usable and waiting:
            raise conflict(_needs_example(waiting[-1]))
        if not usable:
            raise conflict(f"model {command.model_name!r} has no validated version yet")
        return usable[-1]
    version = state.version(command.model_name, number)
    if version.status is VersionStatus.NEEDS_EXAMPLE:
        raise conflict(_needs_example(version))
    if version.status is not VersionStatus.VALIDATED:
        why = f": {version.reason}" if version.reason else ""
        raise conflict(f"version {number} of {command.model_name!r} is {version.status}, and only a validated one can be deployed{why}")
    return version


def _needs_example(version: VersionSnapshot) -> str:
    reference = f"{version.model_name}@{version.version}"
    return (
        f"version {version.version} of {version.model_name!r} has answered nothing yet and needs an example before it can be deployed: "
        f"`millrace models example {reference} FILE`; {version.reason}"
    )


def _requested(
    existing: DeploymentSnapshot | None, command: DeployVersion, deployment_id: str, version: VersionSnapshot, context: Context
) -> DeploymentSnapshot:
    running = existing is not None and existing.status in (DeploymentStatus.READY, DeploymentStatus.DEGRADED)
    if existing is not None and (existing.min_replicas, existing.max_replicas) == (command.min_replicas, command.max_replicas):
        if running:
            return existing
        if existing.status is DeploymentStatus.PENDING:
            return existing.model_copy(update={"pending_traffic_percent": command.traffic_percent, "updated_at": context.now})
    if version.environment is None or version.signature is None or version.format is None:
        raise conflict(f"version {version.version} of {version.model_name!r} has not been built and validated")
    return DeploymentSnapshot(
        deployment_id=deployment_id,
        generation=existing.generation + 1 if existing else 1,
        endpoint_name=command.endpoint_name,
        model_name=version.model_name,
        version=version.version,
        status=existing.status if existing is not None and running else DeploymentStatus.PENDING,
        artifact=version.spec.artifact,
        files=version.files,
        code=version.code,
        format=version.format,
        environment=version.environment,
        signature=version.signature,
        min_replicas=command.min_replicas,
        max_replicas=command.max_replicas,
        pending_traffic_percent=None if running else command.traffic_percent,
        replicas=existing.replicas if existing is not None and running else (),
        stage_times={"requested": context.now},
        correlation_id=context.correlation_id,
        traceparent=context.traceparent,
        created_at=existing.created_at if existing else context.now,
        updated_at=context.now,
    )


def _removal(deployment: DeploymentSnapshot, context: Context) -> Decision:
    fact = DeploymentRemovalRequested(endpoint_name=deployment.endpoint_name, deployment_id=deployment.deployment_id)
    if deployment.status is DeploymentStatus.REMOVING:
        return Decision((fact,))
    update = {
        "status": DeploymentStatus.REMOVING,
        "generation": deployment.generation + 1,
        "pending_traffic_percent": None,
        "traceparent": context.traceparent,
        "updated_at": context.now,
    }
    return Decision((fact,), (deployment.model_copy(update=update),))


def _left(endpoint: EndpointSnapshot, deployment_id: str, context: Context) -> Decision:
    rest = tuple(name for name in endpoint.deployment_ids if name != deployment_id)
    remaining = endpoint.model_copy(update={"deployment_ids": rest, "updated_at": context.now})
    return Decision(changes=(remaining,)) + _split(remaining, traffic.without(endpoint.traffic, deployment_id), context)


def _split(endpoint: EndpointSnapshot, share: Mapping[str, int], context: Context, always: bool = False) -> Decision:
    if dict(share) == endpoint.traffic and not always:
        return Decision()
    fact = TrafficChanged(endpoint_name=endpoint.endpoint_name, traffic=dict(share), previous=endpoint.traffic)
    return Decision((fact,), (endpoint.model_copy(update={"traffic": dict(share), "updated_at": context.now}),))


def _current(state: State, deployment_id: str, generation: int) -> DeploymentSnapshot | None:
    deployment = state.deployments.get(deployment_id)
    return deployment if deployment is not None and deployment.generation == generation else None


def _with_replicas(
    deployment: DeploymentSnapshot, replicas: tuple[Replica, ...], status: DeploymentStatus, context: Context, reason: str | None = None
) -> DeploymentSnapshot:
    update = {
        "status": status,
        "replicas": replicas,
        "is_cluster_away": False,
        "reason": reason,
        "stage_times": {**deployment.stage_times, status.value: context.now},
        "updated_at": context.now,
    }
    return deployment.model_copy(update=update)
