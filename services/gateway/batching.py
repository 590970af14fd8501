"""Batches of one deployment's requests: which requests leave together, when, and for which replica. No I/O and no clock.

A batch leaves at once when a replica is idle, and when the earlier batch returns otherwise, so batching adds no waiting at low load. A
replica whose model is quick is given the next batch while it has one: else it would be idle for as long as the gateway writes the
answers of the last and reads the requests of the next.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from libs.inference.batches import concatenated, is_batchable, split
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import Route
from libs.runner.wire import Arrays, Rows
from schemas.registry import Replica
from services.gateway.predictions import Ask, Caller, Done

FIRST_ROWS = 1024
"""Rows of a batch, and of a piece of a large request, while nothing is known of how long the model takes."""

MOST_PASSED_OVER = 64
"""Requests of other shapes that a batch being formed looks past; what stands behind them waits for the next one."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much one batch holds, how many batches a replica is given at once, and how much may wait for one deployment.

    ``in_flight`` batches are given to a replica only while the way to the model and back takes longer than the model does; else one: a
    slower model does better with one large batch than with two small ones.

    ``takes_s`` is how long a batch may be expected to take: larger ones of a slow model would gain nothing and keep everybody waiting for
    the last row. ``wait_s`` is the longest expected wait of a request that is still accepted.
    """

    rows: int = 16_384
    size_bytes: int = 8 * 2**20
    in_flight: int = 2
    queued: int = 1024
    takes_s: float = 0.1
    wait_s: float = 1.0


@dataclass(slots=True, eq=False)
class Cut:
    """A large request that is asked piece by piece, so that nobody waits for the whole of it.

    Attributes
    ----------
    rows
        Rows that have been answered.
    size
        Rows of the piece that is asked now.
    outputs
        The whole answer, once there is one.
    """

    rows: int = 0
    size: int = 0
    model_s: float = 0.0
    outputs: Arrays | None = None
    _answers: list[Arrays] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)

    def add(self, response: InferResponse, total: int) -> None:
        """Take a piece's answer; raises ``UnevenBatchError`` when it does not fit the piece, or the pieces each other."""
        split(response.outputs, [self.size])
        self._answers.append(response.outputs)
        self._counts.append(self.size)
        self.rows += self.size
        self.model_s += response.model_s
        if self.rows == total:
            self.outputs = concatenated(self._answers, self._counts)
            self._answers = []


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
    queued_rows: int = 0
    cut: Cut | None = None
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
        Why it left: a replica was ``idle``, an earlier batch ``returned``, it was ``full``, its request has to be asked ``alone``, or it
        is a ``piece`` of a large one.
    model_s
        Seconds inside the model, as the runner says.
    cut
        The request that this is a piece of.
    """

    route: Route
    replica: Replica
    members: list[Pending]
    rows: int
    reason: str
    sent_s: float
    inputs: Mapping[str, Rows]
    outputs: Arrays | None = None
    answered_s: float = 0.0
    model_s: float = 0.0
    cut: Cut | None = None

    def logged(self) -> "Batch | None":
        """What the log keeps of it: a request that was cut is kept whole, once its last piece was answered or one has failed."""
        if self.cut is None:
            return self
        (pending,) = self.members
        is_halfway = self.outputs is not None and self.cut.outputs is None
        if is_halfway or pending.cut is not self.cut or pending.request is None:
            return None
        return replace(self, rows=pending.rows, inputs=dict(pending.request.inputs), outputs=self.cut.outputs)


class Pace:
    """How long batches take: ``fixed_s + rows × row_s``, fitted to the batches seen lately by exponentially weighted least squares.

    While all batches had as many rows nothing tells the two parts apart; then all of the time is taken to be the rows'.

    Examples
    --------
    >>> pace = Pace()
    >>> for rows in (1, 10, 4, 7) * 10:
    ...     pace.add(rows, 0.002 + rows * 0.005)
    >>> round(pace.row_s, 4), round(pace.seconds(20), 3), pace.most_rows(0.1)
    (0.005, 0.102, 19)
    """

    def __init__(self) -> None:
        self._weight = 1.0
        self.batches = 0
        self._rows = 0.0
        self._took_s = 0.0
        self._variance = 0.0
        self._covariance = 0.0
        self.row_s = 0.0
        self.fixed_s = 0.0

    def add(self, rows: int, took_s: float) -> None:
        """Learn from a batch."""
        self.batches += 1
        weight, self._weight = self._weight, max(0.1, self._weight / (1 + self._weight))
        more, longer = rows - self._rows, took_s - self._took_s
        self._rows += weight * more
        self._took_s += weight * longer
        self._variance = (1 - weight) * (self._variance + weight * more * more)
        self._covariance = (1 - weight) * (self._covariance + weight * more * longer)
        self.row_s = self._took_s / self._rows
        if self._variance > 0.01 * self._rows * self._rows:
            self.row_s = min(self.row_s, max(0.0, self._covariance / self._variance))
        self.fixed_s = max(0.0, self._took_s - self._rows * self.row_s)

    def seconds(self, rows: float) -> float:
        """Seconds that a batch of so many rows will take; 0 while nothing is known."""
        return self.fixed_s + rows * self.row_s

    def most_rows(self, takes_s: float) -> int:
        """Rows of a batch that takes no longer."""
        return int(max(0.0, takes_s - self.fixed_s) / self.row_s) if self.row_s > 0 else 2**31


_FEW_BATCHES = 8
"""What fewer batches took says too little of how long others will wait: the first one of a model is often ten times as slow."""

_LEARNING = 0.1
"""Weight of the last batch in the model's part of the time."""


