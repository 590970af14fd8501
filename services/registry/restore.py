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
from services.registry.state import Change, Deletion, Snapshot, State

log = logging.getLogger(__name__)

_SNAPSHOT_TYPES: dict[str, type[Snapshot]] = {
    snapshot_type.topic: snapshot_type for snapshot_type in (ModelSnapshot, VersionSnapshot, EndpointSnapshot, DeploymentSnapshot)
}


async def restore(broker: Broker, state: State, handled: HandledCommands) -> None:
    """Fold the state topics into ``state`` and what commands were answered into ``handled``."""
    started = time.perf_counter()
    counted = {"records": 0}

    def apply(record: Record) -> None:
        counted["records"] += 1
        if record.topic == EVENTS.name:
            cause = record.header("ce_causationid")
            if cause is not None:
                handled.add(record.header("ce_causationsource"), cause)
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
    """Fold one record of a state topic in; one that the registry cannot have written is logged and passed over.

    Whoever can reach the broker can write here, and a compacted topic never forgets: one stray record must not keep the registry from
    starting.
    """
    try:
        change = _change(record)
    except InvalidMessage as error:
        log.error("passed over %s offset %d: %s", record.topic, record.offset, error)
    else:
        state.apply([change])


def _change(record: Record) -> Change:
    snapshot_type = _SNAPSHOT_TYPES[record.topic]
    entity = (record.key or b"").decode("utf-8", "replace")
    if record.value is None:
        return Deletion(snapshot_type, entity)
    data = cloudevents.read(record).data
    if not isinstance(data, snapshot_type) or data.entity != entity:
        raise InvalidMessage(f"under the key {entity[:200]!r} stands {type(data).__name__} {data.entity!r}")
    return data
