"""Wiring of serving."""

from collections.abc import Sequence

from libs.lifecycle import Component
from libs.messaging import cloudevents
from libs.messaging.admin import create_topics
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.follower import Follower
from libs.messaging.kafka import KafkaBroker
from schemas.topics import STATE_DEPLOYMENTS, STATE_ENDPOINTS, Topic
from services.serving.controller import Cluster, Controller
from services.serving.settings import Settings
from services.serving.state import State
from services.serving.streaming import Runners, StreamLimits, Streams


def build(
    settings: Settings, *, broker: Broker | None = None, cluster: Cluster | None = None, clock: Clock = cloudevents.utc_now
) -> Sequence[Component]:
    """The components of serving, in the order they start."""
    log = broker or KafkaBroker(settings.kafka)
    state = State()
    controller = Controller(
        state,
        cluster or _ray(settings),
        log,
        settings.places,
        threads=settings.threads,
        memory_bytes=settings.memory_limit_bytes,
        poll_settled_s=settings.poll_settled_s,
        poll_unsettled_s=settings.poll_unsettled_s,
        clock=clock,
    )

    async def create(topics: Sequence[Topic]) -> None:
        await create_topics(settings.kafka, topics)

    limits = StreamLimits(settings.stream_batch_records, settings.stream_timeout_s)
    streams = Streams(state, log, Runners(settings.runner.key_file), create, limits, clock)
    return [Follower(log, [STATE_ENDPOINTS.name, STATE_DEPLOYMENTS.name], state.apply), controller, streams]


def _ray(settings: Settings) -> Cluster:
    # Importing Ray takes 0.8 s and reads its environment.
    from services.serving.adapters import RayServe
    from services.serving.replica import ModelReplica

    return RayServe(settings.ray.address, ModelReplica, keeps_warm=settings.keep_warm)
