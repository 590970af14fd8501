"""What serving knows of the log: the deployments that shall run."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from libs.errors import InvalidMessage
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Event
from libs.messaging.records import Record
from schemas.base import Payload
from schemas.registry import DeploymentSnapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A deployment as the registry last described it, and the event that said so."""

    snapshot: DeploymentSnapshot
    event: Event[Payload]


class State:
    """A fold of the deployments' state topic.

    Parameters
    ----------
    changed
        Called with the snapshot before and the one after, when a deployment that is known is described anew.

    Attributes
    ----------
    unreadable
        Deployments whose newest snapshot cannot be read. What runs of them goes on running: it is not known that nobody wants it.
    """

    def __init__(self, changed: Callable[[DeploymentSnapshot, DeploymentSnapshot], None] = lambda _before, _after: None) -> None:
        self._changed = changed
        self.deployments: dict[str, Wanted] = {}
        self.unreadable: set[str] = set()
        self.deployments_changed = asyncio.Event()

    def apply(self, record: Record) -> None:
        """Fold one record in; one that cannot be read is logged and passed over."""
        entity = (record.key or b"").decode("utf-8", "replace")
        try:
            wanted = None if record.value is None else _read(record, entity)
        except InvalidMessage as error:
            log.error("passed over %s offset %d: %s", record.topic, record.offset, error)
            self.unreadable.add(entity)
            return
        self.unreadable.discard(entity)
        if wanted is None:
            self.deployments.pop(entity, None)
        else:
            known = self.deployments.get(entity)
            if known is not None:
                self._changed(known.snapshot, wanted.snapshot)
            self.deployments[entity] = wanted
        self.deployments_changed.set()


def _read(record: Record, entity: str) -> Wanted:
    event = cloudevents.read(record)
    snapshot = event.data
    if not isinstance(snapshot, DeploymentSnapshot) or snapshot.entity != entity:
        raise InvalidMessage(f"{event.type} of {event.data.entity!r} does not belong on {record.topic} under the key {entity!r}")
    return Wanted(snapshot, event)
