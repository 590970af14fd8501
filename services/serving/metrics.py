"""What serving counts: deployments, their replicas, runners that had to be started again, and copies that replicas found damaged."""

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping

from libs.metrics import Metrics
from libs.metrics import definitions as metric
from schemas.registry import DeploymentSnapshot, DeploymentStatus
from services.serving.reconcile import ActualDeployment, Damage
from services.serving.state import Wanted

_RUNNING = (DeploymentStatus.READY, DeploymentStatus.DEGRADED)


class DeploymentMetrics:
    """Numbers of the deployments that the log describes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def watch(self, deployments: Mapping[str, Wanted]) -> None:
        """Show at each reading what the mapping then holds."""

        def snapshots() -> Iterator[DeploymentSnapshot]:
            return (wanted.snapshot for wanted in list(deployments.values()))

        self._metrics.watch(
            metric.DEPLOYMENTS, lambda: [((status,), number) for status, number in Tally(each.status.value for each in snapshots()).items()]
        )
        self._metrics.watch(metric.REPLICAS, lambda: [(_labels(each), len(each.replicas)) for each in snapshots()])
        self._metrics.watch(metric.REPLICAS_WANTED, lambda: [(_labels(each), each.min_replicas) for each in snapshots()])

    def changed(self, before: DeploymentSnapshot, after: DeploymentSnapshot) -> None:
        """A deployment is described anew: replicas that joined while it ran took the place of others."""
        if before.status in _RUNNING and before.generation == after.generation:
            joined = set(after.replicas) - set(before.replicas)
            if joined:
                self._metrics.counter(metric.RUNNER_RESTARTS, *_labels(after)).value += len(joined)


class DamageMetrics:
    """Copies that replicas found damaged; they say how many there have been, and what comes on top is counted.

    What they had found before this process first looked was counted by the one before it.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._artifacts = metrics.counter(metric.DAMAGED_COPIES, "serving", "artifact")
        self._environments = metrics.counter(metric.DAMAGED_COPIES, "serving", "environment")
        self._known: dict[str, Damage] | None = None

    def look(self, applications: Iterable[ActualDeployment]) -> None:
        """Take what the replicas of all deployments say."""
        said = {damage.replica_id: damage for application in applications for damage in application.damage}
        for replica_id, damage in said.items() if self._known is not None else ():
            before = (self._known or {}).get(replica_id, Damage(replica_id, 0, 0))
            self._artifacts.value += max(damage.artifacts - before.artifacts, 0)
            self._environments.value += max(damage.environments - before.environments, 0)
        self._known = {**(self._known or {}), **said}


def _labels(snapshot: DeploymentSnapshot) -> tuple[str, str]:
    return snapshot.endpoint_name, snapshot.deployment_id
