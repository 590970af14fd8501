"""Proves from the prediction log alone that no accepted request disappeared, or says where the account does not add up.

Each gateway process (an *instance*) numbers its requests and its records, and every record says what the instance had counted by then.
So three accounts have to agree: the rows, the counters from record to record, and at the end nothing may be left over.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from libs.errors import InvalidMessage
from libs.messaging.records import Record
from libs.predictions.records import OUTCOMES, PredictionBatch, counts_of, read
from schemas.predictions import InstanceState, OutcomeCounts, RequestCounters, RequestsCounted

_CHUNK = 1 << 16
_NOTHING = RequestCounters(accepted=0)


@dataclass(frozen=True)
class InstanceReport:
    """What the log says of one instance.

    ``is_whole``: its account was read from its beginning; else from some record on, which proves what happened since.
    """

    instance: str
    state: InstanceState
    is_whole: bool
    counters: RequestCounters
    rows: OutcomeCounts
    findings: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether everything adds up."""
        return not self.findings


class Sequences:
    """Which requests have a row, and how each ended: one byte per request, in pieces that are made when they are needed."""

    def __init__(self) -> None:
        self._chunks: defaultdict[int, npt.NDArray[np.uint8]] = defaultdict(lambda: np.zeros(_CHUNK, np.uint8))

    def add(self, sequences: npt.NDArray[np.int64], outcomes: npt.NDArray[np.uint8]) -> tuple[int, int]:
        """Note rows; how many were there before with the same outcome, and how many with another. These stay as they were."""
        same = other = 0
        unique, first = np.unique(sequences, return_index=True)
        repeated = np.delete(np.arange(len(sequences)), first)
        for part, states in ((unique, outcomes[first] + 1), (sequences[repeated], outcomes[repeated] + 1)):
            for chunk, places, values in _by_chunk(part, states):
                held = self._chunks[chunk]
                before = held[places]
                same += int(np.count_nonzero(before == values))
                other += int(np.count_nonzero((before != 0) & (before != values)))
                held[places] = np.where(before == 0, values, before)
        return same, other

    def counts(self) -> OutcomeCounts:
        """Requests by outcome."""
        total = np.zeros(4, np.int64)
        for chunk in self._chunks.values():
            total += np.bincount(chunk, minlength=4)[:4]
        return OutcomeCounts(**dict(zip(OUTCOMES, total[1:].tolist(), strict=True)))


def _by_chunk(
    sequences: npt.NDArray[np.int64], states: npt.NDArray[np.uint8]
) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    chunks = sequences // _CHUNK
    for chunk in np.unique(chunks).tolist():
        chosen = chunks == chunk
        yield chunk, sequences[chosen] % _CHUNK, states[chosen]


@dataclass
class _Entry:
    """A record: its rows, and what had been counted with it."""

    rows: OutcomeCounts
    counters: RequestCounters