class Lane:
    """The queue of one deployment and what its replicas are busy with.

    Attributes
    ----------
    pace
        How long batches take.
    flush_is_due
        Whether batches will be formed in this turn of the event loop anyway.
    is_away
        Whether there is no replica that answers: all were lost, or there are none.
    """

    def __init__(self, route: Route, limits: BatchLimits) -> None:
        self.route = route
        self.pace = Pace()
        self._rows_queued = 0
        self.flush_is_due = False
        self.limits = limits
        self._batchable = is_batchable(route.signature)
        self._queue: OrderedDict[Pending, None] = OrderedDict()
        self._busy: dict[Replica, int] = dict.fromkeys(route.replicas, 0)
        self._lost: set[Replica] = set()
        self._returned_s: dict[Replica, float] = {}
        self._model_part = 1.0
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
        return self.queued < self.limits.queued

    @property
    def is_batchable(self) -> bool:
        """Whether requests may be joined."""
        return self._batchable

    def ask_alone(self) -> None:
        """Join no requests from now on: the model was seen not to treat rows independently."""
        self._batchable = False

    def wait_s(self) -> float:
        """Seconds until a request of one row that comes now will be answered, by what batches took lately; 0 while little is known."""
        pace = self.pace
        if pace.batches < _FEW_BATCHES:
            return 0.0
        batches = -(-(self._rows_queued + 1) // max(1, self._most_rows(self.limits.takes_s))) if self._batchable else len(self._queue) + 1
        return ((batches + self.in_flight) * pace.fixed_s + (self._rows_queued + 1) * pace.row_s) / max(1, len(self._busy))

    def _most_rows(self, takes_s: float) -> int:
        return min(self.limits.rows, self.pace.most_rows(takes_s) if self.pace.batches else FIRST_ROWS)

    def _next_rows(self, pending: Pending) -> int:
        """Rows of a request that are asked at once: all, or those of its next piece. Pieces of a request have about as many rows.

        Where a batch of one row takes long already, a piece takes twice as long: smaller ones would cost more than they spare others.
        """
        rows = pending.rows if pending.cut is None else pending.rows - pending.cut.rows
        if rows <= 1 or not self._batchable:
            return rows
        most = self._most_rows(max(self.limits.takes_s, 2 * self.pace.fixed_s))
        if pending.size_bytes > self.limits.size_bytes:
            most = min(most, pending.rows * self.limits.size_bytes // pending.size_bytes)
        pieces = -(-rows // max(1, most))
        return -(-rows // pieces)

    def update(self, route: Route) -> None:
        """Take over which replicas there are now."""
        self.route = route
        self._busy = {replica: self._busy.get(replica, 0) for replica in route.replicas}
        self._lost.intersection_update(self._busy)
        self._returned_s = {replica: at_s for replica, at_s in self._returned_s.items() if replica in self._busy}
        self.is_away = len(self._lost) == len(self._busy)

    def put(self, pending: Pending) -> None:
        """Have a request wait."""
        self._queue[pending] = None
        # Of a large request only its next piece comes before others.
        pending.queued_rows = rows = pending.rows if pending.rows == 1 else self._next_rows(pending)
        self._rows_queued += rows

    def put_back(self, members: list[Pending]) -> None:
        """Have requests that were asked in vain wait again, before all others."""
        for pending in reversed(members):
            self.put(pending)
            self._queue.move_to_end(pending, last=False)

    def remove(self, pending: Pending) -> None:
        """Free the place of a request that ended while it waited."""
        if pending in self._queue:
            del self._queue[pending]
            self._rows_queued -= pending.queued_rows

    def waiting(self) -> list[Pending]:
        """All requests that wait."""
        return list(self._queue)

    def clear(self) -> list[Pending]:
        """Take all requests that wait."""
        waiting = list(self._queue)
        self._queue.clear()
        self._rows_queued = 0
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

    def returned(self, batch: Batch) -> None:
        """Count out a batch; its time began when the replica was done with the one before it."""
        replica, answered_s = batch.replica, batch.answered_s
        self.release(replica)
        took_s = max(answered_s - max(batch.sent_s, self._returned_s.get(replica, 0.0)), batch.model_s)
        self._returned_s[replica] = answered_s
        self.pace.add(batch.rows, took_s)
        if took_s > 0:
            self._model_part += _LEARNING * (batch.model_s / took_s - self._model_part)

    def idle_replica(self) -> Replica | None:
        """The replica with the least to do, if it may be given a batch."""
        best: Replica | None = None
        least = self.limits.in_flight if self._model_part < 0.5 else 1
        for replica, busy in self._busy.items():
            if busy < least and replica not in self._lost:
                best, least = replica, busy
        if best is not None and len(self._busy) > 1:
            # The next choice among equals begins behind this one.
            self._busy[best] = self._busy.pop(best)
        return best

    def next_batch(self, replica: Replica, now_s: float) -> tuple[list[Pending], str] | None:
        """Take the requests that leave next, with the reason if it is one of their own; None when nobody waits.

        A batch is not made longer than half of the time that its first request has left. Of a request that is cut its next piece leaves,
        by itself: ``cut.size`` rows.
        """
        queue = self._queue
        if not queue:
            return None
        first, _ = queue.popitem(last=False)
        self._rows_queued -= first.queued_rows
        self._busy[replica] += 1
        if not self._batchable:
            first.cut = None
            return [first], "alone"
        if first.rows > 1 and self._is_cut(first):
            return [first], "piece"
        if first.is_alone:
            return [first], "alone"
        return self._gather(first, min(self.limits.takes_s, (first.deadline_s - now_s) / 2))

    def _is_cut(self, pending: Pending) -> bool:
        """Whether a request is asked in pieces; then the next one is chosen."""
        rows = self._next_rows(pending)
        if pending.cut is None:
            if rows == pending.rows:
                return False
            pending.cut = Cut()
            pending.key = object()  # what is left of it is joined to nobody's
        pending.cut.size = rows
        return True

    def _gather(self, first: Pending, takes_s: float) -> tuple[list[Pending], str]:
        members, rows, size_bytes, passed_over = [first], first.rows, first.size_bytes, 0
        fitting: list[Pending] = []
        reason = ""
        most_rows = self._most_rows(takes_s)
        for pending in self._queue:
            if pending.is_alone or pending.key != first.key:
                passed_over += 1
                if passed_over > MOST_PASSED_OVER:
                    break
            elif rows + pending.rows > most_rows or size_bytes + pending.size_bytes > self.limits.size_bytes:
                reason = "full"
                break
            else:
                fitting.append(pending)
                rows += pending.rows
                size_bytes += pending.size_bytes
        for pending in fitting:
            del self._queue[pending]
            self._rows_queued -= pending.queued_rows
        members += fitting
        return members, reason


def size_of(arrays: Arrays) -> int:
    """Bytes of arrays in memory; objects count as pointers."""
    return sum(array.nbytes for array in arrays.values())
