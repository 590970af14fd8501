"""Wiring of the builder."""

from collections.abc import Sequence

from libs.environments import EnvironmentCache
from libs.lifecycle import Component
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.consumer import ConsumerRunner
from libs.messaging.faust_app import FaustRunner
from libs.messaging.kafka import KafkaBroker
from libs.messaging.processing import Processor
from libs.metrics import PROCESS, Metrics
from libs.metrics.definitions import DAMAGED_COPIES
from schemas.topics import EVENTS
from services.builder.adapters import Environments, Resolver, UvResolver
from services.builder.handlers import Handlers
from services.builder.settings import Settings

GROUP = "millrace-builder"


def build(
    settings: Settings,
    *,
    broker: Broker | None = None,
    resolver: Resolver | None = None,
    environments: Environments | None = None,
    clock: Clock = cloudevents.utc_now,
    metrics: Metrics = PROCESS,
) -> Sequence[Component]:
    """The components of the builder, in the order they start. A broker that is given (a fake) is read without faust."""
    resolver = resolver or UvResolver(
        settings.process.home / "cache" / "resolutions",
        timeout_s=settings.resolution_timeout_s,
        max_age_s=settings.resolution_max_age_s,
    )
    environments = environments or _environments(settings, metrics)
    processor = Processor("builder", Handlers(resolver, environments).table(), clock=clock)
    if broker is not None:
        return [ConsumerRunner(broker, [EVENTS.name], GROUP, processor, concurrency=settings.concurrency)]
    log = KafkaBroker(settings.kafka)
    return [FaustRunner(settings.kafka, log, [EVENTS.name], GROUP, processor, concurrency=settings.concurrency)]


def _environments(settings: Settings, metrics: Metrics) -> EnvironmentCache:
    damaged = metrics.counter(DAMAGED_COPIES, "builder", "environment")

    def count() -> None:
        damaged.value += 1

    return EnvironmentCache(settings.environments.dir, timeout_s=settings.environments.build_timeout_s, on_damaged=count)
