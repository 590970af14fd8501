"""What streaming knows of the log: which endpoints there are, and who answers for them."""

import asyncio
import logging

from libs.errors import InvalidMessage, NotFoundError, NotReadyError
from libs.inference.routing import Route, RoutingTable
from libs.messaging import cloudevents
from libs.messaging.records import Record
from schemas.registry import DeploymentSnapshot, Replica

log = logging.getLogger(__name__)


class State:
    """A fold of the state topics of endpoints and deployments.

    Attributes
    ----------
    changed
        Set whenever something may be different; whoever waits for it clears it.
    """

    def __init__(self) -> None:
        self.routing = RoutingTable()
        self.changed = asyncio.Event()
        self._replicas: dict[str, tuple[Replica, ...]] = {}

    def apply(self, record: Record) -> None:
        """Fold one record in; one that cannot be read is logged and passed over."""
        entity = (record.key or b"").decode("utf-8", "replace")
        if record.value is None:
            self._replicas.pop(entity, None)
            self.routing.remove(record.topic, entity)
        else:
            try:
                self._fold(record, entity)
            except InvalidMessage as error:
                log.error("passed over %s offset %d: %s", record.topic, record.offset, error)
                return
        self.changed.set()

    def replicas(self) -> set[Replica]:
        """The replicas of all deployments."""
        return {replica for replicas in self._replicas.values() for replica in replicas}

    def route(self, endpoint_name: str, chance: float) -> Route:
        """Who answers a request; raises ``NotReadyError`` when nobody does, be it because the endpoint was just deleted."""
        try:
            return self.routing.choose(endpoint_name, random=chance)
        except NotFoundError as error:
            raise NotReadyError(error.message) from error

    def _fold(self, record: Record, entity: str) -> None:
        event = cloudevents.read(record)
        if (event.data.topic, event.data.entity) != (record.topic, entity):
            raise InvalidMessage(f"{event.type} of {event.data.entity!r} does not belong on {record.topic} under the key {entity!r}")
        if isinstance(event.data, DeploymentSnapshot):
            self._replicas[entity] = event.data.replicas
        self.routing.apply(event.data)
