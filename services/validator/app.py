"""Wiring of the validator."""

from collections.abc import Sequence

from libs.artifacts import factory
from libs.artifacts.store import ArtifactStore
from libs.environments import EnvironmentCache
from libs.lifecycle import Component
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.consumer import ConsumerRunner
from libs.messaging.faust_app import FaustRunner
from libs.messaging.follower import Follower
from libs.messaging.kafka import KafkaBroker
from libs.messaging.processing import Processor
from libs.metrics import PROCESS, Metrics
from libs.metrics.definitions import DAMAGED_COPIES
from schemas.topics import EVENTS, STATE_VERSIONS
from services.validator.adapters import Environments, SandboxCheck, Versions, Workplace
from services.validator.handlers import Handlers, Tools, Try, try_in_runner
from services.validator.settings import Settings

GROUP = "millrace-validator"


def build(
    settings: Settings,
    *,
    broker: Broker | None = None,
    store: ArtifactStore | None = None,
    environments: Environments | None = None,
    attempt: Try = try_in_runner,
    clock: Clock = cloudevents.utc_now,
    metrics: Metrics = PROCESS,
) -> Sequence[Component]:
    """The components of the validator, in the order they start. A broker that is given (a fake) is read without faust."""
    workplace = Workplace(settings.process.home / "cache" / "validator")
    versions = Versions()
    tools = Tools(
        versions=versions,
        store=store or factory.from_settings(settings.artifacts),
        environments=environments or _environments(settings, metrics),
        workplace=workplace,
        limits=settings.limits,
        expanded_max_bytes=settings.expanded_max_bytes,
        allow_code=settings.allow_code,
        attempt=attempt,
    )
    processor = Processor("validator", Handlers(tools).table(), clock=clock)
    log = broker or KafkaBroker(settings.kafka)
    topics, concurrency = [EVENTS.name], settings.concurrency
    consumer: Component = (
        ConsumerRunner(log, topics, GROUP, processor, concurrency=concurrency)
        if broker is not None
        else FaustRunner(settings.kafka, log, topics, GROUP, processor, concurrency=concurrency)
    )
    return [workplace, SandboxCheck(workplace, settings.limits), Follower(log, [STATE_VERSIONS.name], versions.apply), consumer]


def _environments(settings: Settings, metrics: Metrics) -> EnvironmentCache:
    damaged = metrics.counter(DAMAGED_COPIES, "validator", "environment")

    def count() -> None:
        damaged.value += 1

    return EnvironmentCache(settings.environments.dir, timeout_s=settings.environments.build_timeout_s, on_damaged=count)
