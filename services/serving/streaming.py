"""Streaming inference: records of an endpoint's requests topic in, one result per request on its results topic out.

At least once: results are acknowledged before the offsets of their requests are committed, and a result's id derives from its request's,
so a repeat is recognised. A record that cannot be answered becomes a failed result and a dead letter; nothing stops the partition but the
absence of a runner, and then the records wait on the topic.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.semconv._incubating.attributes import messaging_attributes as semconv
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from libs import telemetry
from libs.errors import DeadlineExceededError, InvalidMessage, MillraceError, NotFoundError, NotReadyError
from libs.inference.errors import ModelError, RunnerGoneError
from libs.inference.pool import RunnerPool
from libs.inference.requests import InferResponse
from libs.inference.routing import Route
from libs.messaging import cloudevents
from libs.messaging.broker import Broker, Offsets
from libs.messaging.cloudevents import Clock
from libs.messaging.consumer import COMMIT_INTERVAL_S, POLL_S
from libs.messaging.dead_letter import dead_letter
from libs.messaging.errors import StoppingError
from libs.messaging.loop import GRACE_S, Loop
from libs.messaging.records import Record
from libs.messaging.retry import Retry, keep_trying
from schemas.topics import Topic, inference_requests, inference_results
from services.serving.messages import Request, parse, read_request
from services.serving.state import State

log = logging.getLogger(__name__)

SERVICE = "serving"
MOST_LOST_RUNNERS = 3
"""A record over which so many runners were lost is taken for the cause: the first among others, the rest while it was asked alone."""

HOLD_S = 1_800.0
"""A batch that is not finished by then is given back to the topic: Kafka takes a member that does not poll for an hour for dead."""

PING_TIMEOUT_S = 1.0

CreateTopics = Callable[[Sequence[Topic]], Awaitable[None]]


@dataclass(frozen=True)
class StreamLimits:
    """How much is taken and asked at once, and how long one record may take, in seconds."""

    batch_records: int = 256
    in_flight: int = 16
    timeout_s: float = 30.0
    hold_s: float = HOLD_S
    grace_s: float = GRACE_S


@dataclass(frozen=True)
class StreamParts:
    """What all streams share."""

    state: State
    broker: Broker
    pool: RunnerPool
    create_topics: CreateTopics
    limits: StreamLimits = field(default_factory=StreamLimits)
    retry: Retry = field(default_factory=lambda: Retry(first_s=0.1, longest_s=2.0))
    clock: Clock = cloudevents.utc_now


class Streams:
    """One stream per endpoint, as a component: streams begin and end with their endpoints."""

    def __init__(self, parts: StreamParts) -> None:
        self._parts = parts
        self._streams: dict[str, tuple[Stream, asyncio.Task[None]]] = {}
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        self._parts.pool.open()

    async def run(self) -> None:
        while not self._stopping.is_set():
            self._parts.state.endpoints_changed.clear()
            await self._adjust(set(self._parts.state.routing.endpoint_names()))
            await self._next_change()

    async def stop(self) -> None:
        self._stopping.set()
        await self._end(list(self._streams))
        await self._parts.pool.close()

    async def _adjust(self, wanted: set[str]) -> None:
        for name in sorted(wanted - self._streams.keys()):
            stream = Stream(name, self._parts)
            self._streams[name] = (stream, asyncio.create_task(stream.run(), name=f"stream {name}"))
        await self._end(self._streams.keys() - wanted)

    async def _end(self, names: Collection[str]) -> None:
        ending = [self._streams.pop(name) for name in names]
        await asyncio.gather(*(stream.stop() for stream, _ in ending))
        await asyncio.gather(*(task for _, task in ending), return_exceptions=True)

    async def _next_change(self) -> None:
        """Return when endpoints changed, or after a minute; raise when a stream ended by itself."""
        changed = asyncio.create_task(self._parts.state.endpoints_changed.wait())
        stopped = asyncio.create_task(self._stopping.wait())
        tasks = {task for _, task in self._streams.values()}
        try:
            done, _ = await asyncio.wait({changed, stopped, *tasks}, timeout=60.0, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            stopped.cancel()
        for task in done & tasks:
            task.result()
        self._parts.pool.keep(self._parts.state.replicas())


class Stream:
    """The records of one endpoint: taken in batches, answered a few at a time; results go out in the order of the requests."""

    def __init__(self, endpoint_name: str, parts: StreamParts) -> None:
        self._endpoint_name = endpoint_name
        self._topics = (inference_requests(endpoint_name), inference_results(endpoint_name))
        self._requests = self._topics[0].name
        self._parts = parts
        self._limits = parts.limits
        self._consumer = parts.broker.consumer([self._requests], f"millrace-{SERVICE}-{endpoint_name}")
        self._producer = parts.broker.producer()
        self._stopping = asyncio.Event()
        self._loop = Loop(f"stream {endpoint_name}", self._step, self._stopping, self._limits.grace_s)
        self._answered: list[tuple[Record, list[Record]]] = []
        self._sent_at = time.monotonic()

    async def run(self) -> None:
        """Answer records until stopped; the records of a batch that was not finished are read again by whoever comes next."""
        try:
            await self._keep_trying(lambda: self._parts.create_topics(self._topics))
            await self._keep_trying(self._producer.start)
            await self._keep_trying(self._consumer.start)
            log.info("streaming %s", self._requests)
            await self._loop.run()
        except StoppingError:
            log.info("the stream of %s stops before it began", self._endpoint_name)
        finally:
            await self._consumer.stop()
            await self._producer.stop()

    async def stop(self) -> None:
        """Finish the records that runners are being asked."""
        self._stopping.set()
        await self._loop.stop()

    async def _step(self) -> None:
        await self._until_answerable()
        records = await self._keep_trying(lambda: self._consumer.get_many(self._limits.batch_records, POLL_S))
        try:
            async with asyncio.timeout(self._limits.hold_s):
                await self._answer_all(records)
        except TimeoutError:
            log.warning("a batch of %s was not finished within %g s and is read again", self._requests, self._limits.hold_s)
            self._answered.clear()
            await self._consumer.stop()
            await self._keep_trying(self._consumer.start)

    async def _until_answerable(self) -> None:
        """Wait until there is a runner; what cannot be answered is better left on the topic."""
        has_said = False
        while True:
            try:
                self._parts.state.routing.check(self._endpoint_name)
                return
            except (NotReadyError, NotFoundError) as error:
                if not has_said:
                    log.info("records of %s wait: %s", self._requests, error)
                has_said = True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), POLL_S)
                raise StoppingError(f"the stream of {self._endpoint_name} waited for a runner")

    async def _answer_all(self, records: Sequence[Record]) -> None:
        try:
            for begin in range(0, len(records), self._limits.in_flight):
                if self._stopping.is_set():
                    break
                await self._answer_some(records[begin : begin + self._limits.in_flight])
                if time.monotonic() - self._sent_at > COMMIT_INTERVAL_S:
                    await self._flush()
        except StoppingError:
            await self._flush()
            raise
        await self._flush()

    async def _answer_some(self, records: Sequence[Record]) -> None:
        """Answer records at once; when one of them cannot be finished, those before it count."""
        together = _Round(len(records), self._limits.timeout_s)
        outcomes = await asyncio.gather(*(self._answer(record, together) for record in records), return_exceptions=True)
        for record, outcome in zip(records, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            self._answered.append((record, outcome))

    async def _flush(self) -> None:
        """Send the results, then commit."""
        self._sent_at = time.monotonic()
        if not self._answered:
            return
        outgoing = [result for _, results in self._answered for result in results]
        offsets: Offsets = {record.place: record.offset + 1 for record, _ in self._answered}
        await self._keep_trying(lambda: self._producer.send(outgoing))
        self._answered.clear()
        await self._keep_trying(lambda: self._consumer.commit(offsets))

    async def _answer(self, record: Record, together: "_Round") -> list[Record]:
        """What goes out for a record: its result, and the dead letter of a failed one."""
        request = read_request(record, self._endpoint_name)
        with _process_span(request) as span, telemetry.log_context(event_id=request.id, entity=self._endpoint_name):
            try:
                route, response = await self._predict(request, together)
                return [request.completed(route, response, self._parts.clock())]
            except MillraceError as error:
                log.warning("%s-%d offset %d is not answered: %s", record.topic, record.partition, record.offset, error)
                span.set_status(Status(StatusCode.ERROR, error.message))
                now = self._parts.clock()
                return [request.failed(error, now), dead_letter(record, error, SERVICE, now)]

    async def _predict(self, request: Request, together: "_Round") -> tuple[Route, InferResponse]:
        with together.first_try():
            document = request.document()
            with suppress(RunnerGoneError, NotReadyError, TimeoutError):
                route = self._route()
                body = parse(document, route.signature)
                async with together.patience():
                    return route, await self._parts.pool.infer(route, route.replicas[0], body)
        # There is no runner, or it was lost or is stuck, over this record or over another one: asked alone, it tells.
        async with together.alone():
            return await self._predict_alone(document)

    async def _predict_alone(self, document: dict[str, Any]) -> tuple[Route, InferResponse]:
        lost = 1
        while True:
            route = await self._keep_trying(self._answering_route)
            body = parse(document, route.signature)
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    return route, await self._parts.pool.infer(route, route.replicas[0], body)
            except TimeoutError as error:
                raise DeadlineExceededError(f"the model did not answer within {self._limits.timeout_s:g} s") from error
            except NotReadyError as error:
                log.warning("asked again: %s", error)
            except RunnerGoneError as error:
                lost += 1
                if lost >= MOST_LOST_RUNNERS:
                    raise InvalidMessage(f"{lost} runners were lost while they answered this record: {error}") from error

    def _route(self) -> Route:
        try:
            return self._parts.state.routing.pick(self._endpoint_name, random=random.random())  # noqa: S311 - a traffic split
        except NotFoundError as error:
            # The endpoint was deleted while its records were read: the stream is about to stop, and they stay on the topic.
            raise NotReadyError(error.message) from error

    async def _answering_route(self) -> Route:
        """A route whose runner answers and is not stuck; raises ``NotReadyError`` or ``RunnerGoneError``."""
        route = self._route()
        try:
            busy_s = await self._parts.pool.ping(route.replicas[0], timeout_s=PING_TIMEOUT_S)
        except DeadlineExceededError as error:
            raise NotReadyError(error.message) from error
        if busy_s >= self._limits.timeout_s:
            raise NotReadyError(f"the runner {route.replicas[0].replica_id} has been busy with one request for {busy_s:.0f} s")
        return route

    async def _keep_trying(self, action: Callable[[], Awaitable[Any]]) -> Any:
        return await keep_trying(action, self._parts.retry, self._stopping)


class _Round:
    """Records that are asked at once first, and one at a time if that fails: among others, the one to blame cannot be known.

    Parameters
    ----------
    timeout_s
        All are given up when none has been answered for so long. Runners answer one request after the other, so a fixed time for
        each would blame those that stand at the end of the queue.
    """

    def __init__(self, size: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._first_tries = size
        self._all_tried = asyncio.Event()
        self._timers: set[asyncio.Timeout] = set()
        self._turn = asyncio.Lock()

    @contextmanager
    def first_try(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._first_tries -= 1
            if self._first_tries == 0:
                self._all_tried.set()

    @asynccontextmanager
    async def patience(self) -> AsyncIterator[None]:
        """Raises ``TimeoutError`` when no record of the round was answered in time."""
        async with asyncio.timeout(self._timeout_s) as timer:
            self._timers.add(timer)
            try:
                yield
                self._extend()
            except ModelError:
                self._extend()
                raise
            finally:
                self._timers.discard(timer)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        await self._all_tried.wait()
        async with self._turn:
            yield

    def _extend(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        for timer in self._timers:
            if not timer.expired():
                timer.reschedule(deadline)


def _process_span(request: Request) -> AbstractContextManager[Span]:
    record = request.record
    attributes: dict[str, str | int] = {
        semconv.MESSAGING_SYSTEM: "kafka",
        semconv.MESSAGING_DESTINATION_NAME: record.topic,
        semconv.MESSAGING_DESTINATION_PARTITION_ID: str(record.partition),
        semconv.MESSAGING_OPERATION_TYPE: "process",
        semconv.MESSAGING_OPERATION_NAME: "process",
        semconv.MESSAGING_MESSAGE_ID: request.id,
        semconv.MESSAGING_KAFKA_OFFSET: record.offset,
        "millrace.endpoint": request.endpoint_name,
    }
    context = telemetry.extract(request.traceparent)
    return telemetry.tracer().start_as_current_span(f"process {record.topic}", context, SpanKind.CONSUMER, attributes)
