"""Answers the records of one endpoint: joined into batches, asked of runners, taken apart again.

A record that cannot be answered becomes a failed result and a dead letter. Nothing stops the others but the absence of a runner, and then
they wait.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from opentelemetry.trace import Status, StatusCode

from libs.errors import DeadlineExceededError, InvalidMessage, MillraceError, NotFoundError, NotReadyError
from libs.inference.batches import UnevenBatchError, concatenated, is_batchable, piece, row_count, split
from libs.inference.errors import InvalidInputError, ModelError, RunnerGoneError
from libs.inference.pool import RunnerPool
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import Route
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Clock
from libs.messaging.dead_letter import dead_letter
from libs.messaging.retry import Retry, keep_trying
from libs.metrics import Metrics
from libs.metrics.definitions import STREAM_BATCH_RECORDS
from libs.runner.wire import Arrays
from schemas.registry import Replica
from schemas.topics import inference_requests
from services.streaming import spans
from services.streaming.batches import TARGET_S, Batch, Grouping, Item, Pace, guarded
from services.streaming.claims import Claims
from services.streaming.errors import NotAskedError
from services.streaming.log import Given, Taken
from services.streaming.requests import Request
from services.streaming.results import MAX_VALUE_BYTES, ResultWriter
from services.streaming.state import State
from services.streaming.tasks import pause, together

log = logging.getLogger(__name__)

T = TypeVar("T")

SERVICE = "streaming"

MOST_LOST_RUNNERS = 3
"""A record over which so many runners were lost is taken for the cause: the first among others, the rest while it was asked alone."""

PING_TIMEOUT_S = 1.0
_REFUSED_PAUSE_S = 0.5
_SILENT_PAUSE_S = 5.0
_PAUSE_S = 0.2
_FEW_ROWS = 32
"""Fewer rows are not spread over replicas."""

_PIECE_ROWS = 256
"""Pieces of a large record are no smaller, however slow the model: each costs a call."""

_MOST_LOGGED = 5


@dataclass(frozen=True)
class AnswerLimits:
    """How much is asked at once, and how long one request may take, in seconds."""

    batch_rows: int = 4096
    in_flight: int = 8
    timeout_s: float = 30.0
    claimed_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class AnswerParts:
    """What the answerers of all endpoints share.

    ``is_traced``: records' spans go somewhere, so they are made.
    """

    state: State
    pool: RunnerPool
    claims: Claims
    limits: AnswerLimits = field(default_factory=AnswerLimits)
    retry: Retry = field(default_factory=lambda: Retry(first_s=0.1, longest_s=2.0))
    clock: Clock = cloudevents.utc_now
    metrics: Metrics = field(default_factory=Metrics)
    is_traced: bool = False


class Answerer:
    """Answers chunks of records, one chunk after the other.

    Attributes
    ----------
    max_value_bytes
        Results with a larger body go to the artifact store, and dead letters are no larger.
    written_bytes
        Bodies of the results of the last chunk.
    """

    def __init__(self, endpoint_name: str, parts: AnswerParts, stopping: asyncio.Event) -> None:
        self.max_value_bytes = MAX_VALUE_BYTES
        self.written_bytes = 0
        self._endpoint_name = endpoint_name
        self._topic = inference_requests(endpoint_name).name
        self._state = parts.state
        self._parts = parts
        self._limits = parts.limits
        self._stopping = stopping
        self._runners = _Runners(parts.pool, parts.limits.timeout_s)
        self._paces: dict[str, Pace] = {}
        self._uneven: set[str] = set()
        self._batch_records = parts.metrics.histogram(STREAM_BATCH_RECORDS, endpoint_name)

    def is_answerable(self) -> bool:
        """Whether anybody is there to be asked."""
        try:
            self._state.routing.check(self._endpoint_name)
        except (NotReadyError, NotFoundError):
            return False
        return True

    async def answer(self, records: Sequence[Taken]) -> list[Item]:
        """What goes out for each record, in their order.

        Raises
        ------
        StoppingError
            When the process stops before all are answered.
        """
        self.written_bytes = 0
        items = [Item(Request(taken, self._topic, self._endpoint_name)) for taken in records]
        if self._parts.is_traced:
            for item in items:
                spans.begin(item, self._topic)
        turn = _Turn(ResultWriter(self._endpoint_name, self._parts.clock()))
        async for some in self._with_bodies(items, turn):
            await self._answer_some(some, turn)
        for item in items:
            if item.span is not None:
                item.span.end()
        if turn.failures > _MOST_LOGGED:
            log.warning("%d more records of %s are not answered", turn.failures - _MOST_LOGGED, self._topic)
        return items

    async def _with_bodies(self, items: Sequence[Item], turn: "_Turn") -> AsyncIterator[list[Item]]:
        """Items whose bodies are at hand, in portions that fit into memory."""
        portion: list[Item] = []
        held_bytes = 0
        for item in items:
            try:
                if item.request.is_claimed:
                    size = await self._keep_trying(partial(self._parts.claims.size, item.request))
                    if portion and held_bytes + size > self._limits.claimed_bytes:
                        yield portion
                        portion, held_bytes = [], 0
                    held_bytes += size
                    await self._keep_trying(partial(self._parts.claims.fetch, item.request))
                guarded("read", item.read)
            except MillraceError as error:
                self._fail(item, error, turn)
            else:
                portion.append(item)
        yield portion

    async def _answer_some(self, items: list[Item], turn: "_Turn") -> None:
        waiting = items
        while waiting:
            await self._until_answerable()
            turn.unasked = []
            await self._ask_all(self._grouped(waiting, turn), turn)
            waiting = turn.unasked
            if waiting:
                await pause(self._stopping, _PAUSE_S)
        for item in turn.suspects:
            try:
                await self._answer_alone(item, turn)
            except MillraceError as error:
                self._fail(item, error, turn)
        turn.suspects = []
        for item in turn.oversized:
            await self._store(item, turn)
        turn.oversized = []

    def _grouped(self, items: Sequence[Item], turn: "_Turn") -> list[Batch]:
        grouping, routes, rows = Grouping(), dict[str, Route](), 0
        for item in items:
            route = self._state.route(self._endpoint_name, item.request.chance)
            routes[route.deployment_id] = route
            grouping.add(item, route, is_alone=route.deployment_id in self._uneven)
            rows += item.rows
        replicas = max(len(route.replicas) for route in routes.values())
        pace = min(self._pace(route).count for route in routes.values())
        batches = grouping.batches(min(pace, max(_FEW_ROWS, math.ceil(rows / replicas))))
        for item, error in grouping.failed:
            self._fail(item, error, turn)
        return batches

    def _pace(self, route: Route) -> Pace:
        if len(self._paces) > 64:
            self._paces.clear()
        return self._paces.setdefault(route.deployment_id, Pace(self._limits.batch_rows, TARGET_S))

    async def _ask_all(self, batches: Sequence[Batch], turn: "_Turn") -> None:
        waiting = iter(batches)

        async def work() -> None:
            for batch in waiting:
                await self._ask(batch, turn)

        replicas = max((len(batch.route.replicas) for batch in batches), default=1)
        workers = min(len(batches), self._limits.in_flight, 2 * replicas)
        if workers > 1:
            await together(*(work() for _ in range(workers)))
        else:
            await work()

    async def _ask(self, batch: Batch, turn: "_Turn") -> None:
        try:
            replica = await self._runners.choose(batch.route)
        except NotAskedError:
            turn.unasked += batch.items
            return
        try:
            response = await self._infer(batch, replica)
        except (InvalidInputError, ModelError) as error:
            await self._blame(batch, error, turn)
        except DeadlineExceededError:
            turn.unasked += batch.items
        except (RunnerGoneError, NotReadyError, TimeoutError) as error:
            log.warning("%d records of %s are asked one at a time: %s", len(batch.items), self._topic, error or "no answer in time")
            for item in batch.items:
                item.lost += isinstance(error, RunnerGoneError)
            turn.suspects += batch.items
        else:
            await self._complete(batch, response, turn)

    async def _blame(self, batch: Batch, error: MillraceError, turn: "_Turn") -> None:
        """Find by halving which records of a batch are to blame; one that is alone has failed."""
        if len(batch.items) == 1:
            self._fail(batch.items[0], error, turn)
            return
        for half in batch.parts(math.ceil(len(batch.items) / 2)):
            await self._ask(half, turn)

    async def _infer(self, batch: Batch, replica: Replica) -> InferResponse:
        """Ask a batch; a record of many rows piece by piece, so that no call takes long and requests of others get their turn."""
        self._batch_records.observe(len(batch.items))
        size = max(self._pace(batch.route).count, _PIECE_ROWS)
        rows = (row_count(InferRequest(batch.inputs)) or 1) if len(batch.items) == 1 else 0
        if rows <= size or batch.route.deployment_id in self._uneven or not is_batchable(batch.route.signature):
            return await self._call(batch, replica)
        try:
            return await self._infer_pieces(batch, replica, rows, size)
        except UnevenBatchError as error:
            log.warning("%s: %s; its records are asked one at a time from now on", batch.route.deployment_id, error)
            self._uneven.add(batch.route.deployment_id)
            return await self._call(batch, replica)

    async def _infer_pieces(self, batch: Batch, replica: Replica, rows: int, size: int) -> InferResponse:
        answers: list[InferResponse] = []
        counts: list[int] = []
        for begin in range(0, rows, size):
            counts.append(min(size, rows - begin))
            part = Batch(batch.route, batch.items, counts[-1:], piece(batch.inputs, begin, counts[-1]), batch.outputs)
            answers.append(await self._call(part, replica))
        outputs = concatenated([answer.outputs for answer in answers], counts)
        return InferResponse(outputs, model_s=sum(answer.model_s for answer in answers))

    async def _call(self, batch: Batch, replica: Replica) -> InferResponse:
        traceparent = spans.sampled(batch.items) if self._parts.is_traced else None
        began = asyncio.get_running_loop().time()
        response = await self._runners.infer(batch, replica, traceparent)
        took_s = response.model_s or asyncio.get_running_loop().time() - began
        self._pace(batch.route).cost(batch.rows, took_s)
        if response.span is not None:
            for parent in spans.parents(batch.items):
                self._parts.pool.export_span(response.span, parent, batch.route, replica)
        return response

    async def _complete(self, batch: Batch, response: InferResponse, turn: "_Turn") -> None:
        items = batch.items
        try:
            parts = _parts(batch, response)
        except UnevenBatchError as error:
            log.warning("%s: %s; its records are asked one at a time from now on", batch.route.deployment_id, error)
            self._uneven.add(batch.route.deployment_id)
            for single in batch.parts(1):
                await self._ask(single, turn)
            return
        try:
            results = guarded("answered", _results, batch, parts, response, turn.writer)
        except MillraceError as error:
            await self._blame(batch, error, turn)
            return
        for item, result in zip(items, results, strict=True):
            item.written = [result]
            size_bytes = len(result.value or b"")
            self.written_bytes += size_bytes
            if size_bytes > self.max_value_bytes:
                turn.oversized.append(item)

    async def _answer_alone(self, item: Item, turn: "_Turn") -> None:
        while True:
            await self._until_answerable()
            route = self._state.route(self._endpoint_name, item.request.chance)
            asked = guarded("read", item.parse, route.signature)
            try:
                replica = await self._runners.choose(route)
                response = await self._infer(Batch(route, [item], [1], asked.inputs, asked.outputs), replica)
                return await self._complete(Batch(route, [item], [1], asked.inputs, asked.outputs), response, turn)
            except TimeoutError as error:
                raise DeadlineExceededError(f"the model did not answer within {self._limits.timeout_s:g} s") from error
            except (NotReadyError, DeadlineExceededError):
                await pause(self._stopping, _PAUSE_S)
            except RunnerGoneError as error:
                item.lost += 1
                if item.lost >= MOST_LOST_RUNNERS:
                    raise InvalidMessage(f"{item.lost} runners were lost while they answered this record: {error}") from error

    async def _store(self, item: Item, turn: "_Turn") -> None:
        result = item.written[0]
        try:
            sha256 = await self._keep_trying(partial(self._parts.claims.store, result.value or b""))
        except MillraceError as error:
            self._fail(item, error, turn)
        else:
            item.written = [turn.writer.reference(result, sha256)]

    def _fail(self, item: Item, error: MillraceError, turn: "_Turn") -> None:
        taken = item.request.taken
        turn.failures += 1
        if turn.failures <= _MOST_LOGGED:
            log.warning("%s-%d offset %d is not answered: %s", self._topic, taken.partition, taken.offset, error)
        if item.span is not None:
            item.span.set_status(Status(StatusCode.ERROR, error.message))
        item.outcome = "expired" if isinstance(error, DeadlineExceededError) else "failed"
        letter = dead_letter(taken.record(self._topic), error, SERVICE, self._parts.clock(), max_bytes=self.max_value_bytes)
        item.written = [
            turn.writer.failed(item.request, error),
            Given(letter.topic, letter.key, letter.value, letter.headers),
        ]

    async def _until_answerable(self) -> None:
        has_said = False
        while not self.is_answerable():
            if not has_said:
                log.info("records of %s that were read wait for a runner", self._topic)
                has_said = True
            await pause(self._stopping, _PAUSE_S)

    async def _keep_trying(self, action: Callable[[], Awaitable[T]]) -> T:
        return await keep_trying(action, self._parts.retry, self._stopping)


def _parts(batch: Batch, response: InferResponse) -> Sequence[Arrays]:
    """The outputs of each request; of those whose answers are cut out as they are written, only made sure that they can be."""
    if len(batch.items) == 1:
        return [response.outputs]
    return split(response.outputs, [batch.rows] if batch.is_plain or batch.items[0].is_rows else batch.counts)


def _results(batch: Batch, parts: Sequence[Arrays], response: InferResponse, writer: ResultWriter) -> list[Given]:
    requests = [item.request for item in batch.items]
    if batch.items[0].is_rows:
        asked = batch.items[0].asked
        return writer.rows(requests, batch.counts, batch.route, response, asked.groups if asked is not None else ())
    if len(requests) > 1 and batch.is_plain:
        return writer.outputs(requests, batch.counts, batch.route, response)
    return [
        writer.tensors(item.request, item.asked or InferRequest({}), batch.route, InferResponse(part))
        for item, part in zip(batch.items, parts, strict=True)
    ]


class _Turn:
    """What becomes of the records that are answered together."""

    def __init__(self, writer: ResultWriter) -> None:
        self.writer = writer
        self.unasked: list[Item] = []
        self.suspects: list[Item] = []
        self.oversized: list[Item] = []
        self.failures = 0


class _Runners:
    """Chooses replicas: those that answer, the least busy one first."""

    def __init__(self, pool: RunnerPool, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._in_flight: dict[Replica, int] = {}
        self._known: set[Replica] = set()
        self._avoided_until: dict[Replica, float] = {}
        self._turn = 0

    async def choose(self, route: Route) -> Replica:
        """A replica that answers and is not stuck; raises ``NotAskedError``."""
        now = asyncio.get_running_loop().time()
        self._turn += 1
        replicas = route.replicas
        start = self._turn % len(replicas) if replicas else 0
        candidates = [replica for replica in replicas[start:] + replicas[:start] if self._avoided_until.get(replica, 0.0) <= now]
        for replica in sorted(candidates, key=lambda replica: self._in_flight.get(replica, 0)):
            if replica in self._known or await self._answers(replica):
                return replica
        raise NotAskedError(f"no runner of {route.deployment_id} answers")

    async def infer(self, batch: Batch, replica: Replica, traceparent: str | None) -> InferResponse:
        """Ask one replica.

        Raises
        ------
        TimeoutError
            It did not answer in time.
        DeadlineExceededError
            It did not begin in time.
        InvalidInputError, ModelError, RunnerGoneError, NotReadyError
            As ``RunnerPool.send``.
        """
        answer: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()

        def done(value: InferResponse | MillraceError) -> None:
            if answer.done():
                return
            if isinstance(value, MillraceError):
                answer.set_exception(value)
            else:
                answer.set_result(value)

        self._in_flight[replica] = self._in_flight.get(replica, 0) + 1
        asked = self._pool.send(batch.route, replica, batch.inputs, batch.outputs, traceparent, done, timeout_s=self._timeout_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except (RunnerGoneError, NotReadyError, TimeoutError):
            self._known.discard(replica)
            raise
        finally:
            asked.cancel()
            self._in_flight[replica] -= 1
            if not self._in_flight[replica]:
                del self._in_flight[replica]

    async def _answers(self, replica: Replica) -> bool:
        pause_s = _REFUSED_PAUSE_S
        try:
            if await self._pool.ping(replica, timeout_s=PING_TIMEOUT_S) < self._timeout_s:
                if len(self._known) > 1000:
                    self._known.clear()
                    self._avoided_until.clear()
                self._known.add(replica)
                self._avoided_until.pop(replica, None)
                return True
        except DeadlineExceededError:
            pause_s = _SILENT_PAUSE_S
        except (RunnerGoneError, NotReadyError):
            pass
        self._avoided_until[replica] = asyncio.get_running_loop().time() + pause_s
        return False
