"""What was said lately: the last events for readers and subscribers, what became of each command, and the last dead letters."""

import asyncio
import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import orjson

from libs.errors import MillraceError, NotFoundError
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Envelope, Event
from libs.messaging.records import Record
from schemas import registry
from schemas.base import Payload
from schemas.dead_letter import DeadLetter
from schemas.topics import COMMANDS
from services.gateway.changes import Changes

log = logging.getLogger(__name__)

MAX_EVENTS = 10_000
MAX_BYTES = 64 * 2**20
"""Kept events and kept dead letters may each take so much memory; the oldest go first."""

MAX_COMMANDS = 10_000
MAX_DEAD_LETTERS = 500
SUBSCRIBER_QUEUE = 1_000
"""Events a subscriber may lag behind before its stream is ended; it can go on with ``Last-Event-ID``."""

ANSWERS: Mapping[type[Payload], tuple[type[Payload], ...]] = {
    registry.RegisterVersion: (registry.VersionRegistered, registry.VersionAlreadyRegistered),
    registry.SetAlias: (registry.AliasSet,),
    registry.ArchiveVersion: (registry.VersionArchived,),
    registry.SetExample: (registry.ExampleSet,),
    registry.CreateEndpoint: (registry.EndpointCreated,),
    registry.DeployVersion: (registry.DeploymentRequested,),
    registry.UndeployVersion: (registry.DeploymentRemovalRequested,),
    registry.SetTraffic: (registry.TrafficChanged,),
    registry.SetPredictionLog: (registry.PredictionLogChanged,),
    registry.DeleteEndpoint: (registry.EndpointDeleted,),
}
"""The facts that answer a command; others with the same cause are what else it led to."""

_ANSWER_TYPES = {command.event_type: tuple(fact.event_type for fact in facts) for command, facts in ANSWERS.items()}


@dataclass(frozen=True, slots=True)
class Told:
    """An event as it was read, with the entity it is about (its key)."""

    envelope: Envelope
    entity: str

    def cloudevent(self) -> dict[str, Any]:
        """The event in CloudEvents' structured JSON form."""
        envelope = self.envelope
        attributes: dict[str, Any] = {
            "specversion": "1.0",
            "id": envelope.id,
            "type": envelope.type,
            "source": envelope.source,
            "time": envelope.time.isoformat().replace("+00:00", "Z"),
            "subject": self.entity,
            "datacontenttype": "application/json",
            "correlationid": envelope.correlation_id,
            "causationid": envelope.causation_id,
            "traceparent": envelope.traceparent,
            "data": self.data(),
        }
        return {name: value for name, value in attributes.items() if value is not None}

    def data(self) -> Any:
        """The data as JSON values."""
        return orjson.loads(self.envelope.data)


@dataclass(frozen=True)
class EventFilter:
    """Which events a reader wants; None means any.

    ``type`` may be a pattern (``*.version.*``). ``entity`` is a record's key, a version (``cancer@1``) or a deployment id.
    """

    type: str | None = None
    entity: str | None = None
    correlation_id: str | None = None

    def matches(self, told: Told) -> bool:
        """Whether an event is wanted."""
        if self.correlation_id is not None and told.envelope.correlation_id != self.correlation_id:
            return False
        if self.type is not None and not fnmatchcase(told.envelope.type, self.type):
            return False
        return self.entity is None or self.entity == told.entity or _is_about(told, self.entity)


def _is_about(told: Told, entity: str) -> bool:
    if not entity.startswith(told.entity):
        return False
    data = told.data()
    return isinstance(data, dict) and entity in (f"{data.get('model_name')}@{data.get('version')}", data.get("deployment_id"))


@dataclass(frozen=True)
class Operation:
    """What became of a command; ``fact`` None and ``letter`` None: not decided yet."""

    command_id: str
    fact: Told | None = None
    letter: DeadLetter | None = None

    @property
    def is_done(self) -> bool:
        """Whether it was decided."""
        return self.fact is not None or self.letter is not None


@dataclass(eq=False)
class Subscription:
    """The events of one subscriber; ``overflowed`` once it was too slow."""

    filter: EventFilter
    queue: asyncio.Queue[Told] = field(default_factory=lambda: asyncio.Queue(SUBSCRIBER_QUEUE))
    overflowed: bool = False

    def offer(self, told: Told) -> None:
        """Queue an event if it is wanted and there is room."""
        if self.overflowed or not self.filter.matches(told):
            return
        try:
            self.queue.put_nowait(told)
        except asyncio.QueueFull:
            self.overflowed = True


