"""Reading the registry's state back from the log."""

import logging
import time

from libs.errors import InvalidMessage
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.follower import Follower
from libs.messaging.records import Record
from schemas.registry import DeploymentSnapshot, EndpointSnapshot, ModelSnapshot, VersionSnapshot
from schemas.topics import EVENTS, STATE
from services.registry.handlers import HandledCommands
from services.registry.state import Deletion, Snapshot, State

log = logging.getLogger(__name__)

_SNAPSHOT_TYPES: dict[str, type[Snapshot]] = {
    snapshot_type.topic: snapshot_type for snapshot_type in (ModelSnapshot, VersionSnapshot, EndpointSnapshot, DeploymentSnapshot)
}


async def restore(broker: Broker, state: State, handled: HandledCommands) -> None:
    """Fold the state topics into ``state`` and the ids of answered commands into ``handled``."""
    started = time.perf_counter()
    counted = {"records": 0}

    def apply(record: Record) -> None:
        counted["records"] += 1
        if record.topic == EVENTS.name:
            cause = record.header("ce_causationid")
            if cause is not None:
                handled.add(cause)
        else:
            fold(state, record)

    for follower in (
        Follower(broker, [topic.name for topic in STATE], apply),
        Follower(broker, [EVENTS.name], apply, last_records=handled.capacity),
    ):
        try:
            await follower.start()
        finally:
            await follower.stop()
    log.info(
        "state restored from the log",
        extra={
            "fields": {
                "records": counted["records"],
                "models": len(state.models),
                "versions": len(state.versions),
                "endpoints": len(state.endpoints),
                "duration_s": round(time.perf_counter() - started, 3),
            }
        },
    )


def fold(state: State, record: Record) -> None:
    """Fold one record of a state topic in.

    Raises
    ------
    InvalidMessage
        When a snapshot cannot be read: only the registry writes here, so the state cannot be trusted any more.
    """
    snapshot_type = _SNAPSHOT_TYPES[record.topic]
    if record.key is None:
        raise InvalidMessage(f"{record.topic} offset {record.offset} has no key")
    if record.value is None:
        state.apply([Deletion(snapshot_type, record.key.decode())])
        return
    event = cloudevents.read(record)
    if not isinstance(event.data, snapshot_type):
        raise InvalidMessage(f"{record.topic} offset {record.offset} holds a {event.type}")
    state.apply([event.data])
