"""Wiring of the registry."""

from collections.abc import Sequence

from libs.lifecycle import Component
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.consumer import TransactionalRunner
from libs.messaging.kafka import KafkaBroker
from libs.messaging.processing import Processor
from schemas.topics import COMMANDS, EVENTS
from services.registry.handlers import HandledCommands, Handlers
from services.registry.restore import restore
from services.registry.settings import Settings
from services.registry.state import State

GROUP = "millrace-registry"


def build(settings: Settings, *, broker: Broker | None = None, clock: Clock = cloudevents.utc_now) -> Sequence[Component]:
    """The components of the registry, in the order they start."""
    broker = broker or KafkaBroker(settings.kafka)
    state, handled = State(), HandledCommands()
    processor = Processor("registry", Handlers(state, handled, clock).table(), dead_letter_unknown={COMMANDS.name}, clock=clock)

    async def restored() -> None:
        await restore(broker, state, handled)

    return [TransactionalRunner(broker, [COMMANDS.name, EVENTS.name], GROUP, processor, restored)]