class Journal:
    """Keeps the last events, commands and dead letters, and tells subscribers of each event."""

    def __init__(self) -> None:
        self.changes = Changes()
        self._events: deque[Told] = deque()
        self._bytes = 0
        self._by_cause: defaultdict[str, list[Told]] = defaultdict(list)
        self._commands: OrderedDict[str, str] = OrderedDict()
        self._letters: OrderedDict[str, Event[DeadLetter]] = OrderedDict()
        self._letter_bytes = 0
        self._letter_of_command: dict[str, str] = {}
        self._subscriptions: set[Subscription] = set()

    # Folding

    def apply(self, record: Record) -> None:
        """Take a record of the topic of commands or of events; what cannot be read is passed over."""
        try:
            envelope = cloudevents.read_envelope(record)
            told = Told(envelope, (record.key or b"").decode("utf-8", "replace"))
            told.data()
        except (MillraceError, orjson.JSONDecodeError) as error:
            log.debug("passed over %s offset %d: %s", record.topic, record.offset, error)
            return
        if record.topic == COMMANDS.name:
            self.expect(envelope.id, envelope.type)
        else:
            self._keep(told)
        self.changes.notify()

    def apply_dead_letter(self, record: Record) -> None:
        """Take a record of the dead-letter topic."""
        try:
            event = cloudevents.read(record)
        except MillraceError as error:
            log.warning("passed over %s offset %d: %s", record.topic, record.offset, error)
            return
        if not isinstance(event.data, DeadLetter):
            return
        self._drop_letter(event.id)
        self._letters[event.id] = event  # type: ignore[assignment]
        self._letter_bytes += _letter_bytes(event.data)
        if event.data.origin_topic == COMMANDS.name and event.data.event_id is not None:
            self._letter_of_command[event.data.event_id] = event.id
        while len(self._letters) > MAX_DEAD_LETTERS or (self._letter_bytes > MAX_BYTES and len(self._letters) > 1):
            self._drop_letter(next(iter(self._letters)))
        self.changes.notify()

    def expect(self, command_id: str, command_type: str) -> None:
        """Remember a command, so that it can be asked what became of it."""
        self._commands[command_id] = command_type
        if len(self._commands) > MAX_COMMANDS:
            self._commands.popitem(last=False)

    def _keep(self, told: Told) -> None:
        self._events.append(told)
        self._bytes += len(told.envelope.data)
        if told.envelope.causation_id is not None:
            self._by_cause[told.envelope.causation_id].append(told)
        for subscription in self._subscriptions:
            subscription.offer(told)
        while len(self._events) > MAX_EVENTS or (self._bytes > MAX_BYTES and len(self._events) > 1):
            self._forget(self._events.popleft())

    def _forget(self, told: Told) -> None:
        self._bytes -= len(told.envelope.data)
        cause = told.envelope.causation_id
        if cause is not None:
            siblings = self._by_cause[cause]
            siblings.remove(told)
            if not siblings:
                del self._by_cause[cause]

    def _drop_letter(self, letter_id: str) -> None:
        event = self._letters.pop(letter_id, None)
        if event is None:
            return
        self._letter_bytes -= _letter_bytes(event.data)
        if event.data.event_id is not None and self._letter_of_command.get(event.data.event_id) == letter_id:
            del self._letter_of_command[event.data.event_id]

    # Reading

    def events(self, wanted: EventFilter) -> list[Told]:
        """Kept events, oldest first."""
        return [told for told in self._events if wanted.matches(told)]

    def operation(self, command_id: str) -> Operation:
        """What became of a command; a decision replaces an earlier dead letter (it may have been replayed).

        Raises
        ------
        NotFoundError
            When nothing is known of such a command (any more).
        """
        command_type = self._commands.get(command_id)
        facts = self._by_cause.get(command_id, [])
        if command_type is None and not facts and command_id not in self._letter_of_command:
            raise NotFoundError(f"nothing is known of an operation {command_id!r} (any more)")
        wanted = (*_ANSWER_TYPES.get(command_type or "", ()), registry.CommandRefused.event_type)
        if command_type is None:
            return Operation(command_id, facts[0] if facts else None, self._letter(command_id))
        fact = next((told for told in facts if told.envelope.type in wanted), None)
        return Operation(command_id, fact, None if fact else self._letter(command_id))

    def _letter(self, command_id: str) -> DeadLetter | None:
        letter_id = self._letter_of_command.get(command_id)
        return self._letters[letter_id].data if letter_id is not None else None

    def dead_letters(self) -> list[Event[DeadLetter]]:
        """Kept dead letters, newest first."""
        return list(reversed(self._letters.values()))

    def dead_letter(self, letter_id: str) -> Event[DeadLetter]:
        """One dead letter by its id, or by the id of the event that could not be handled; raises ``NotFoundError``."""
        event = self._letters.get(letter_id)
        if event is None:
            event = next((event for event in self.dead_letters() if event.data.event_id == letter_id), None)
        if event is None:
            raise NotFoundError(f"there is no dead letter {letter_id!r} among the last {MAX_DEAD_LETTERS}")
        return event

    # Subscribing

    def subscribe(self, wanted: EventFilter) -> Subscription:
        """Get every event from now on; ``unsubscribe`` ends it."""
        subscription = Subscription(wanted)
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription."""
        self._subscriptions.discard(subscription)


def opened(told: Told) -> Event[Payload]:
    """The event with its data checked against its contract; raises ``InvalidMessage``."""
    return cloudevents.open_envelope(told.envelope)


def _letter_bytes(letter: DeadLetter) -> int:
    return len(letter.value_base64 or "") + sum(len(name) + len(value) for name, value in letter.headers_base64) + 500
