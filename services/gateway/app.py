"""Wiring of the gateway."""

from collections.abc import Sequence
from dataclasses import dataclass

from libs import artifacts
from libs.artifacts import ArtifactStore
from libs.inference.pool import RunnerPool
from libs.inference.spans import RunnerSpans, runner_spans
from libs.lifecycle import Component
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.follower import Follower
from libs.messaging.kafka import KafkaBroker
from schemas.topics import COMMANDS, DLQ, EVENTS, STATE
from services.gateway.access import access_control
from services.gateway.api import create_api
from services.gateway.catalog import Catalog
from services.gateway.commands import Commander
from services.gateway.front import Front
from services.gateway.handlers import Management
from services.gateway.health import Health
from services.gateway.journal import MAX_DEAD_LETTERS, MAX_EVENTS, Journal
from services.gateway.predict import PredictDoors
from services.gateway.runners import Runners
from services.gateway.server import HttpServer
from services.gateway.settings import Settings


@dataclass(frozen=True)
class Gateway:
    """The whole service: what runs, in the order it starts, and the ASGI application it serves."""

    components: Sequence[Component]
    app: Front
    server: HttpServer


def build(
    settings: Settings,
    *,
    broker: Broker | None = None,
    store: ArtifactStore | None = None,
    clock: Clock = cloudevents.utc_now,
    spans: RunnerSpans | None = None,
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
    runners = Runners(catalog, pool, settings.replica_wait_ms / 1000)
    doors = PredictDoors(catalog, runners, health, settings.predict_timeout_ms, settings.predict_max_bytes)
    management = Management(catalog, journal, commander, store, health, settings.command_wait_s, settings.artifacts.max_bytes)
    app = Front(
        access,
        doors.handlers(),
        create_api(management),
        predict_max_bytes=settings.predict_max_bytes,
        management_max_bytes=settings.management_max_bytes,
    )
    server = HttpServer(app, health, settings.host, settings.http_port, settings.drain_timeout_s)
    components = (
        runners,
        commander,
        StateFollower(broker, catalog, health),
        Follower(broker, [COMMANDS.name, EVENTS.name], journal.apply, MAX_EVENTS),
        Follower(broker, [DLQ.name], journal.apply_dead_letter, MAX_DEAD_LETTERS),
        server,
    )
    return Gateway(components, app, server)


class StateFollower(Follower):
    """Folds the state topics into the catalog; the gateway is ready once it has caught up."""

    def __init__(self, broker: Broker, catalog: Catalog, health: Health) -> None:
        super().__init__(broker, [topic.name for topic in STATE], catalog.apply)
        self._health = health

    async def start(self) -> None:
        await super().start()
        self._health.caught_up = True
