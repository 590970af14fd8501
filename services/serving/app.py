"""Wiring of serving."""

from collections.abc import Sequence

from libs.lifecycle import Component
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.follower import Follower
from libs.messaging.kafka import KafkaBroker
from libs.metrics import PROCESS, Metrics
from schemas.topics import STATE_DEPLOYMENTS
from services.serving.controller import Cluster, Controller
from services.serving.metrics import DeploymentMetrics
from services.serving.settings import Settings
from services.serving.state import State


def build(
    settings: Settings,
    *,
    broker: Broker | None = None,
    cluster: Cluster | None = None,
    clock: Clock = cloudevents.utc_now,
    metrics: Metrics = PROCESS,
) -> Sequence[Component]:
    """The components of serving, in the order they start."""
    log = broker or KafkaBroker(settings.kafka)
    measures = DeploymentMetrics(metrics)
    state = State(measures.changed)
    measures.watch(state.deployments)
    controller = Controller(
        state,
        cluster or _ray(settings),
        log,
        settings.places,
        settings.limits,
        poll_settled_s=settings.poll_settled_s,
        poll_unsettled_s=settings.poll_unsettled_s,
        clock=clock,
        metrics=metrics,
    )
    return [Follower(log, [STATE_DEPLOYMENTS.name], state.apply), controller]


def _ray(settings: Settings) -> Cluster:
    # Importing Ray takes seconds and reads its environment.
    import libs.lean_ray  # noqa: F401 - before all others
    from services.serving.adapters import RayServe
    from services.serving.replica import ModelReplica

    return RayServe(settings.ray.address, ModelReplica, address_file=settings.ray.address_file, keeps_warm=settings.keep_warm)
