"""Streaming inference: records of an endpoint's requests topic in, one result per request on its results topic out.

Three stages work at once on three chunks of records: one is taken from the log, the one before it is answered, and the results of the one
before that are committed. Each stage takes one chunk at a time, so what is in memory is bounded, and results go out in the order of their
requests.

Exactly once: results, dead letters and offsets are one transaction of the log. When anything about it is doubtful, its clients are given up
and the stream begins anew where the log says it is.
"""

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from libs.errors import TransientError
from libs.messaging.errors import StoppingError
from libs.messaging.loop import GRACE_S
from libs.messaging.retry import keep_trying
from libs.metrics import Histogram, Metrics
from libs.metrics.definitions import (
    DEAD_LETTERS,
    STREAM_FAILING,
    STREAM_FAILURES,
    STREAM_IN_FLIGHT,
    STREAM_LAG,
    STREAM_RECORD_SECONDS,
    STREAM_RECORDS,
)
from libs.reports import StreamReport
from schemas.topics import Topic, inference_requests, inference_results
from services.streaming.answering import SERVICE, Answerer, AnswerParts
from services.streaming.batches import Item, Pace
from services.streaming.errors import SessionLostError, SupersededError
from services.streaming.log import Chunk, StreamLog, StreamLogs
from services.streaming.state import State
from services.streaming.tasks import pause, together

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Longest time until a stream that has nothing to do notices that it shall stop."""

PATIENCE_S = 1.0
"""A stage that is not rid of a chunk after so long pauses the partitions, so that the consumer can be polled and stays in its group."""

LAG_INTERVAL_S = 5.0

_STEADY_S = 60.0
"""A stream that has worked for so long without a failure is as good as new."""

_ANSWERED_CHUNKS = 4
"""Chunks that may wait for the transaction before theirs; they share the next. What a transaction costs hardly depends on its size."""

_LOWEST_LIMIT_BYTES = 64 * 1024

_LONGEST_CAUSE = 300

CreateTopics = Callable[[Sequence[Topic]], Awaitable[None]]


@dataclass(frozen=True)
class StreamLimits:
    """How much is taken at once, and how long a stop waits for what runners are being asked, in seconds."""

    chunk_records: int = 1_000
    chunk_bytes: int = 4 * 2**20
    grace_s: float = GRACE_S


@dataclass(frozen=True)
class StreamParts:
    """What all streams share."""

    state: State
    logs: StreamLogs
    create_topics: CreateTopics
    answering: AnswerParts
    limits: StreamLimits = field(default_factory=StreamLimits)

    @property
    def metrics(self) -> Metrics:
        """Where streams count."""
        return self.answering.metrics


class Streams:
    """One stream per endpoint, as a component: streams begin and end with their endpoints."""

    def __init__(self, parts: StreamParts) -> None:
        self._parts = parts
        self._state = parts.state
        self._pool = parts.answering.pool
        self._streams: dict[str, tuple[Stream, asyncio.Task[None]]] = {}
        self._ending: set[str] = set()
        self._stopping = asyncio.Event()
        self._is_started = False

    def is_ready(self) -> bool:
        """Whether a stream advances, or there is none: the service can do its work as long as one of them can."""
        return self._is_started and (not self._streams or any(not stream.is_failing for stream, _ in self._streams.values()))

    def failing(self) -> list[StreamReport]:
        """The streams that have failed and have not advanced since, by endpoint."""
        failures = (stream.failure for _, (stream, _) in sorted(self._streams.items()))
        return [failure for failure in failures if failure is not None]

    def is_used(self, endpoint_name: str) -> bool:
        """Whether an endpoint's topics are needed: it exists, or its stream has not ended yet."""
        return endpoint_name in self._streams or endpoint_name in self._ending or endpoint_name in self._state.routing.endpoint_names()

    async def start(self) -> None:
        self._pool.open()
        self._is_started = True

    async def run(self) -> None:
        while not self._stopping.is_set():
            self._state.changed.clear()
            await self._adjust(set(self._state.routing.endpoint_names()))
            await self._next_change()

    async def stop(self) -> None:
        self._stopping.set()
        await self._end(list(self._streams))
        await self._pool.close()

    async def _adjust(self, wanted: set[str]) -> None:
        for name in sorted(wanted - self._streams.keys()):
            stream = Stream(name, self._parts)
            self._streams[name] = (stream, asyncio.create_task(stream.run(), name=f"stream {name}"))
        await self._end(self._streams.keys() - wanted)

    async def _end(self, names: Collection[str]) -> None:
        self._ending = set(names)
        ending = [self._streams.pop(name) for name in self._ending]
        await asyncio.gather(*(stream.stop(task) for stream, task in ending))
        self._ending = set()

    async def _next_change(self) -> None:
        """Return when endpoints changed, or after a minute; raise when a stream ended by itself."""
        changed = asyncio.create_task(self._state.changed.wait())
        stopped = asyncio.create_task(self._stopping.wait())
        tasks = {task for _, task in self._streams.values()}
        try:
            done, _ = await asyncio.wait({changed, stopped, *tasks}, timeout=60.0, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            stopped.cancel()
        for task in done & tasks:
            task.result()
        self._pool.keep(self._state.replicas())


class _Read(NamedTuple):
    """A chunk, and when it was there (monotonic seconds)."""

    chunk: Chunk
    taken_s: float


class _Answered(NamedTuple):
    read: _Read
    items: list[Item]


class Stream:
    """The records of one endpoint.

    Attributes
    ----------
    failure
        What failed last, and where, while it has not advanced since: nothing was committed, and something waits.
    """

    def __init__(self, endpoint_name: str, parts: StreamParts) -> None:
        self._endpoint_name = endpoint_name
        self._topics = (inference_requests(endpoint_name), inference_results(endpoint_name))
        self._requests = self._topics[0].name
        self._parts = parts
        self._limits = parts.limits
        self._stopping = asyncio.Event()
        self._answerer = Answerer(endpoint_name, parts.answering, self._stopping)
        self._figures = _Figures(endpoint_name, parts.metrics)
        # Small requests can have large answers.
        self._pace = Pace(parts.limits.chunk_records, parts.limits.chunk_bytes)
        self.failure: StreamReport | None = None
        self._uncommitted: dict[int, range] = {}

    @property
    def is_failing(self) -> bool:
        """Whether it has failed and has not advanced since."""
        return self.failure is not None

    async def run(self) -> None:
        """Answer records until stopped; what was not committed is read again by whoever comes next.

        A failure of any kind stops this stream only: it backs off and begins anew, and the streams of other endpoints go on.

        Raises
        ------
        SupersededError
            Another process has taken this one's name in the group.
        """
        failures = 0
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                try:
                    await self._session()
                except (StoppingError, SupersededError):
                    raise
                except (Exception, asyncio.CancelledError) as error:
                    if _is_cancelled():
                        raise
                    failures = 1 if time.monotonic() - began > _STEADY_S else failures + 1
                    delay_s = self._parts.answering.retry.delay_s(failures)
                    self._failed(error, delay_s)
                    await pause(self._stopping, delay_s)
        except StoppingError:
            log.info("the stream of %s stops", self._endpoint_name)
        finally:
            self._figures.forget()

    async def stop(self, running: "asyncio.Task[None]") -> None:
        """Finish what runners are being asked, but not for ever."""
        self._stopping.set()
        done, _ = await asyncio.wait({running}, timeout=self._limits.grace_s)
        if not done:
            log.warning("the stream of %s did not finish in time; its records are read again", self._endpoint_name)
            running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    def _failed(self, error: BaseException, delay_s: float) -> None:
        """Say what failed, and where."""
        before = self.failure
        partition, offset = (None, None) if before is None else (before.partition, before.offset)
        if self._uncommitted:
            partition = min(self._uncommitted)
            offset = self._uncommitted[partition].start
        cause = str(error) if isinstance(error, TransientError) else f"{type(error).__name__}: {error}"
        count, since = (1, time.time()) if before is None else (before.failures + 1, before.since)
        self.failure = StreamReport(self._endpoint_name, partition, offset, cause[:_LONGEST_CAUSE], count, since)
        self._figures.failed()
        places = ", ".join(f"partition {number} offsets {part.start} to {part.stop - 1}" for number, part in self._uncommitted.items())
        where = f"{self._requests}, {places or 'with nothing in hand'}"
        if isinstance(error, TransientError):
            self._learn_from(error)
            log.warning("streaming %s begins anew in %.1f s: %s", where, delay_s, error)
        else:
            log.error("a bug: streaming %s failed and begins anew in %.1f s: %r", where, delay_s, error, exc_info=error)

    def _advances(self) -> None:
        self.failure = None
        self._figures.failing.value = 0

    async def _session(self) -> None:
        """Answer records with one set of clients."""
        self._uncommitted = {}
        retry = self._parts.answering.retry
        await keep_trying(lambda: self._parts.create_topics(self._topics), retry, self._stopping)
        stream_log = self._parts.logs(self._endpoint_name)
        taken: asyncio.Queue[_Read | None] = asyncio.Queue(maxsize=1)
        answered: asyncio.Queue[_Answered | None] = asyncio.Queue(maxsize=_ANSWERED_CHUNKS)
        try:
            await stream_log.open()
            log.info("streaming %s", self._requests)
            await together(self._take_all(stream_log, taken), self._answer_all(taken, answered), self._commit_all(stream_log, answered))
        finally:
            self._figures.in_flight.value = 0
            await stream_log.close()

    async def _take_all(self, stream_log: StreamLog, taken: "asyncio.Queue[_Read | None]") -> None:
        began, looked_s = time.monotonic(), 0.0
        while not self._stopping.is_set():
            if self._answerer.is_answerable():
                chunk = await stream_log.take(self._pace.count, self._limits.chunk_bytes, POLL_S)
                if chunk.records:
                    self._in_hand(chunk)
                    self._figures.in_flight.value += len(chunk.records)
                    await self._hand_on(stream_log, _Read(chunk, time.monotonic()), taken)
            else:
                # What cannot be answered is better left on the topic.
                await stream_log.stay(POLL_S)
            if time.monotonic() - looked_s > LAG_INTERVAL_S:
                lags, looked_s = await stream_log.lags(), time.monotonic()
                self._figures.waiting(lags)
                if (lags and not any(lags.values())) or looked_s - began > _STEADY_S:
                    self._advances()  # nothing waits, or nothing is its own to read
        await taken.put(None)

    def _in_hand(self, chunk: Chunk) -> None:
        firsts = {record.partition: record.offset for record in reversed(chunk.records)}
        for partition, end in chunk.offsets().items():
            known = self._uncommitted.get(partition)
            self._uncommitted[partition] = range(known.start if known else firsts[partition], end)

    async def _hand_on(self, stream_log: StreamLog, chunk: _Read, taken: "asyncio.Queue[_Read | None]") -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await taken.put(chunk)
        except TimeoutError:
            while taken.full():
                await stream_log.stay(POLL_S)
            taken.put_nowait(chunk)

    async def _answer_all(self, taken: "asyncio.Queue[_Read | None]", answered: "asyncio.Queue[_Answered | None]") -> None:
        while (read := await taken.get()) is not None:
            if self._stopping.is_set():
                continue
            try:
                items = await self._answerer.answer(read.chunk.records)
                self._pace.cost(len(items), self._answerer.written_bytes)
                await answered.put(_Answered(read, items))
            except StoppingError:
                log.info("records of %s that were being answered are read again", self._requests)
        await answered.put(None)

    async def _commit_all(self, stream_log: StreamLog, answered: "asyncio.Queue[_Answered | None]") -> None:
        while (first := await answered.get()) is not None:
            is_last = False
            some = [first]
            while not answered.empty():
                further = answered.get_nowait()
                if further is None:
                    is_last = True
                elif further.read.chunk.assignment == first.read.chunk.assignment:
                    some.append(further)
                else:
                    await self._commit(stream_log, some)
                    some = [further]
            await self._commit(stream_log, some)
            if is_last:
                return

    async def _commit(self, stream_log: StreamLog, some: Sequence[_Answered]) -> None:
        results = [given for entry in some for item in entry.items for given in item.written]
        offsets: dict[int, int] = {}
        for entry in some:
            offsets.update(entry.read.chunk.offsets())
        if await stream_log.commit(some[0].read.chunk.assignment, results, offsets):
            self._figures.committed(some)
            self._advances()
            for partition, end in offsets.items():
                rest = range(end, self._uncommitted.pop(partition, range(end)).stop)
                if rest:
                    self._uncommitted[partition] = rest
        else:
            log.info("records of %s are left to whoever reads their partitions now", self._requests)
        self._figures.in_flight.value -= sum(len(entry.items) for entry in some)

    def _learn_from(self, error: TransientError) -> None:
        """Send smaller records to a broker that has found one too large; larger results go to the artifact store."""
        if isinstance(error, SessionLostError) and error.is_too_large:
            self._answerer.max_value_bytes = max(_LOWEST_LIMIT_BYTES, self._answerer.max_value_bytes // 2)


class _Figures:
    """What a stream counts."""

    def __init__(self, endpoint_name: str, metrics: Metrics) -> None:
        self._endpoint_name = endpoint_name
        self._metrics = metrics
        self.in_flight = metrics.gauge(STREAM_IN_FLIGHT, endpoint_name)
        self.failing = metrics.gauge(STREAM_FAILING, endpoint_name)
        self._seconds = metrics.histogram(STREAM_RECORD_SECONDS, endpoint_name)
        self._partitions: set[int] = set()

    def committed(self, some: Sequence[_Answered]) -> None:
        """Count records whose results are in the log."""
        now = time.monotonic()
        for entry in some:
            for outcome, count in Counter([item.outcome for item in entry.items]).items():
                self._metrics.counter(STREAM_RECORDS, self._endpoint_name, outcome).value += count
                if outcome != "completed":
                    self._metrics.counter(DEAD_LETTERS, SERVICE, inference_requests(self._endpoint_name).name).value += count
            _observe(self._seconds, now - entry.read.taken_s, len(entry.items))

    def failed(self) -> None:
        """The stream begins anew."""
        self._metrics.counter(STREAM_FAILURES, self._endpoint_name).value += 1
        self.failing.value = 1

    def waiting(self, lags: dict[int, int]) -> None:
        """Tell how many records wait on each partition that this process reads."""
        for partition in self._partitions - lags.keys():
            self._metrics.forget(STREAM_LAG, self._endpoint_name, str(partition))
        for partition, lag in lags.items():
            self._metrics.gauge(STREAM_LAG, self._endpoint_name, str(partition)).value = lag
        self._partitions = set(lags)

    def forget(self) -> None:
        """The stream is no more."""
        self.waiting({})
        self._metrics.forget(STREAM_IN_FLIGHT, self._endpoint_name)
        self._metrics.forget(STREAM_FAILING, self._endpoint_name)


def _is_cancelled() -> bool:
    """Whether this task itself was cancelled; what it waited for can be, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _observe(histogram: Histogram, seconds: float, count: int) -> None:
    histogram.counts[bisect_left(histogram.bounds, seconds)] += count
    histogram.total += seconds * count
