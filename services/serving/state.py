"""What serving knows of the log: routes for the streams, and the deployments that shall run."""

import asyncio
import logging
from dataclasses import dataclass

from libs.errors import InvalidMessage
from libs.inference.routing import RoutingTable
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Event
from libs.messaging.records import Record
from schemas.base import Payload
from schemas.registry import DeploymentSnapshot, Replica

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A deployment as the registry last described it, and the event that said so."""

    snapshot: DeploymentSnapshot
    event: Event[Payload]


class State:
    """A fold of the state topics.

    Attributes
    ----------
    unreadable
        Deployments whose newest snapshot cannot be read. What runs of them goes on running: it is not known that nobody wants it.
    """

    def __init__(self) -> None:
        self.routing = RoutingTable()
        self.deployments: dict[str, Wanted] = {}
        self.unreadable: set[str] = set()
        self.deployments_changed = asyncio.Event()
        self.endpoints_changed = asyncio.Event()

    def apply(self, record: Record) -> None:
        """Fold one record in; one that cannot be read is logged and passed over."""
        entity = (record.key or b"").decode("utf-8", "replace")
        try:
            event = None if record.value is None else _read(record, entity)
        except InvalidMessage as error:
            log.error("passed over %s offset %d: %s", record.topic, record.offset, error)
            if record.topic == DeploymentSnapshot.topic:
                self.unreadable.add(entity)
            return
        if event is None:
            self.routing.remove(record.topic, entity)
        else:
            self.routing.apply(event.data)
        if record.topic == DeploymentSnapshot.topic:
            self._apply_deployment(entity, event)
            self.deployments_changed.set()
        else:
            self.endpoints_changed.set()

    def replicas(self) -> set[Replica]:
        """The replicas of all deployments."""
        return {replica for wanted in self.deployments.values() for replica in wanted.snapshot.replicas}

    def _apply_deployment(self, entity: str, event: Event[Payload] | None) -> None:
        self.unreadable.discard(entity)
        if event is None:
            self.deployments.pop(entity, None)
        elif isinstance(event.data, DeploymentSnapshot):
            self.deployments[entity] = Wanted(event.data, event)


def _read(record: Record, entity: str) -> Event[Payload]:
    event = cloudevents.read(record)
    if (event.data.topic, event.data.entity) != (record.topic, entity):
        raise InvalidMessage(f"{event.type} of {event.data.entity!r} does not belong on {record.topic} under the key {entity!r}")
    return event
