"""The rules of handling one record, whatever brought it: parse, recognise repeats, retry, dead-letter, trace, derive what follows."""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from opentelemetry.semconv._incubating.attributes import messaging_attributes as semconv
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from libs import telemetry
from libs.errors import InvalidMessage, MillraceError
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Clock, Event, UnknownEventType
from libs.messaging.dead_letter import dead_letter
from libs.messaging.publishing import publish_span
from libs.messaging.records import Record, refuse_oversized
from libs.messaging.retry import Retry, keep_trying
from libs.metrics import PROCESS, Metrics
from libs.metrics.definitions import DEAD_LETTERS, EVENT_SECONDS, EVENTS_HANDLED
from schemas.base import Payload
from schemas.topics import TOPICS

log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Event[Any]], Awaitable[Sequence[Payload | Record]]]
"""Takes an event, returns what follows from it: payloads (published as events caused by it) or ready records (e.g. tombstones)."""

_FIXED_TOPICS = frozenset(topic.name for topic in TOPICS)


class Seen:
    """The last ``capacity`` event identities, to recognise repeats cheaply; beyond it, derived ids make repeats harmless downstream."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._keys: OrderedDict[tuple[str, str], None] = OrderedDict()

    def __contains__(self, event: Event[Any]) -> bool:
        return (event.source, event.id) in self._keys

    def add(self, event: Event[Any]) -> None:
        self._keys[(event.source, event.id)] = None
        if len(self._keys) > self._capacity:
            self._keys.popitem(last=False)


class Processor:
    """Handles records for one service.

    Parameters
    ----------
    service
        Name of the service; its events have the source ``/millrace/<service>``.
    handlers
        By payload class. A type without a handler is skipped.
    dead_letter_unknown
        Topics on which a type without a handler, and a record without a value, is dead-lettered (a command somebody waits for) instead of
        skipped (a fact that is somebody else's business, a tombstone).

    Attributes
    ----------
    stopping
        Set it when the process stops: a handler that waits for its next attempt gives up, and its record stays uncommitted.
    """

    def __init__(
        self,
        service: str,
        handlers: Mapping[type[Payload], Handler],
        *,
        dead_letter_unknown: Collection[str] = (),
        retry: Retry | None = None,
        clock: Clock = cloudevents.utc_now,
        metrics: Metrics = PROCESS,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._handlers = {payload.event_type: handler for payload, handler in handlers.items()}
        self._dead_letter_unknown = frozenset(dead_letter_unknown)
        self._clock = clock
        self._seen = Seen()
        self.retry = retry or Retry()
        self.stopping = asyncio.Event()

    @property
    def source(self) -> str:
        """CloudEvents source of what this service says."""
        return f"/millrace/{self._service}"

    async def process(self, record: Record) -> list[Record]:
        """Everything that must be published because of a record, before its offset is committed.

        Never raises for a bad message or a transient error.

        Raises
        ------
        StoppingError
            When the process stops before the handler got through; the offset must stay uncommitted.
        Exception
            Anything else that a handler raises is a bug and goes up: the offset stays uncommitted and the process ends with a traceback.
        """
        try:
            event = self._read(record)
        except InvalidMessage as error:
            return [self._dead(record, error)]
        if event is None or event in self._seen:
            return []
        with (
            telemetry.log_context(event_id=event.id, event_type=event.type, entity=event.data.entity),
            _process_span(record, event) as span,
        ):
            return await self._handle(record, event, span)

    def _read(self, record: Record) -> Event[Payload] | None:
        """The event, or None when it is none of this service's business."""
        if record.value is None:
            if record.topic in self._dead_letter_unknown:
                raise InvalidMessage(f"a record without a value means nothing on {record.topic}")
            return None
        envelope = cloudevents.read_envelope(record)
        if envelope.type not in self._handlers and record.topic not in self._dead_letter_unknown:
            log.debug("skipped %s", envelope.type)
            return None
        event = cloudevents.open_envelope(envelope)
        if event.data.topic != record.topic and record.topic in _FIXED_TOPICS:
            raise InvalidMessage(f"{event.type} belongs on {event.data.topic}, not on {record.topic}")
        if event.type not in self._handlers:
            raise UnknownEventType(f"nobody handles {event.type} on {record.topic}")
        return event

    async def _handle(self, record: Record, event: Event[Payload], span: Span) -> list[Record]:
        started = time.perf_counter()
        handler = self._handlers[event.type]
        try:
            results = await keep_trying(lambda: handler(event), self.retry, self.stopping)
            records = self._published(results, event)
        except MillraceError as error:
            span.set_status(Status(StatusCode.ERROR, error.message))
            records, outcome = [self._dead(record, error)], "dead-lettered"
        else:
            # A dead letter is not remembered: it may be replayed, with the same id.
            self._seen.add(event)
            outcome = "ok"
        duration_s = time.perf_counter() - started
        self._metrics.counter(EVENTS_HANDLED, self._service, event.type, outcome.replace("-", "_")).value += 1
        self._metrics.histogram(EVENT_SECONDS, self._service, event.type).observe(duration_s)
        fields = {"outcome": outcome, "duration_s": round(duration_s, 4)}
        log.info("handled %s", event.type, extra={"fields": fields})
        return records

    def _published(self, results: Sequence[Payload | Record], cause: Event[Payload]) -> list[Record]:
        ordinals: Counter[tuple[str, str]] = Counter()
        records = [result if isinstance(result, Record) else self._caused(result, cause, ordinals) for result in results]
        refuse_oversized(records)
        return records

    def _caused(self, data: Payload, cause: Event[Payload], ordinals: Counter[tuple[str, str]]) -> Record:
        key = (data.event_type, data.entity)
        with publish_span(data):
            event = cloudevents.caused_event(data, cause, self.source, now=self._clock(), ordinal=ordinals[key])
        ordinals[key] += 1
        return cloudevents.write(event)

    def _dead(self, record: Record, error: MillraceError) -> Record:
        self._metrics.counter(DEAD_LETTERS, self._service, record.topic).value += 1
        log.warning("dead-lettered %s-%d offset %d: %s", record.topic, record.partition, record.offset, error)
        return dead_letter(record, error, self._service, self._clock())


@contextmanager
def _process_span(record: Record, event: Event[Payload]) -> Iterator[Span]:
    attributes: dict[str, str | int] = {
        semconv.MESSAGING_SYSTEM: "kafka",
        semconv.MESSAGING_DESTINATION_NAME: record.topic,
        semconv.MESSAGING_DESTINATION_PARTITION_ID: str(record.partition),
        semconv.MESSAGING_OPERATION_TYPE: "process",
        semconv.MESSAGING_OPERATION_NAME: "process",
        semconv.MESSAGING_MESSAGE_ID: event.id,
        semconv.MESSAGING_KAFKA_OFFSET: record.offset,
        "millrace.event.type": event.type,
        "millrace.entity": event.data.entity,
    }
    context = telemetry.extract(event.traceparent)
    with telemetry.tracer().start_as_current_span(f"process {record.topic}", context, SpanKind.CONSUMER, attributes) as span:
        yield span
