"""One rule per command and per outcome: contract in, decision taken and folded in, contract out."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from libs.errors import InvalidMessage
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Clock, Event
from libs.messaging.processing import Handler
from libs.messaging.records import MAX_RECORD_BYTES, Record
from schemas import registry as contract
from schemas.base import Command, Payload
from schemas.environment import VersionBuildFailed, VersionBuilt
from schemas.serving import DeploymentChanged, DeploymentFailed, DeploymentReady, DeploymentRemoved
from schemas.validation import VersionInspected, VersionNeedsExample, VersionRejected, VersionValidated
from services.registry import endpoints, versions
from services.registry.errors import RefusedError, invalid
from services.registry.state import Change, Context, Decision, Deletion, State

log = logging.getLogger(__name__)

Rule = Callable[[State, Any, Context], Decision]

MAX_SNAPSHOT_BYTES = MAX_RECORD_BYTES - 16_384
"""Largest snapshot of an entity, in bytes of JSON; the rest of a record is for its key and headers."""

COMMAND_RULES: Mapping[type[Payload], Rule] = {
    contract.RegisterVersion: versions.register,
    contract.SetAlias: versions.set_alias,
    contract.ArchiveVersion: versions.archive,
    contract.SetExample: versions.set_example,
    contract.CreateEndpoint: endpoints.create,
    contract.DeployVersion: endpoints.deploy,
    contract.UndeployVersion: endpoints.undeploy,
    contract.SetTraffic: endpoints.set_traffic,
    contract.SetPredictionLog: endpoints.set_prediction_log,
    contract.DeleteEndpoint: endpoints.delete,
}

OUTCOME_RULES: Mapping[type[Payload], Rule] = {
    VersionInspected: versions.inspected,
    VersionBuilt: versions.built,
    VersionBuildFailed: versions.build_failed,
    VersionNeedsExample: versions.needs_example,
    VersionValidated: versions.validated,
    VersionRejected: versions.rejected,
    DeploymentReady: endpoints.ready,
    DeploymentChanged: endpoints.changed,
    DeploymentFailed: endpoints.failed,
    DeploymentRemoved: endpoints.removed,
}


class HandledCommands:
    """The last ``capacity`` commands that were answered, by source and id, so that the same command sent twice acts once.

    Facts of older registries do not tell the source of their command: it is taken to be any.

    The capacity is bounded because commands are: the topic keeps them for seven days, and a control plane sees thousands, not millions.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self.capacity = capacity
        self._commands: OrderedDict[tuple[str | None, str], None] = OrderedDict()

    def __contains__(self, command: Event[Any]) -> bool:
        return (command.source, command.id) in self._commands or (None, command.id) in self._commands

    def add(self, source: str | None, command_id: str) -> None:
        self._commands[source, command_id] = None
        if len(self._commands) > self.capacity:
            self._commands.popitem(last=False)


class Handlers:
    """Decides against the state and folds each decision into it."""

    def __init__(self, state: State, handled: HandledCommands, clock: Clock = cloudevents.utc_now) -> None:
        self._state = state
        self._handled = handled
        self._clock = clock

    def table(self) -> dict[type[Payload], Handler]:
        """Handler by payload class."""
        return dict.fromkeys((*COMMAND_RULES, *OUTCOME_RULES), self._handle)

    async def _handle(self, event: Event[Payload]) -> Sequence[Payload | Record]:
        data = event.data
        context = Context(self._clock(), event.correlation_id, event.traceparent)
        if not isinstance(data, Command):
            return self._folded(self._bounded(OUTCOME_RULES[type(data)](self._state, data, context)))
        if event in self._handled:
            log.info("command %s of %s was answered before; not repeated", event.id, event.source)
            return ()
        self._handled.add(event.source, event.id)
        try:
            decision = self._commanded(data, context)
        except RefusedError as error:
            refusal = contract.CommandRefused(command_type=event.type, command_entity=data.entity, kind=error.kind, reason=error.message)
            decision = Decision((refusal,))
        return self._folded(decision)

    def _commanded(self, command: Command, context: Context) -> Decision:
        decision = COMMAND_RULES[type(command)](self._state, command, context)
        try:
            return self._bounded(decision)
        except InvalidMessage as error:
            raise invalid(error.message) from error

    def _bounded(self, decision: Decision) -> Decision:
        """The decision; raises ``InvalidMessage`` when the log could not take it, before anything of it is folded in."""
        for change in decision.changes:
            if isinstance(change, Deletion):
                continue
            size_bytes = len(change.model_dump_json().encode())
            if size_bytes > MAX_SNAPSHOT_BYTES:
                raise InvalidMessage(f"{change.entity!r} would take {size_bytes} bytes; its state may take {MAX_SNAPSHOT_BYTES}")
        return decision

    def _folded(self, decision: Decision) -> Sequence[Payload | Record]:
        final: dict[tuple[str, str], Change] = {}
        for change in decision.changes:
            topic = change.snapshot_type.topic if isinstance(change, Deletion) else change.topic
            final[topic, change.entity] = change
        self._state.apply(final.values())
        written = [
            cloudevents.tombstone(change.snapshot_type.topic, change.entity) if isinstance(change, Deletion) else change
            for change in final.values()
        ]
        # Snapshots first: whoever reads a fact and then looks at the state finds it there.
        return [*written, *decision.facts]
