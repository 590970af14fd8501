"""Wiring of serving."""

from collections.abc import Sequence

from libs.inference.pool import RunnerPool
from libs.inference.spans import RunnerSpans, runner_spans
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
from services.serving.streaming import CreateTopics, StreamParts, Streams


def build(
    settings: Settings,
    *,
    broker: Broker | None = None,
    cluster: Cluster | None = None,
    topics: CreateTopics | None = None,
    spans: RunnerSpans | None = None,
    clock: Clock = cloudevents.utc_now,
) -> Sequence[Component]:
    """The components of serving, in the order they start."""
    log = broker or KafkaBroker(settings.kafka)
    state = State()
    controller = Controller(
        state,
        cluster or _ray(settings),
        log,
        settings.places,
        settings.limits,
        poll_settled_s=settings.poll_settled_s,
        poll_unsettled_s=settings.poll_unsettled_s,
        clock=clock,
    )

    async def create(topics: Sequence[Topic]) -> None:
        await create_topics(settings.kafka, topics)

    pool = RunnerPool(settings.runner.key_file, spans or runner_spans(settings.telemetry))
    streams = Streams(StreamParts(state, log, pool, topics or create, settings.stream_limits, clock=clock))
    return [Follower(log, [STATE_ENDPOINTS.name, STATE_DEPLOYMENTS.name], state.apply), controller, streams]


def _ray(settings: Settings) -> Cluster:
    # Importing Ray takes 0.8 s and reads its environment.
    from services.serving.adapters import RayServe
    from services.serving.replica import ModelReplica

    return RayServe(settings.ray.address, ModelReplica, keeps_warm=settings.keep_warm)
