"""Wiring of streaming."""

from collections.abc import Sequence

from libs import artifacts, reports
from libs.artifacts import ArtifactStore
from libs.inference.pool import RunnerPool
from libs.inference.spans import RunnerSpans, runner_spans
from libs.lifecycle import Component
from libs.messaging import cloudevents
from libs.messaging.admin import create_topics, delete_topics
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.follower import Follower
from libs.messaging.kafka import KafkaBroker
from libs.metrics import PROCESS
from schemas.topics import STATE_DEPLOYMENTS, STATE_ENDPOINTS, Topic
from services.streaming.adapters import KafkaStreamLog
from services.streaming.answering import AnswerParts
from services.streaming.claims import Claims
from services.streaming.log import StreamLog, StreamLogs
from services.streaming.reporting import Reporting
from services.streaming.retirement import DeleteTopics, Retirement
from services.streaming.settings import Settings
from services.streaming.state import State
from services.streaming.streams import CreateTopics, StreamParts, Streams


def build(
    settings: Settings,
    *,
    broker: Broker | None = None,
    logs: StreamLogs | None = None,
    topics: CreateTopics | None = None,
    deletion: DeleteTopics | None = None,
    store: ArtifactStore | None = None,
    spans: RunnerSpans | None = None,
    clock: Clock = cloudevents.utc_now,
) -> Sequence[Component]:
    """The components of streaming, in the order they start."""
    state = State()

    async def create(topics: Sequence[Topic]) -> None:
        await create_topics(settings.kafka, topics)

    async def delete(topics: Sequence[Topic]) -> None:
        await delete_topics(settings.kafka, topics)

    def stream_log(endpoint_name: str) -> StreamLog:
        return KafkaStreamLog(settings.kafka, endpoint_name, settings.chunk_bytes, PROCESS)

    answering = AnswerParts(
        state,
        RunnerPool(settings.runner.key_file, spans or runner_spans(settings.telemetry)),
        Claims(store or artifacts.from_settings(settings.artifacts), settings.claim_bytes),
        settings.answer_limits,
        clock=clock,
        metrics=PROCESS,
        is_traced=spans is not None or bool(settings.telemetry.otel_exporter_otlp_endpoint),
    )
    broker = broker or KafkaBroker(settings.kafka)
    follower = Follower(broker, [STATE_ENDPOINTS.name, STATE_DEPLOYMENTS.name], state.apply)
    streams = Streams(StreamParts(state, logs or stream_log, topics or create, answering, settings.stream_limits))
    retirement = Retirement(broker, deletion or delete, streams.is_used, settings.topics_kept_s, clock)
    reporting = Reporting(settings.process.home / "run" / reports.STREAMS_FILE, streams.failing)
    return [follower, reporting, retirement, streams]