@dataclass
class _Account:
    """Everything read of one instance."""

    instance: str
    entries: dict[int, _Entry] = field(default_factory=dict)
    statements: list[RequestsCounted] = field(default_factory=list)
    sequences: Sequences = field(default_factory=Sequences)
    highest: int = 0
    findings: list[str] = field(default_factory=list)

    def add_batch(self, batch: PredictionBatch) -> None:
        head = batch.head
        if head.record in self.entries:
            return
        outcomes = batch.columns["outcome"] if batch.columns else np.empty(0, np.uint8)
        sequences = batch.columns["sequence"] if batch.columns else np.empty(0, np.int64)
        if len(outcomes) and outcomes.max() >= len(OUTCOMES):
            self.findings.append(f"record {head.record} has an outcome that does not exist")
            return
        if len(sequences) and sequences.min() < 1:
            self.findings.append(f"record {head.record} has a request with the number {sequences.min()}")
            return
        same, other = self.sequences.add(sequences, outcomes)
        if other:
            self.findings.append(f"{other} requests of record {head.record} have ended before, and otherwise")
        if same and not head.recovered:
            self.findings.append(f"{same} requests of record {head.record} have ended before")
        if head.recovered:
            return
        self.highest = max(self.highest, int(sequences.max(initial=0)))
        self.entries[head.record] = _Entry(counts_of(outcomes), head.counters)

    def report(self, live: bool) -> InstanceReport:
        state, counters, in_doubt = self._last()
        if state is InstanceState.LIVE and not live:
            self.findings.append(
                "its gateway is gone and nobody has settled its account; a gateway of the same home does so when it starts"
            )
        is_whole = self._is_whole()
        self._check_records(state)
        self._check_counters(state, counters, in_doubt)
        rows = self.sequences.counts()
        if is_whole:
            self._check_rows(rows, counters, in_doubt)
        if self.highest > counters.accepted:
            self.findings.append(f"it logged a request with the number {self.highest} and has accepted {counters.accepted}")
        return InstanceReport(self.instance, state, is_whole, counters, rows, tuple(dict.fromkeys(self.findings)))

    def _last(self) -> tuple[InstanceState, RequestCounters, int]:
        """The last word: a final statement if there is one, else the furthest count."""
        for state in (InstanceState.LOST, InstanceState.STOPPED):
            for statement in self.statements:
                if statement.state is state:
                    return state, statement.counters, statement.in_doubt
        said = [*(entry.counters for entry in self.entries.values()), *(statement.counters for statement in self.statements)]
        furthest = max(said, key=lambda each: (each.logged.total + each.lost.total + each.off.total, each.ended.total, each.accepted))
        return InstanceState.LIVE, furthest, 0

    def _is_whole(self) -> bool:
        """Whether nothing of it lies before what was read: its first statement, or its first record."""
        began = any(statement.records == 0 and statement.counters.accepted == 0 for statement in self.statements)
        return began or 1 in self.entries

    def _check_records(self, state: InstanceState) -> None:
        numbers = sorted(self.entries)
        if not numbers:
            return
        written = max([numbers[-1], *(statement.records for statement in self.statements if statement.state is not InstanceState.LOST)])
        first = 1 if self._is_whole() else numbers[0]
        missing = [number for number in range(first, written + 1) if number not in self.entries]
        if missing and state is not InstanceState.LOST:
            shown = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
            self.findings.append(f"{len(missing)} of its records are missing: {shown}")
        for after in numbers:
            if after == 1:
                self._check_step(_NOTHING, after)
            elif after - 1 in self.entries:
                self._check_step(self.entries[after - 1].counters, after)

    def _check_step(self, one: RequestCounters, after: int) -> None:
        other = self.entries[after].counters
        for outcome in OUTCOMES:
            counted = getattr(other.logged, outcome) - getattr(one.logged, outcome)
            held = getattr(self.entries[after].rows, outcome)
            if counted != held:
                self.findings.append(f"record {after} holds {held} {outcome} requests and was counted as {counted}")
        if other.accepted < one.accepted or other.ended.total < one.ended.total:
            self.findings.append(f"it counts backwards from record {after - 1} to {after}")

    def _check_counters(self, state: InstanceState, counters: RequestCounters, in_doubt: int) -> None:
        if counters.in_flight < 0:
            self.findings.append(f"it counts {counters.ended.total} ends of {counters.accepted} accepted requests")
        if counters.waiting < -in_doubt:
            self.findings.append(f"it counts {-counters.waiting} rows more than requests that ended")
        if state is InstanceState.LIVE:
            return
        if counters.in_flight > 0:
            self.findings.append(f"{counters.in_flight} accepted requests have no end")
        if counters.waiting > 0:
            self.findings.append(f"{counters.waiting} requests that ended are neither in the log nor counted as lost")

    def _check_rows(self, rows: OutcomeCounts, counters: RequestCounters, in_doubt: int) -> None:
        for outcome in OUTCOMES:
            held, counted = getattr(rows, outcome), getattr(counters.logged, outcome)
            if not counted <= held <= counted + in_doubt:
                self.findings.append(f"the log has {held} {outcome} requests and its counters say {counted}")


class Audit:
    """Takes the records of the log in any order and gives a report of each instance.

    Repeats of a record are passed over; what cannot be read is a finding.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self.unreadable: list[str] = []
        self.records = 0

    def add(self, record: Record) -> None:
        """Take one record in."""
        self.records += 1
        try:
            said = read(record)
        except InvalidMessage as error:
            self.unreadable.append(error.message)
            return
        if isinstance(said, PredictionBatch):
            self._account(said.head.instance).add_batch(said)
        elif said is not None:
            self._account(said.instance).statements.append(said)

    def reports(self, live: Iterable[str] = ()) -> list[InstanceReport]:
        """What is found; ``live`` are the instances that run now. Call it once, when everything has been taken in."""
        living = set(live)
        return [account.report(instance in living) for instance, account in self._accounts.items()]

    def knows(self, instance: str) -> bool:
        """Whether anything was read of an instance."""
        return instance in self._accounts

    def ended(self, instances: Iterable[str]) -> Mapping[str, int]:
        """Requests by outcome, and ``accepted``, that the furthest counters of some instances say."""
        total: Counter[str] = Counter()
        for instance in instances:
            if instance in self._accounts:
                _, counters, _ = self._accounts[instance]._last()
                total.update({"accepted": counters.accepted, **counters.ended.model_dump()})
        return total

    def _account(self, instance: str) -> _Account:
        return self._accounts.setdefault(instance, _Account(instance))
