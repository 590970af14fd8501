"""What serving knows of the log: routes for the streams, and the deployments that shall run."""

import asyncio
import logging
from dataclasses import dataclass

from libs.errors import InvalidMessage
from libs.inference.routing import RoutingTable
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Event
from libs.messaging.records import Record
from schemas.registry import DeploymentSnapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A deployment as the registry last described it, and the event that said so."""

    snapshot: DeploymentSnapshot
    event: Event[DeploymentSnapshot]


class State:
    """A fold of the state topics."""

    def __init__(self) -> None:
        self.routing = RoutingTable()
        self.deployments: dict[str, Wanted] = {}
        self.deployments_changed = asyncio.Event()
        self.endpoints_changed = asyncio.Event()

    def apply(self, record: Record) -> None:
        """Fold one record in; one that cannot be read is logged and passed over."""
        if record.value is None:
            entity = (record.key or b"").decode("utf-8", "replace")
            self.routing.remove(record.topic, entity)
            if record.topic == DeploymentSnapshot.topic:
                self.deployments.pop(entity, None)
        else:
            try:
                event = cloudevents.read(record)
            except InvalidMessage as error:
                log.error("passed over %s offset %d: %s", record.topic, record.offset, error)
                return
            self.routing.apply(event.data)
            if isinstance(event.data, DeploymentSnapshot):
                self.deployments[event.data.deployment_id] = Wanted(event.data, event)  # type: ignore[arg-type]
        (self.deployments_changed if record.topic == DeploymentSnapshot.topic else self.endpoints_changed).set()
