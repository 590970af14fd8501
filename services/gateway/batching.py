"""Batches of one deployment's requests: which requests leave together, when, and for which replica. No I/O and no clock.

A batch leaves at once when a replica is idle, and when the earlier batch returns otherwise, so batching adds no waiting at low load.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from libs.inference.batches import is_batchable
from libs.inference.requests import InferRequest
from libs.inference.routing import Route
from libs.runner.wire import Arrays
from schemas.registry import Replica
from services.gateway.predictions import Ask, Caller, Done

MOST_PASSED_OVER = 64
"""Requests of other shapes that a batch being formed looks past; what stands behind them waits for the next one."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much one batch holds, how many batches a replica is given at once, and how many requests may wait for one deployment."""

    rows: int = 1024
    size_bytes: int = 8 * 2**20
    in_flight: int = 1
    queued: int = 1024


@dataclass(slots=True, eq=False)
class Pending:
    """One accepted request on its way; times are those of ``time.monotonic``, in seconds, and 0 when not reached.

    (uvloop's own clock is the same but moves in whole milliseconds.)
    """

    ask: Ask
    caller: Caller
    done: Done
    accepted_s: float
    deadline_s: float
    route: Route | None = None
    request: InferRequest | None = None
    key: Hashable = None
    rows: int = 0
    size_bytes: int = 0
    queued_s: float = 0.0
    sent_s: float = 0.0
    ended_s: float = 0.0
    model_s: float = 0.0
    answer_bytes: int = 0
    attempts: int = 0
    is_alone: bool = False
    is_over: bool = False
    lane: "Lane | None" = None
    sequence: int = 0
    timer: asyncio.TimerHandle | None = None
    patience: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that are asked together.

    Attributes
    ----------
    reason
        Why it left: a replica was ``idle``, an earlier batch ``returned``, it was ``full``, or its request has to be asked ``alone``.
    model_s
        Seconds inside the model, as the runner says.
    """

    route: Route
    replica: Replica
    members: list[Pending]
    rows: int
    reason: str
    sent_s: float
    inputs: Arrays
    outputs: Arrays | None = None
    answered_s: float = 0.0
    model_s: float = 0.0


class Lane:
    """The queue of one deployment and what its replicas are busy with.

    Attributes
    ----------
    batch_s
        Seconds that a batch takes, smoothed.
    flush_is_due
        Whether batches will be formed in this turn of the event loop anyway.
    is_away
        Whether there is no replica that answers: all were lost, or there are none.
    """

    def __init__(self, route: Route, limits: BatchLimits) -> None:
        self.route = route
        self.batch_s = 0.0
        self._per_batch = 1.0
        self.flush_is_due = False
        self._limits = limits
        self._batchable = is_batchable(route.signature)
        self._queue: OrderedDict[Pending, None] = OrderedDict()
        self._busy: dict[Replica, int] = dict.fromkeys(route.replicas, 0)
        self._lost: set[Replica] = set()
        self.is_away = not self._busy

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def lost(self) -> frozenset[Replica]:
        """Replicas that went away and have not answered since."""
        return frozenset(self._lost)

    @property
    def in_flight(self) -> int:
        """Batches that replicas are working on."""
        return sum(self._busy.values())

    @property
    def has_room(self) -> bool:
        """Whether another request may wait here."""
        return self.queued < self._limits.queued

    @property
    def is_batchable(self) -> bool:
        """Whether requests may be joined."""
        return self._batchable

    def ask_alone(self) -> None:
        """Join no requests from now on: the model was seen not to treat rows independently."""
        self._batchable = False

    def wait_s(self) -> float:
        """Seconds that a request which comes now will wait, by what batches took lately; 0 while nothing is known."""
        batches = len(self._queue) / self._per_batch if self._batchable else len(self._queue)
        return (int(batches) + (1 if self.in_flight else 0)) * self.batch_s / max(1, len(self._busy))

    def update(self, route: Route) -> None:
        """Take over which replicas there are now."""
        self.route = route
        self._busy = {replica: self._busy.get(replica, 0) for replica in route.replicas}
        self._lost.intersection_update(self._busy)
        self.is_away = len(self._lost) == len(self._busy)

    def put(self, pending: Pending) -> None:
        """Have a request wait."""
        self._queue[pending] = None

    def put_back(self, members: list[Pending]) -> None:
        """Have requests that were asked in vain wait again, before all others."""
        for pending in reversed(members):
            self._queue[pending] = None
            self._queue.move_to_end(pending, last=False)

    def remove(self, pending: Pending) -> None:
        """Free the place of a request that ended while it waited."""
        self._queue.pop(pending, None)

    def waiting(self) -> list[Pending]:
        """All requests that wait."""
        return list(self._queue)

    def clear(self) -> list[Pending]:
        """Take all requests that wait."""
        waiting = list(self._queue)
        self._queue.clear()
        return waiting

    def lose(self, replica: Replica) -> None:
        """Give a replica nothing more until it answers again."""
        if replica in self._busy:
            self._lost.add(replica)
            self.is_away = len(self._lost) == len(self._busy)

    def find(self, replica: Replica) -> None:
        """Trust a replica again."""
        self._lost.discard(replica)
        self.is_away = len(self._lost) == len(self._busy)

    def release(self, replica: Replica) -> None:
        """A replica has a batch less."""
        if self._busy.get(replica, 0) > 0:
            self._busy[replica] -= 1

    def returned(self, batch: Batch, took_s: float) -> None:
        """Count out a batch."""
        self.release(batch.replica)
        if self.batch_s == 0.0:
            self.batch_s, self._per_batch = took_s, float(len(batch.members))
        else:
            self.batch_s += 0.1 * (took_s - self.batch_s)
            self._per_batch += 0.1 * (len(batch.members) - self._per_batch)

    def idle_replica(self) -> Replica | None:
        """The replica with the least to do, if it may be given a batch."""
        best: Replica | None = None
        least = self._limits.in_flight
        for replica, busy in self._busy.items():
            if busy < least and replica not in self._lost:
                best, least = replica, busy
        if best is not None and len(self._busy) > 1:
            # The next choice among equals begins behind this one.
            self._busy[best] = self._busy.pop(best)
        return best

    def next_batch(self, replica: Replica) -> tuple[list[Pending], str] | None:
        """Take the requests that leave next, with the reason if it is one of their own; None when nobody waits."""
        queue = self._queue
        if not queue:
            return None
        first, _ = queue.popitem(last=False)
        self._busy[replica] += 1
        if first.is_alone or not self._batchable:
            return [first], "alone"
        return self._gather(first)

    def _gather(self, first: Pending) -> tuple[list[Pending], str]:
        members, rows, size_bytes, passed_over = [first], first.rows, first.size_bytes, 0
        fitting: list[Pending] = []
        reason = ""
        for pending in self._queue:
            if pending.is_alone or pending.key != first.key:
                passed_over += 1
                if passed_over > MOST_PASSED_OVER:
                    break
            elif rows + pending.rows > self._limits.rows or size_bytes + pending.size_bytes > self._limits.size_bytes:
                reason = "full"
                break
            else:
                fitting.append(pending)
                rows += pending.rows
                size_bytes += pending.size_bytes
        for pending in fitting:
            del self._queue[pending]
        members += fitting
        return members, reason


def size_of(arrays: Arrays) -> int:
    """Bytes of arrays in memory; objects count as pointers."""
    return sum(array.nbytes for array in arrays.values())
