"""What to do so that Ray Serve becomes what the log wants, and what to tell the log; a pure function of the two.

Level-triggered, as a Kubernetes controller is: it looks at what is, never at what happened, so that whatever was missed (a crash, a
restart, a lost answer) is seen the next time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from schemas.base import Fact
from schemas.registry import DeploymentSnapshot, DeploymentStatus, Replica
from schemas.serving import DeploymentChanged, DeploymentFailed, DeploymentReady, DeploymentRemoved


class AppStatus(StrEnum):
    """Where a Serve application is; ``degraded`` has been running and has replicas missing now."""

    STARTING = "starting"
    RUNNING = "running"
    DEGRADED = "degraded"
    FAILED = "failed"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class DesiredDeployment:
    """What the log says: the snapshot, and the digest of what its replicas shall run."""

    snapshot: DeploymentSnapshot
    digest: str

    @property
    def is_wanted(self) -> bool:
        return self.snapshot.status is not DeploymentStatus.REMOVING


@dataclass(frozen=True, slots=True)
class Damage:
    """Copies that a replica has found damaged, and replaced, since it began."""

    replica_id: str
    artifacts: int
    environments: int


@dataclass(frozen=True, slots=True)
class ActualDeployment:
    """What Serve says: ``replicas`` are those whose runner answers; ``target_replicas`` how many Serve was told to run."""

    generation: int
    digest: str
    target_replicas: int
    status: AppStatus
    message: str = ""
    replicas: tuple[Replica, ...] = ()
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True, slots=True)
class Apply:
    """Create the application, or replace what its replicas run."""

    snapshot: DeploymentSnapshot


@dataclass(frozen=True, slots=True)
class Scale:
    """Run another number of the same replicas, or note that the generation is a newer one; no replica is restarted."""

    deployment_id: str
    generation: int
    replicas: int


@dataclass(frozen=True, slots=True)
class Delete:
    """Stop an application and forget it."""

    deployment_id: str


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the log."""

    deployment_id: str
    fact: Fact


Action = Apply | Scale | Delete | Report

NOTHING_REPORTED: Mapping[str, Fact] = {}


def plan(
    desired: Mapping[str, DesiredDeployment],
    actual: Mapping[str, ActualDeployment],
    reported: Mapping[str, Fact] = NOTHING_REPORTED,
) -> tuple[Action, ...]:
    """The actions that are due now, by deployment id.

    Parameters
    ----------
    desired
        Every deployment in the log. An application that is not in it is deleted, so it must be complete.
    actual
        Every application in Serve.
    reported
        The last fact published of each deployment, which the log may not reflect yet; it is not published twice.
    """
    actions: list[Action] = []
    for deployment_id, wanted in sorted(desired.items()):
        action = _action(wanted, actual.get(deployment_id))
        if action is not None and not (isinstance(action, Report) and reported.get(deployment_id) == action.fact):
            actions.append(action)
    orphans = sorted(set(actual) - set(desired))
    actions += [Delete(deployment_id) for deployment_id in orphans if actual[deployment_id].status is not AppStatus.DELETING]
    return tuple(actions)


def away(snapshot: DeploymentSnapshot, reason: str) -> DeploymentChanged | None:
    """What to tell the log of a deployment while the cluster does not answer; None when there is nothing, or it knows."""
    if snapshot.status not in (DeploymentStatus.READY, DeploymentStatus.DEGRADED) or snapshot.is_cluster_away:
        return None
    return DeploymentChanged(
        endpoint_name=snapshot.endpoint_name,
        deployment_id=snapshot.deployment_id,
        generation=snapshot.generation,
        replicas=snapshot.replicas,
        reason=reason,
        is_cluster_away=True,
    )


def _action(wanted: DesiredDeployment, actual: ActualDeployment | None) -> Action | None:
    snapshot = wanted.snapshot
    if not wanted.is_wanted:
        return _removal(snapshot, actual)
    if actual is None:
        return Apply(snapshot)
    if actual.status is AppStatus.DELETING:
        return None
    is_newer = snapshot.generation > actual.generation
    if actual.digest != wanted.digest or (is_newer and actual.status is AppStatus.FAILED):
        return Apply(snapshot)
    if is_newer or actual.target_replicas != snapshot.min_replicas:
        return Scale(snapshot.deployment_id, snapshot.generation, snapshot.min_replicas)
    fact = _due_fact(snapshot, actual)
    return None if fact is None else Report(snapshot.deployment_id, fact)


def _removal(snapshot: DeploymentSnapshot, actual: ActualDeployment | None) -> Action | None:
    if actual is None:
        return Report(
            snapshot.deployment_id,
            DeploymentRemoved(endpoint_name=snapshot.endpoint_name, deployment_id=snapshot.deployment_id, generation=snapshot.generation),
        )
    return None if actual.status is AppStatus.DELETING else Delete(snapshot.deployment_id)


def _due_fact(snapshot: DeploymentSnapshot, actual: ActualDeployment) -> Fact | None:
    """What the log does not know yet of an application that is as it was wanted."""
    about = {"endpoint_name": snapshot.endpoint_name, "deployment_id": snapshot.deployment_id, "generation": snapshot.generation}
    has_run = snapshot.status in (DeploymentStatus.READY, DeploymentStatus.DEGRADED)
    is_complete = len(actual.replicas) >= snapshot.min_replicas and actual.status is AppStatus.RUNNING
    if is_complete and (not has_run or snapshot.pending_traffic_percent is not None):
        return DeploymentReady(**about, replicas=actual.replicas)
    if has_run and (snapshot.is_cluster_away or set(actual.replicas) != set(snapshot.replicas)):
        return DeploymentChanged(**about, replicas=actual.replicas, reason=actual.message)
    if actual.status is AppStatus.FAILED and not actual.replicas and snapshot.status is not DeploymentStatus.FAILED:
        return DeploymentFailed(**about, reason=actual.message or "the replicas cannot be started")
    return None
