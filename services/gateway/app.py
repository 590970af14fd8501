"""Wiring of the gateway."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from libs import artifacts, reports
from libs.artifacts import ArtifactStore
from libs.inference.pool import RunnerPool
from libs.inference.spans import RunnerSpans, runner_spans
from libs.lifecycle import Component
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.follower import Follower
from libs.messaging.kafka import KafkaBroker
from libs.messaging.processing import Processor
from libs.messaging.retry import Retry
from libs.metrics import PROCESS, Metrics
from libs.metrics.definitions import CONNECTIONS
from libs.metrics.exposition import Exposition
from schemas.operations import PredictionAccepted, PredictionEnded
from schemas.topics import COMMANDS, DLQ, EVENTS, OPERATIONS, STATE
from services.gateway.access import access_control
from services.gateway.api import create_api
from services.gateway.asynchronous import PAUSES, AsyncLimits, AsyncPredictions
from services.gateway.batching import BatchLimits
from services.gateway.catalog import Catalog
from services.gateway.commands import Commander
from services.gateway.dataplane import DataPlane, DataPlaneLimits
from services.gateway.doors import invocations, v1, v2, vertex
from services.gateway.front import Front
from services.gateway.handlers import Management
from services.gateway.health import Health
from services.gateway.journal import MAX_DEAD_LETTERS, MAX_EVENTS, Journal
from services.gateway.metrics import MetricsDoor, SharedMetrics
from services.gateway.operations import Operations
from services.gateway.patience import PatientRunner
from services.gateway.predictions import Handler, Read
from services.gateway.readiness import Readiness
from services.gateway.recorder import ledger_directory, recorder_from_settings
from services.gateway.rpc.server import GrpcServer, methods
from services.gateway.server import HttpServer
from services.gateway.settings import Settings
from services.gateway.statistics import StatisticsDoor
from services.gateway.tracing import tracing
from services.gateway.webhooks import WebhookLimits, Webhooks

_WEBHOOKS_AT_ONCE = 64
_LONGEST_WEBHOOK_PAUSE_S = 3_600.0
_WEBHOOK_GRACE_S = 1.0
"""Time that hosts get to take the news when the process stops; else they are told again after it."""


@dataclass(frozen=True)
class Gateway:
    """The whole service: what runs, in the order it starts, and what its HTTP server serves."""

    components: Sequence[Component]
    front: Front
    dataplane: DataPlane
    server: HttpServer
    grpc: GrpcServer | None


def build(
    settings: Settings,
    *,
    broker: Broker | None = None,
    store: ArtifactStore | None = None,
    clock: Clock = cloudevents.utc_now,
    spans: RunnerSpans | None = None,
    reuse_port: bool = False,
) -> Gateway:
    """Wire the gateway; opens nothing yet.

    Raises
    ------
    ConfigurationError
        When it would listen where others can reach it and has no API keys, or a setting makes no sense.
    """
    access = access_control(settings)
    broker = broker or KafkaBroker(settings.kafka)
    store = store or artifacts.from_settings(settings.artifacts)
    catalog, journal, health = Catalog(), Journal(), Health()
    commander = Commander(broker, catalog, journal, clock, settings.broker_timeout_s)
    pool = RunnerPool(settings.runner.key_file, spans or runner_spans(settings.telemetry))
    metrics = Metrics()
    recorder = recorder_from_settings(settings, catalog, broker, metrics, clock)
    shared = SharedMetrics(ledger_directory(settings.process.home), recorder.instance, metrics, recorder.statistics)
    dataplane = DataPlane(catalog, pool, recorder, data_plane_limits(settings))
    recorder.watch_lanes(lambda: dataplane.lanes)
    management = Management(catalog, journal, commander, store, health, settings.command_wait_s, settings.artifacts.max_bytes)
    statistics = StatisticsDoor(catalog, recorder.statistics, shared.others_statistics)
    handlers = {**_handlers(settings, catalog, health), **statistics.handlers()}
    reads = _reads(settings, catalog)
    operations = Operations(clock, settings.async_operations, settings.async_kept_bytes)
    hosts = [host.strip() for host in settings.webhook_hosts.split(",") if host.strip()]
    webhooks = Webhooks(hosts, settings.webhook_secret.get_secret_value().encode(), WebhookLimits(settings.webhook_attempts))
    limits = AsyncLimits(default_expiry_s=settings.async_expiry_s, max_bytes=settings.predict_max_bytes)
    asynchronous = AsyncPredictions(
        operations, commander, store, dataplane, catalog.routing, reads, webhooks, clock, limits, recorder.refused
    )
    front = Front(
        access,
        reads,
        {**handlers, **asynchronous.handlers(), **MetricsDoor(Exposition(metrics.samples, PROCESS.samples, shared.others)).handlers()},
        create_api(management),
        dataplane,
        asynchronous,
        tracing(settings.telemetry),
        refused=recorder.refused,
        predict_max_bytes=settings.predict_max_bytes,
        management_max_bytes=settings.management_max_bytes,
    )
    server = HttpServer(front, health, settings.host, settings.http_port, settings.http, settings.drain_timeout_s, reuse_port=reuse_port)
    grpc = None
    if settings.grpc.enabled:
        grpc = GrpcServer(
            access,
            methods(dataplane, handlers, health, recorder.refused),
            settings.grpc,
            settings.host,
            tracing(settings.telemetry),
            message_bytes=settings.predict_max_bytes,
            drain_timeout_s=settings.drain_timeout_s,
            reuse_port=reuse_port,
        )
    metrics.watch(CONNECTIONS, lambda: _connections(server, grpc))
    components: tuple[Component, ...] = (
        recorder,
        *([shared] if settings.workers > 1 else []),
        dataplane,
        commander,
        StateFollower(broker, catalog, health),
        Follower(broker, [COMMANDS.name, EVENTS.name], journal.apply, MAX_EVENTS),
        Follower(broker, [DLQ.name], journal.apply_dead_letter, MAX_DEAD_LETTERS),
        Follower(broker, [OPERATIONS.name], operations.apply),
        webhooks,
        PatientRunner(
            broker,
            OPERATIONS.name,
            "millrace-gateway-operations",
            Processor("gateway", {PredictionAccepted: asynchronous.carry_out}, clock=clock),
            asynchronous.endpoint_of,
            places=settings.async_concurrency,
            pauses=PAUSES,
        ),
        PatientRunner(
            broker,
            OPERATIONS.name,
            "millrace-gateway-webhooks",
            Processor("gateway", {PredictionEnded: asynchronous.notify}, clock=clock),
            asynchronous.host_to_tell,
            places=_WEBHOOKS_AT_ONCE,
            pauses=Retry(settings.webhook_first_pause_s, longest_s=_LONGEST_WEBHOOK_PAUSE_S),
            grace_s=_WEBHOOK_GRACE_S,
        ),
        *([Readiness(catalog, pool, settings.process.home / "run" / reports.ENDPOINTS_FILE)] if PROCESS.worker in ("", "0") else []),
        *([grpc] if grpc is not None else []),
        server,
    )
    return Gateway(components, front, dataplane, server, grpc)


def data_plane_limits(settings: Settings) -> DataPlaneLimits:
    """What the settings say of how long requests may take, and how many may wait."""
    return DataPlaneLimits(
        timeout_ms=settings.predict_timeout_ms,
        replica_wait_s=settings.replica_wait_ms / 1000,
        accepted=settings.accepted_requests,
        held_bytes=settings.held_bytes,
        look_s=settings.look_us / 1e6,
        batch=BatchLimits(
            rows=settings.batch_rows,
            size_bytes=settings.batch_bytes,
            in_flight=settings.batches_in_flight,
            queued=settings.queue_requests,
            takes_s=settings.batch_ms / 1000,
            wait_s=settings.queue_ms / 1000,
        ),
    )


def _reads(settings: Settings, catalog: Catalog) -> Mapping[tuple[str, str], Read]:
    max_bytes = settings.predict_max_bytes
    return {
        **v1.reads(max_bytes),
        **v2.reads(max_bytes),
        **vertex.reads(max_bytes),
        **invocations.reads(catalog, settings.default_endpoint, max_bytes),
    }


def _handlers(settings: Settings, catalog: Catalog, health: Health) -> Mapping[tuple[str, str], Handler]:
    return {
        **v1.handlers(catalog),
        **v2.handlers(catalog, health, settings.batch_rows),
        **vertex.handlers(catalog),
        **invocations.handlers(catalog, health),
    }


def _connections(server: HttpServer, grpc: GrpcServer | None) -> list[tuple[tuple[str], int]]:
    """Open connections by transport."""
    opened = [(("http",), len(server.connections) if server.connections is not None else 0)]
    return opened if grpc is None else [*opened, (("grpc",), grpc.connections)]


class StateFollower(Follower):
    """Folds the state topics into the catalog; the gateway is ready once it has caught up."""

    def __init__(self, broker: Broker, catalog: Catalog, health: Health) -> None:
        super().__init__(broker, [topic.name for topic in STATE], catalog.apply)
        self._health = health

    async def start(self) -> None:
        await super().start()
        self._health.caught_up = True
