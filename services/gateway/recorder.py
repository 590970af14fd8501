"""The recorder: what the data plane tells of requests goes into the ledger, the metrics and the prediction log.

Its hooks run on the event loop between a request and its answer, so each does as little as can be done at once: a few writes into memory.
What can wait (counting, columns, JSON) is done for many requests together, a few times a second.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from libs.errors import MillraceError
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.errors import StoppingError
from libs.messaging.records import Record
from libs.messaging.retry import Retry, keep_trying
from libs.metrics import Counter, Metrics
from libs.metrics import definitions as metric
from libs.predictions import records
from libs.predictions.records import OUTCOMES
from schemas.predictions import (
    InstanceState,
    OutcomeCounts,
    PredictionLogLost,
    PredictionLogMode,
    PredictionLogSettings,
    RequestCounters,
    RequestsCounted,
)
from services.gateway.batching import Batch, Lane, Pending
from services.gateway.catalog import Catalog
from services.gateway.errors import LogUnavailableError
from services.gateway.ledger import COMPLETED, EXPIRED, FAILED, Ledger
from services.gateway.prediction_log import FOLD_ROWS, ROW, Budget, DeploymentLog, Item, LogWriter
from services.gateway.predictions import Outcome, Protocol
from services.gateway.recovery import Recovery
from services.gateway.request_metrics import PROTOCOLS, RequestMetrics, error_kind
from services.gateway.settings import Settings
from services.gateway.statistics import Document

log = logging.getLogger(__name__)

STATEMENT_S = 1.0
"""While there are no rows to log, what was counted is said at most so often."""

ORPHANS_S = 15.0
"""How often ledgers are looked for whose gateway is gone."""

_STATES = {Outcome.COMPLETED: COMPLETED, Outcome.FAILED: FAILED, Outcome.EXPIRED: EXPIRED}
_PROTOCOL_CODES = {protocol: code for code, protocol in enumerate(PROTOCOLS)}
_pack_row = ROW.pack_into
_ROW_BYTES = ROW.size
_NO_ROWS: npt.NDArray[np.int64] = np.empty(0, np.int64)
_DEFAULTS = PredictionLogSettings()


@dataclass(frozen=True, slots=True)
class RecorderLimits:
    """How much of the log waits in memory, how much of inputs and outputs is kept, and how often records are cut.

    ``queue_bytes``: beyond half of it inputs and outputs are left out and requests of endpoints whose log is required are refused; beyond
    it rows are given up.
    """

    queue_bytes: int = 64 * 2**20
    payload_bytes_per_s: int = 32 * 2**20
    flush_s: float = 0.25


@dataclass(slots=True)
class _Door:
    """An endpoint and a protocol: where its requests are counted as they come in."""

    number: int
    accepted: Counter


class _Log(DeploymentLog):
    """A deployment's log with its instruments."""

    def __init__(self, metrics: Metrics, names: tuple[str, str, str, str], settings: PredictionLogSettings) -> None:
        super().__init__(*names, settings)
        endpoint_name, _, model_name, model_version = names
        self.instruments = RequestMetrics(metrics, (endpoint_name, model_name, model_version))
        self.payload_requests = metrics.counter(metric.LOG_PAYLOAD_REQUESTS, endpoint_name)


