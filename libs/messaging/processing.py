"""The rules of handling one record, whatever brought it: parse, recognise repeats, retry, dead-letter, trace, derive what follows."""

import asyncio
import logging
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from opentelemetry.semconv._incubating.attributes import messaging_attributes as semconv
from opentelemetry.trace import SpanKind, Status, StatusCode

from libs import telemetry
from libs.errors import InvalidMessage, MillraceError
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Clock, Event, UnknownEventType
from libs.messaging.dead_letter import dead_letter
from libs.messaging.records import Record
from schemas.base import Payload

log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Event[Any]], Awaitable[Sequence[Payload | Record]]]
"""Takes an event, returns what follows from it: payloads (published as events caused by it) or ready records (e.g. tombstones)."""


@dataclass(frozen=True)
class Retry:
    """Back-off for transient errors: delays grow from ``first_s`` by ``factor`` to ``longest_s``, with up to half of it random.

    Retries go on until the cause is gone: a transient error is never a reason to lose a record.
    """

    first_s: float = 0.2
    factor: float = 2.0
    longest_s: float = 15.0

    def delay_s(self, attempt: int) -> float:
        """Wait before attempt ``attempt`` + 1, in seconds; attempts count from 1."""
        whole = min(self.longest_s, self.first_s * self.factor ** min(attempt - 1, 30))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


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
        Topics where a type that no contract has is dead-lettered (a command somebody waits for) instead of skipped (somebody else's fact).
    """

    def __init__(
        self,
        service: str,
        handlers: Mapping[type[Payload], Handler],
        *,
        dead_letter_unknown: Collection[str] = (),
        retry: Retry | None = None,
        clock: Clock = cloudevents.utc_now,
    ) -> None:
        self._service = service
        self._handlers = dict(handlers)
        self._dead_letter_unknown = dead_letter_unknown
        self._retry = retry or Retry()
        self._clock = clock
        self._seen = Seen()

    @property
    def source(self) -> str:
        """CloudEvents source of what this service says."""
        return f"/millrace/{self._service}"

    async def process(self, record: Record) -> list[Record]:
        """Everything that must be published because of a record, before its offset is committed.

        Never raises for a bad message or a transient error. Anything else that a handler raises is a bug and goes up: the offset
        stays uncommitted and the process ends with a traceback.
        """
        if record.value is None:
            return []
        try:
            event = cloudevents.read(record)
            if event.data.topic != record.topic:
                raise InvalidMessage(f"{event.type} belongs on {event.data.topic}, not on {record.topic}")
        except UnknownEventType as error:
            if record.topic not in self._dead_letter_unknown:
                return []
            return self._dead(record, error)
        except MillraceError as error:
            return self._dead(record, error)
        handler = self._handlers.get(type(event.data))
        if handler is None or event in self._seen:
            return []
        with (
            telemetry.log_context(event_id=event.id, event_type=event.type, entity=event.data.entity),
            telemetry.tracer().start_as_current_span(
                f"process {record.topic}",
                telemetry.extract(event.traceparent),
                SpanKind.CONSUMER,
                {
                    semconv.MESSAGING_SYSTEM: "kafka",
                    semconv.MESSAGING_DESTINATION_NAME: record.topic,
                    semconv.MESSAGING_DESTINATION_PARTITION_ID: str(record.partition),
                    semconv.MESSAGING_OPERATION_TYPE: "process",
                    semconv.MESSAGING_OPERATION_NAME: "process",
                    semconv.MESSAGING_MESSAGE_ID: event.id,
                    semconv.MESSAGING_KAFKA_OFFSET: record.offset,
                    "millrace.event.type": event.type,
                    "millrace.entity": event.data.entity,
                },
            ) as span,
        ):
            started = time.perf_counter()
            outcome = "ok"
            try:
                results = await self._attempt(handler, event)
                records = self._follow(results, event)
            except MillraceError as error:
                span.set_status(Status(StatusCode.ERROR, error.message))
                outcome = f"dead-lettered: {error.message}"
                records = self._dead(record, error)
            self._seen.add(event)
            log.info(
                "handled %s", event.type, extra={"fields": {"outcome": outcome, "duration_s": round(time.perf_counter() - started, 4)}}
            )
            return records

    async def _attempt(self, handler: Handler, event: Event[Any]) -> Sequence[Payload | Record]:
        attempt = 1
        while True:
            try:
                return await handler(event)
            except MillraceError as error:
                if not error.retryable:
                    raise
                delay_s = self._retry.delay_s(attempt)
                log.warning("attempt %d failed, next in %.1f s: %s", attempt, delay_s, error)
                await asyncio.sleep(delay_s)
                attempt += 1

    def _follow(self, results: Sequence[Payload | Record], cause: Event[Any]) -> list[Record]:
        ordinals: Counter[tuple[str, str]] = Counter()
        records = []
        for result in results:
            if isinstance(result, Record):
                records.append(result)
                continue
            identity = (result.event_type, result.entity)
            records.append(self._published(result, cause, ordinals[identity]))
            ordinals[identity] += 1
        return records

    def _published(self, result: Payload, cause: Event[Any], ordinal: int) -> Record:
        with telemetry.tracer().start_as_current_span(
            f"publish {result.topic}",
            kind=SpanKind.PRODUCER,
            attributes={
                semconv.MESSAGING_SYSTEM: "kafka",
                semconv.MESSAGING_DESTINATION_NAME: result.topic,
                semconv.MESSAGING_OPERATION_TYPE: "publish",
                semconv.MESSAGING_OPERATION_NAME: "publish",
                "millrace.event.type": result.event_type,
            },
        ):
            return cloudevents.write(cloudevents.caused_event(result, cause, self.source, now=self._clock(), ordinal=ordinal))

    def _dead(self, record: Record, error: MillraceError) -> list[Record]:
        log.warning("dead-lettered %s-%d offset %d: %s", record.topic, record.partition, record.offset, error)
        return [dead_letter(record, error, self._service, self._clock())]
