"""What serving counts: deployments, their replicas, and runners that had to be started again."""

from collections import Counter as Tally
from collections.abc import Iterator, Mapping

from libs.metrics import Metrics
from libs.metrics import definitions as metric
from schemas.registry import DeploymentSnapshot, DeploymentStatus
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


def _labels(snapshot: DeploymentSnapshot) -> tuple[str, str]:
    return snapshot.endpoint_name, snapshot.deployment_id