class Recorder:
    """Implements the hooks of the data plane (``dataplane.Recorder``); a component, started before it and stopped after it.

    Parameters
    ----------
    directory
        Where the ledgers of this home's gateways are.
    instance
        Name of this process among all that ever were, 32 characters; a new one unless given.
    """

    def __init__(
        self,
        directory: Path,
        catalog: Catalog,
        broker: Broker,
        metrics: Metrics,
        limits: RecorderLimits | None = None,
        *,
        clock: Clock = cloudevents.utc_now,
        instance: str | None = None,
    ) -> None:
        self.instance = instance or uuid.uuid4().hex
        self._directory = directory
        self._catalog = catalog
        self._metrics = metrics
        self._limits = limits or RecorderLimits()
        self._clock = clock
        self._producer = broker.producer()
        self._writer = LogWriter(self._producer, self._written, self._write_failed)
        self._works: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._recovery = Recovery(directory, broker, self._send_surely, metrics, clock, self._stopping)
        self._ledger: Ledger
        self._is_recording = False
        self._sequence = 0
        self._doors: dict[Protocol, dict[str, _Door]] = {protocol: {} for protocol in Protocol}
        self._logs: dict[str, _Log] = {}
        self._unrouted: dict[str, _Log] = {}
        self._error_codes: dict[type[MillraceError], tuple[int, int]] = {}
        self._errors = [""]
        self._refusing: dict[str, LogUnavailableError] = {}
        self._allowance = Budget(float(self._limits.payload_bytes_per_s))
        self._ended_by_endpoint: defaultdict[str, int] = defaultdict(int)
        self._made: Tally[str] = Tally()
        self._lost_now: Tally[str] = Tally()
        self._statements = 0
        self._stated: RequestCounters | None = None
        self._stated_at_s = 0.0
        self._ticked_at_s = 0.0
        self._add_metrics()

    # The hooks

    def refusal(self, endpoint_name: str) -> MillraceError | None:
        """Why an endpoint's requests cannot be accepted now: its log is required and cannot be written."""
        return self._refusing.get(endpoint_name) if self._refusing else None

    def refused(self, endpoint_name: str, protocol: Protocol, reason: str) -> None:
        """A request was not accepted; ``reason`` is one of a few words."""
        known = endpoint_name if endpoint_name in self._catalog.endpoints else ""
        self._metrics.counter(metric.REQUESTS_REFUSED, known, protocol.value, reason).value += 1

    def accepted(self, pending: Pending) -> None:
        """A request was accepted; gives it its number."""
        ask = pending.ask
        try:
            door = self._doors[ask.protocol][ask.target.endpoint_name]
        except KeyError:
            door = self._open_door(ask.protocol, ask.target.endpoint_name)
        door.accepted.value += 1
        self._sequence = pending.sequence = sequence = self._sequence + 1
        self._ledger.begin(sequence, pending.accepted_s, door.number, pending.caller.request_id)

    def ended(self, pending: Pending, outcome: Outcome, error: MillraceError | None) -> None:
        """A request ended; it was accepted before and had not ended."""
        state = _STATES[outcome]
        sequence = pending.sequence
        self._ledger.end(sequence, state)
        route = pending.route
        if route is None:
            rows = self._unrouted_log(pending.ask.target.endpoint_name)
        else:
            try:
                rows = self._logs[route.deployment_id]
            except KeyError:
                rows = self._open_log(route.endpoint_name, route.deployment_id, route.model_name, str(route.version))
        code, status = (0, 200) if error is None else self._error_code(error)
        caller = pending.caller
        count = rows.count
        _pack_row(
            rows.buffer,
            count * _ROW_BYTES,
            sequence,
            pending.accepted_s,
            pending.queued_s,
            pending.sent_s,
            pending.ended_s,
            pending.model_s,
            pending.rows,
            caller.body_bytes,
            pending.answer_bytes,
            status,
            state - COMPLETED,
            code,
            _PROTOCOL_CODES[pending.ask.protocol],
            pending.attempts,
        )
        rows.ids.append(caller.request_id)
        rows.principals.append(caller.principal)
        rows.count = count = count + 1
        if count == FOLD_ROWS:
            self._fold(rows)

    def batch_sent(self, batch: Batch) -> None:
        """A batch left."""
        instruments = self._log_of(batch).instruments
        instruments.batch(batch.reason).value += 1
        instruments.batches_in_flight.value += 1

    def batch_ended(self, batch: Batch, error: MillraceError | None) -> None:
        """A batch was answered, or came to nothing; its inputs and outputs are captured unless its requests will be asked again."""
        kept = self._log_of(batch)
        instruments = kept.instruments
        instruments.batches_in_flight.value -= 1
        instruments.answered.append((batch.rows, batch.answered_s - batch.sent_s, batch.model_s, error is None))
        if error is not None:
            instruments.batch_error(error)
            if error.retryable or len(batch.members) > 1:
                return
        if kept.keeps_payload and (logged := batch.logged()) is not None:
            self._capture(kept, logged)

    # Life

    async def start(self) -> None:
        self._ticked_at_s = self._stated_at_s = time.monotonic()
        await self._producer.start()
        self._ledger = Ledger(self._directory, self.instance, time.monotonic())
        self._is_recording = True
        self._state(InstanceState.LIVE)

    async def run(self) -> None:
        self._works = [asyncio.create_task(work) for work in (self._writer.run(), self._tick_for_ever(), self._settle_for_ever())]
        try:
            done, _ = await asyncio.wait(self._works, return_when=asyncio.FIRST_COMPLETED)
            for work in done:
                if not work.cancelled():
                    work.result()
        finally:
            await self._end_works()

    async def stop(self) -> None:
        """Write what is left; what the broker does not take in time is left to the next gateway."""
        self._stopping.set()
        if self._is_recording:
            self._is_recording = False
            await self._close()
        await self._producer.stop()

    async def _close(self) -> None:
        self.flush()
        settled = await self._writer.drain() and self._ledger.is_settled
        if settled:
            self._state(InstanceState.STOPPED)
            settled = await self._writer.drain()
        await self._end_works()
        self._ledger.close(remove=settled)

    async def _end_works(self) -> None:
        for work in self._works:
            work.cancel()
        await asyncio.gather(*self._works, return_exceptions=True)

    def flush(self) -> None:
        """Cut everything that has ended into records."""
        for kept in self._all_logs():
            if kept.count:
                self._fold(kept)
            kept.instruments.count_batches()
            self._cut(kept)

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._limits.flush_s)
            self.tick()

    async def _settle_for_ever(self) -> None:
        while True:
            with suppress(StoppingError):
                await self._recovery.settle()
            await asyncio.sleep(ORPHANS_S)

    async def _send_surely(self, said: Sequence[Record]) -> None:
        await keep_trying(lambda: self._producer.send(said), Retry(longest_s=5.0), self._stopping)

    def tick(self) -> None:
        """What is done a few times a second."""
        now_s = time.monotonic()
        elapsed_s, self._ticked_at_s = now_s - self._ticked_at_s, now_s
        self._allowance.refill(elapsed_s)
        for kept in self._all_logs():
            kept.adapt(self._settings_of(kept.endpoint_name), elapsed_s)
        self._look_at_the_broker()
        self.flush()
        if now_s - self._stated_at_s >= STATEMENT_S and self._counters() != self._stated:
            self._state(InstanceState.LIVE)

    # Rows and records

    def _fold(self, kept: _Log) -> None:
        rows = kept.fold()
        kept.instruments.count(rows)
        self._ended_by_endpoint[kept.endpoint_name] += len(rows)
        if kept.is_off:
            counts = records.counts_of(rows["outcome"])
            self._ledger.off(rows["sequence"], counts)
            self._count(metric.LOG_OFF, counts)
        elif kept.is_due:
            self._cut(kept)

    def _cut(self, kept: _Log) -> None:
        if kept.is_empty:
            return
        waiting = self._writer.queued_bytes
        if waiting > self._limits.queue_bytes and not kept.is_required:
            self._give_up(kept)
            return
        if waiting > self._limits.queue_bytes / 2:
            self._left_out(kept, "no_room", kept.drop_payload())
        wall_minus_clock_s = time.time() - time.monotonic()
        for piece in kept.cut():
            counts = records.counts_of(piece.rows["outcome"])
            principals: list[str] = []
            columns = piece.columns(wall_minus_clock_s, principals)
            self._made.update(_as_tally(counts))
            head = {**self._head(kept), "request_ids": piece.ids, "principals": principals}
            record = records.write(head, columns, piece.blocks, self._clock())
            kept.payload_requests.value += sum(len(block.sequence) for block in piece.blocks)
            self._writer.put(Item(record, columns["sequence"], counts))

    def _head(self, kept: DeploymentLog) -> dict[str, object]:
        self._ledger.records += 1
        self._stated, self._stated_at_s = self._counters(), time.monotonic()
        return {
            "instance": self.instance,
            "record": self._ledger.records,
            "endpoint_name": kept.endpoint_name,
            "deployment_id": kept.deployment_id,
            "model_name": kept.model_name,
            "model_version": kept.model_version,
            "recovered": False,
            "outcomes": OUTCOMES,
            "errors": self._errors,
            "protocols": PROTOCOLS,
            "counters": self._stated.model_dump(),
        }

    def _capture(self, kept: _Log, batch: Batch) -> None:
        members = batch.members
        if self._writer.queued_bytes > self._limits.queue_bytes / 2:
            self._left_out(kept, "no_room", len(members))
            return
        sequences = [pending.sequence for pending in members]
        identities = [pending.caller.request_id for pending in members] if kept.settings.sample_percent < 100 else []
        reason = kept.capture(sequences, [pending.rows for pending in members], identities, batch, self._allowance)
        if reason is not None:
            self._left_out(kept, reason, len(members))
        if kept.is_due:
            self._cut(kept)

    def _give_up(self, kept: _Log) -> None:
        rows = kept.drop_rows()
        counts = records.counts_of(rows["outcome"])
        self._ledger.lost(rows["sequence"], counts)
        self._lost_now.update(_as_tally(counts))
        self._count(metric.LOG_LOST, counts)

    def _left_out(self, kept: _Log, reason: str, requests: int) -> None:
        if requests:
            self._metrics.counter(metric.LOG_PAYLOAD_LEFT_OUT, kept.endpoint_name, reason).value += requests

    def _counters(self) -> RequestCounters:
        """What was counted; ``logged`` is what was put into records, whether or not the broker has them already."""
        return self._ledger.counters().model_copy(update={"logged": OutcomeCounts(**self._made)})

    def _state(self, state: InstanceState) -> None:
        self._stated, self._stated_at_s = self._counters(), time.monotonic()
        self._statements += 1
        counted = RequestsCounted(instance=self.instance, state=state, records=self._ledger.records, counters=self._stated)
        self._put(records.write_count(counted, self._statements, self._clock()))

    def _put(self, record: Record) -> None:
        self._writer.put(Item(record, _NO_ROWS, OutcomeCounts()))

    def _written(self, item: Item) -> None:
        if len(item.sequences):
            self._ledger.logged(item.sequences, item.counts)
            self._count(metric.LOG_ROWS, item.counts)
        self._metrics.counter(metric.LOG_RECORDS).value += 1
        self._metrics.counter(metric.LOG_BYTES).value += item.record.size_bytes

    def _write_failed(self) -> None:
        self._metrics.counter(metric.LOG_FAILURES).value += 1
        self._look_at_the_broker()

    def _look_at_the_broker(self) -> None:
        """Refuse what must be logged while it cannot be, and tell of rows that were lost once it can."""
        is_away = self._writer.is_away(time.monotonic())
        self._metrics.gauge(metric.LOG_AVAILABLE).value = int(not is_away)
        if is_away or self._writer.queued_bytes > self._limits.queue_bytes / 2:
            self._refusing = {name: _unavailable(name) for name, log in self._endpoint_logs() if log.mode is PredictionLogMode.REQUIRED}
            return
        self._refusing = {}
        if self._lost_now:
            rows, self._lost_now = OutcomeCounts(**self._lost_now), Tally()
            lost = PredictionLogLost(instance=self.instance, rows=rows, reason="the broker did not take the records of the log")
            log.warning("%d rows of the prediction log were given up", rows.total)
            self._put(cloudevents.write(cloudevents.new_event(lost, records.SOURCE, now=self._clock())))

    def _endpoint_logs(self) -> Iterator[tuple[str, PredictionLogSettings]]:
        return ((name, endpoint.prediction_log) for name, endpoint in self._catalog.endpoints.items())

    def _settings_of(self, endpoint_name: str) -> PredictionLogSettings:
        endpoint = self._catalog.endpoints.get(endpoint_name)
        return _DEFAULTS if endpoint is None else endpoint.prediction_log

    # What is looked up on the way of requests

    def _open_door(self, protocol: Protocol, endpoint_name: str) -> _Door:
        accepted = self._metrics.counter(metric.REQUESTS_ACCEPTED, endpoint_name, protocol.value)
        door = self._doors[protocol][endpoint_name] = _Door(self._ledger.door(endpoint_name, protocol.value), accepted)
        return door

    def _log_of(self, batch: Batch) -> _Log:
        route = batch.route
        kept = self._logs.get(route.deployment_id)
        return kept or self._open_log(route.endpoint_name, route.deployment_id, route.model_name, str(route.version))

    def _unrouted_log(self, endpoint_name: str) -> _Log:
        kept = self._unrouted.get(endpoint_name)
        if kept is None:
            names = (endpoint_name, "", "", "")
            kept = self._unrouted[endpoint_name] = _Log(self._metrics, names, self._settings_of(endpoint_name))
        return kept

    def _open_log(self, endpoint_name: str, deployment_id: str, model_name: str, model_version: str) -> _Log:
        names = (endpoint_name, deployment_id, model_name, model_version)
        kept = self._logs[deployment_id] = _Log(self._metrics, names, self._settings_of(endpoint_name))
        return kept

    def _error_code(self, error: MillraceError) -> tuple[int, int]:
        kind = type(error)
        known = self._error_codes.get(kind)
        if known is None:
            if len(self._errors) < 255:
                self._errors.append(error_kind(kind))
            known = self._error_codes[kind] = (len(self._errors) - 1, int(kind.http_status))
        return known

    def _all_logs(self) -> list[_Log]:
        return [*self._logs.values(), *self._unrouted.values()]

    # Metrics

    def watch_lanes(self, lanes: Callable[[], Mapping[str, Lane]]) -> None:
        """Show how many requests wait for each deployment."""

        def queued() -> Iterator[tuple[tuple[str, ...], float]]:
            for lane in lanes().values():
                yield (lane.route.endpoint_name, lane.route.model_name, str(lane.route.version)), lane.queued

        self._metrics.watch(metric.REQUESTS_QUEUED, queued)

    def _add_metrics(self) -> None:
        self._metrics.before_reading(self._settle_counts)
        self._metrics.gauge(metric.GATEWAY_INSTANCE, self.instance).value = 1
        self._metrics.watch(metric.LOG_QUEUE_BYTES, lambda: [((), self._writer.queued_bytes)])
        self._metrics.watch(metric.REQUESTS_IN_FLIGHT, self._in_flight)

    def statistics(self) -> dict[str, Document]:
        """Triton's statistics by deployment id, as they are now."""
        self._settle_counts()
        return {deployment_id: kept.instruments.statistics.document() for deployment_id, kept in self._logs.items()}

    def _settle_counts(self) -> None:
        for kept in self._all_logs():
            if kept.count:
                self._fold(kept)
            kept.instruments.count_batches()

    def _in_flight(self) -> Iterable[tuple[tuple[str, ...], float]]:
        accepted: Tally[str] = Tally()
        for doors in self._doors.values():
            for endpoint_name, door in doors.items():
                accepted[endpoint_name] += int(door.accepted.value)
        return [((name,), number - self._ended_by_endpoint[name]) for name, number in accepted.items()]

    def _count(self, definition: metric.Metric, counts: OutcomeCounts) -> None:
        for outcome, number in _as_tally(counts).items():
            if number:
                self._metrics.counter(definition, outcome).value += number


def recorder_from_settings(
    settings: Settings, catalog: Catalog, broker: Broker, metrics: Metrics, clock: Clock = cloudevents.utc_now
) -> Recorder:
    """The recorder of a gateway as configured."""
    limits = RecorderLimits(settings.log.queue_bytes, settings.log.payload_bytes_per_s, settings.log.flush_ms / 1000)
    return Recorder(ledger_directory(settings.process.home), catalog, broker, metrics, limits, clock=clock)


def ledger_directory(home: Path) -> Path:
    """Where the gateways of a home keep their ledgers."""
    return home / "run" / "gateway"


def _as_tally(counts: OutcomeCounts) -> dict[str, int]:
    return {"completed": counts.completed, "failed": counts.failed, "expired": counts.expired}


def _unavailable(endpoint_name: str) -> LogUnavailableError:
    return LogUnavailableError(f"endpoint {endpoint_name!r} requires its prediction log, which cannot be written at the moment")
