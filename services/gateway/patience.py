"""Handling records that may have to wait for hours: one that cannot be handled now gives its place to others and is tried again later.

References
----------
A. K. Choudhury and E. L. Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998: the rule of ``Turns``
"""

import asyncio
import heapq
import itertools
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from libs.errors import TransientError
from libs.messaging import consumer
from libs.messaging.broker import Broker
from libs.messaging.loop import GRACE_S, Loop
from libs.messaging.processing import Processor
from libs.messaging.records import Record, TopicPartition
from libs.messaging.retry import Retry, keep_trying

log = logging.getLogger(__name__)

_BATCH_RECORDS = 100


def _always() -> bool:
    return True


class LaterError(Exception):
    """Raised by a handler whose record cannot be handled now; it will be given the record again. Not an error of the platform.

    Parameters
    ----------
    is_due
        Asked after each pause; while it says no, there is another one: what would be in vain takes nobody's place.
    """

    def __init__(self, reason: str, is_due: Callable[[], bool] = _always) -> None:
        super().__init__(reason)
        self.is_due = is_due


@dataclass(slots=True, eq=False)
class Job:
    """A record that is not done; ``tries`` is how often it was put off."""

    record: Record
    lane: str
    tries: int = 0
    is_due: Callable[[], bool] = _always


class Turns:
    """Whose turn it is to take one of a few places.

    Lanes take turns, and none holds more places than are free. So one whose jobs do not end has half of them, a second one half of the
    rest, and there is room for others for longer than with any fixed share, which would also be idle when there are few lanes.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[Job]] = {}

    def put(self, job: Job) -> None:
        """Have a job wait for its turn."""
        self._waiting.setdefault(job.lane, deque()).append(job)

    def take(self) -> Job | None:
        """The next job, which now holds a place; None when none may begin."""
        for lane, jobs in self._waiting.items():
            if self._held[lane] < self._free:
                del self._waiting[lane]
                job = jobs.popleft()
                if jobs:
                    self._waiting[lane] = jobs  # as the last one now
                self._held[lane] += 1
                self._free -= 1
                return job
        return None

    def give_back(self, job: Job) -> None:
        """Free the place that a job holds."""
        self._free += 1
        self._held[job.lane] -= 1
        if not self._held[job.lane]:
            del self._held[job.lane]


class PatientRunner:
    """Like ``ConsumerRunner``, for records that may have to wait.

    Those that are not done are in memory, and the offset committed stands before the first of them: whoever reads the partition next finds
    them all. So none is lost, and some are handled twice when a process dies or a partition moves. There is no order among
    records, and no bound on how many wait: it must be where they are written.

    Parameters
    ----------
    lane
        In whose turn a record is handled; None: nothing is to be done about it, such as when it is done already.
    places
        Most records handled at once; one lane's are at most half of them.
    pauses
        How long a record waits that was put off.
    grace_s
        Time the handlers get to finish when the process stops, in seconds.
    """

    def __init__(
        self,
        broker: Broker,
        topic: str,
        group: str,
        processor: Processor,
        lane: Callable[[Record], str | None],
        *,
        places: int,
        pauses: Retry,
        grace_s: float = GRACE_S,
    ) -> None:
        self._consumer = broker.consumer([topic], group)
        self._producer = broker.producer()
        self._processor = processor
        self._lane = lane
        self._pauses = pauses
        self._loop = Loop(group, self._step, processor.stopping, grace_s, self._finish)
        self._turns = Turns(places)
        self._parked: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()
        self._handling: dict[asyncio.Task[None], Job] = {}
        self._reading: asyncio.Task[Sequence[Record]] | None = None
        self._not_done: defaultdict[TopicPartition, set[int]] = defaultdict(set)
        self._read_to: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._committed_at = time.monotonic()

    async def start(self) -> None:
        await self._producer.start()
        await self._consumer.start()

    async def run(self) -> None:
        await self._loop.run()

    async def stop(self) -> None:
        await self._loop.stop()
        await self._consumer.stop()
        await self._producer.stop()

    async def _step(self) -> None:
        """Begin what may begin, and wait until something is done or read; once the process stops, until all that was begun is."""
        self._begin()
        begun = self._begun
        await asyncio.wait(begun, timeout=consumer.COMMIT_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
        stopping = self._processor.stopping.is_set()
        if stopping:
            await asyncio.wait(begun)
        self._take_done()
        if stopping or time.monotonic() - self._committed_at > consumer.COMMIT_INTERVAL_S:
            await self._commit()

    def _begin(self) -> None:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        now = time.monotonic()
        while self._parked and self._parked[0][0] <= now:
            _, _, job = heapq.heappop(self._parked)
            if job.is_due():
                self._turns.put(job)
            else:
                self._park(job)
        while (next_job := self._turns.take()) is not None:
            self._handling[asyncio.create_task(self._handle(next_job.record))] = next_job

    def _take_done(self) -> None:
        """Take in what was handled and read; raises what one of them raised."""
        for task in [task for task in self._handling if task.done()]:
            job = self._handling.pop(task)
            self._turns.give_back(job)
            try:
                task.result()
            except LaterError as later:
                job.is_due = later.is_due
                self._park(job)
            else:
                self._not_done[job.record.place].discard(job.record.offset)
        if self._reading is not None and self._reading.done():
            reading, self._reading = self._reading, None
            for record in reading.result():
                self._take_in(record)

    def _take_in(self, record: Record) -> None:
        place, offset = record.place, record.offset
        self._read_to[place] = max(self._read_to.get(place, 0), offset + 1)
        if offset in self._not_done[place]:
            return  # after the partition was given away and came back
        lane = self._lane(record)
        if lane is not None:
            self._not_done[place].add(offset)
            self._turns.put(Job(record, lane))

    def _park(self, job: Job) -> None:
        job.tries += 1
        heapq.heappush(self._parked, (time.monotonic() + self._pauses.delay_s(job.tries), next(self._numbers), job))

    async def _read(self) -> Sequence[Record]:
        retry, stopping = self._processor.retry.for_broker, self._processor.stopping
        return await keep_trying(lambda: self._consumer.get_many(_BATCH_RECORDS, consumer.POLL_S), retry, stopping)

    async def _handle(self, record: Record) -> None:
        follow = await self._processor.process(record)
        if follow:
            await keep_trying(lambda: self._producer.send(follow), self._processor.retry.for_broker, self._processor.stopping)

    @property
    def _begun(self) -> set[asyncio.Task[Any]]:
        return {*self._handling} if self._reading is None else {*self._handling, self._reading}

    async def _finish(self) -> None:
        """Give back what is still being handled."""
        begun = self._begun
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)

    async def _commit(self) -> None:
        """Commit up to the first record of each partition that is not done.

        Each is tried once: that of a partition which is another's by now would fail for ever, and what was done after an offset that is
        committed is found to be done when it is read again.
        """
        self._committed_at = time.monotonic()
        for place, read_to in self._read_to.items():
            offset = min(self._not_done[place], default=read_to)
            if self._committed.get(place) == offset:
                continue
            self._committed[place] = offset
            try:
                await self._consumer.commit({place: offset})
            except TransientError as error:
                log.warning("offset %d of %s-%d is not committed yet: %s", offset, place.topic, place.partition, error)
