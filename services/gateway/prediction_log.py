"""The prediction log: rows and tensors of ended requests gathered per deployment, cut into records, and written while requests go on."""

import asyncio
import logging
import struct
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from libs.errors import MillraceError
from libs.inference.batches import whole
from libs.messaging.broker import Producer
from libs.messaging.records import Record
from libs.messaging.retry import Retry
from libs.predictions.records import COLUMNS, Block
from libs.runner.wire import Arrays
from libs.runner.wire import Rows as TensorRows
from schemas.predictions import OutcomeCounts, PredictionLogMode, PredictionLogSettings

log = logging.getLogger(__name__)

ROW = struct.Struct("<qdddddIIIHBBBB")
"""One row as ``add`` packs it; the fields are those of ``ROW_TYPE``."""

ROW_TYPE = np.dtype(
    [
        ("sequence", "<i8"),
        ("accepted_s", "<f8"),
        ("queued_s", "<f8"),
        ("sent_s", "<f8"),
        ("ended_s", "<f8"),
        ("model_s", "<f8"),
        ("rows", "<u4"),
        ("request_bytes", "<u4"),
        ("response_bytes", "<u4"),
        ("status", "<u2"),
        ("outcome", "u1"),
        ("error", "u1"),
        ("protocol", "u1"),
        ("attempts", "u1"),
    ]
)

FOLD_ROWS = 256
"""So many rows are taken out of their buffer, and counted, in one go: about a tenth of a millisecond of work."""

MAX_ROWS = 4_096
"""Most rows of one record; with the longest ids they take 700 kB."""

MAX_BLOCK_BYTES = 640_000
MAX_RECORD_BYTES = 900_000
"""A broker takes records of 1 MiB by default; the head's description of the tensors needs room too."""

_ROW_BYTES = sum(dtype.itemsize for dtype in COLUMNS.values()) + 4
"""A row's columns, and the quotes and comma around its id."""

PATIENCE_S = 2.0
"""The broker counts as away when it has had a record for so long without acknowledging it."""

_SEND_BYTES = 4_000_000
_STOP_S = 3.0

Rows = npt.NDArray[Any]


class Captured(NamedTuple):
    """Inputs and outputs of some requests as they were batched."""

    sequences: Sequence[int]
    rows: Sequence[int]
    inputs: Arrays
    outputs: Arrays
    size_bytes: int
    is_joinable: bool


class BatchLike(Protocol):
    """What is captured of a batch; ``batching.Batch`` is one."""

    @property
    def inputs(self) -> Mapping[str, TensorRows]: ...

    @property
    def outputs(self) -> Arrays | None: ...

    @property
    def rows(self) -> int: ...


@dataclass(slots=True)
class Budget:
    """An allowance that comes back with time, up to one second's worth; what is taken may overdraw it once."""

    per_s: float
    left: float = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.per_s

    def refill(self, elapsed_s: float) -> None:
        """Some time has passed."""
        self.left = min(self.per_s, self.left + self.per_s * elapsed_s)

    def take(self, amount: float) -> bool:
        """Whether there is something left; if so ``amount`` is taken."""
        if self.left <= 0:
            return False
        self.left -= amount
        return True


class DeploymentLog:
    """What is to be said of the requests to one deployment, until it is cut into records.

    Attributes
    ----------
    buffer, count, ids, principals
        The rows that have not been folded; whoever packs one also counts it and adds its id and principal.
    """

    def __init__(
        self, endpoint_name: str, deployment_id: str, model_name: str, model_version: str, settings: PredictionLogSettings
    ) -> None:
        self.endpoint_name = endpoint_name
        self.deployment_id = deployment_id
        self.model_name = model_name
        self.model_version = model_version
        self.buffer = bytearray(FOLD_ROWS * ROW.size)
        self.count = 0
        self.ids: list[str] = []
        self.principals: list[str] = []
        self.settings = settings
        self._budget = Budget(float(settings.max_rows_per_s))
        self._folded: list[Rows] = []
        self._folded_ids: list[str] = []
        self._folded_principals: list[str] = []
        self._captured: list[Captured] = []
        self._captured_bytes = 0

    def adapt(self, settings: PredictionLogSettings, elapsed_s: float) -> None:
        """Follow the endpoint's settings, and let time pass for the rate of rows."""
        if settings is not self.settings:
            if settings.max_rows_per_s != self.settings.max_rows_per_s:
                self._budget = Budget(float(settings.max_rows_per_s))
            self.settings = settings
        self._budget.refill(elapsed_s)

    @property
    def keeps_payload(self) -> bool:
        """Whether inputs and outputs of any request are kept."""
        return self.settings.mode is not PredictionLogMode.OFF and self.settings.sample_percent > 0

    @property
    def is_off(self) -> bool:
        """Whether nothing is kept."""
        return self.settings.mode is PredictionLogMode.OFF

    @property
    def is_required(self) -> bool:
        """Whether nothing may be lost."""
        return self.settings.mode is PredictionLogMode.REQUIRED

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to be cut."""
        return not self._folded and not self._captured

    @property
    def size_bytes(self) -> int:
        """About what the records would take."""
        return self._captured_bytes + len(self._folded_ids) * (_ROW_BYTES + 40)

    @property
    def is_due(self) -> bool:
        """Whether there is enough for a record."""
        return len(self._folded_ids) >= MAX_ROWS or self._captured_bytes >= MAX_BLOCK_BYTES

    def fold(self) -> Rows:
        """Take the rows out of the buffer; they are kept for the records unless the log is off, and returned."""
        rows: Rows = np.frombuffer(bytes(memoryview(self.buffer)[: self.count * ROW.size]), ROW_TYPE)
        if not self.is_off:
            self._folded.append(rows)
            self._folded_ids += self.ids
            self._folded_principals += self.principals
        self.count = 0
        self.ids.clear()
        self.principals.clear()
        return rows

    def capture(self, sequences: list[int], rows: list[int], request_ids: list[str], batch: BatchLike, allowance: Budget) -> str | None:
        """Keep inputs and outputs of the requests that are sampled; the reason when they were left out."""
        if self._budget.left <= 0 and self.settings.sample_percent >= 100:
            return "rate"
        inputs, outputs = whole(batch.inputs), batch.outputs or {}
        count, size_bytes, aligned = batch.rows, 0, True
        for array in (*inputs.values(), *outputs.values()):
            size_bytes += array.nbytes if array.dtype.kind != "O" else _element_bytes(array)
            aligned = aligned and array.ndim > 0 and len(array) == count
        taken = Captured(sequences, rows, inputs, outputs, size_bytes, aligned)
        if self.settings.sample_percent < 100:
            taken = _picked(taken, [is_sampled(request_id, self.settings.sample_percent) for request_id in request_ids])
            if not taken.sequences:
                return None
            count = sum(taken.rows)
        if not self._budget.take(count) or not allowance.take(taken.size_bytes):
            return "rate"
        if taken.size_bytes <= MAX_BLOCK_BYTES:
            self._captured.append(taken)
            self._captured_bytes += taken.size_bytes
            return None
        return self._split(taken)

    def _split(self, taken: Captured) -> str | None:
        """Keep a large capture request by request."""
        parts = [_part(taken, place) for place in range(len(taken.sequences))] if taken.is_joinable else [taken]
        fitting = [part for part in parts if part.size_bytes <= MAX_BLOCK_BYTES]
        self._captured += fitting
        self._captured_bytes += sum(part.size_bytes for part in fitting)
        return None if len(fitting) == len(parts) else "oversized"

    def drop_payload(self) -> int:
        """Forget the inputs and outputs that were captured; returns of how many requests."""
        dropped = sum(len(captured.sequences) for captured in self._captured)
        self._captured, self._captured_bytes = [], 0
        return dropped

    def drop_rows(self) -> Rows:
        """Forget the rows, and what was captured; returns them."""
        rows = np.concatenate(self._folded) if self._folded else np.empty(0, ROW_TYPE)
        self._folded, self._folded_ids, self._folded_principals = [], [], []
        self.drop_payload()
        return rows

    def cut(self) -> Iterator["Piece"]:
        """Everything as pieces that each fit a record; nothing is left."""
        blocks = deque(_blocks(self._captured))
        ids, principals = self._folded_ids, self._folded_principals
        rows = self.drop_rows()
        begin = 0
        while begin < len(ids) or blocks:
            end = min(begin + MAX_ROWS, len(ids))
            size = sum(map(len, ids[begin:end])) + (end - begin) * _ROW_BYTES
            taken: list[Block] = []
            while blocks and ((not taken and begin == end) or size + blocks[0][1] <= MAX_RECORD_BYTES):
                block, block_bytes = blocks.popleft()
                taken.append(block)
                size += block_bytes
            yield Piece(rows[begin:end], ids[begin:end], principals[begin:end], taken)
            begin = end


@dataclass(frozen=True, slots=True)
class Piece:
    """What one record will hold."""

    rows: Rows
    ids: list[str]
    principals: list[str]
    blocks: list[Block]

    def columns(self, wall_minus_clock_s: float, principals: list[str]) -> Arrays:
        """The columns of the record; ``principals`` is filled with those that occur."""
        rows = self.rows
        places = {name: place for place, name in enumerate(dict.fromkeys(self.principals))}
        principals += places
        left_queue = np.where(rows["sent_s"] > 0, rows["sent_s"], rows["ended_s"])
        values: dict[str, Any] = {
            "sequence": rows["sequence"],
            "outcome": rows["outcome"],
            "error": rows["error"],
            "status": rows["status"],
            "protocol": rows["protocol"],
            "principal": np.zeros(len(rows), np.uint16) if len(places) == 1 else [places[name] for name in self.principals],
            "accepted_at": rows["accepted_s"] + wall_minus_clock_s,
            "latency_s": rows["ended_s"] - rows["accepted_s"],
            "queue_s": np.where(rows["queued_s"] > 0, left_queue - rows["queued_s"], np.nan),
            "model_s": np.where(rows["model_s"] > 0, rows["model_s"], np.nan),
            "rows": rows["rows"],
            "request_bytes": rows["request_bytes"],
            "response_bytes": rows["response_bytes"],
            "attempts": rows["attempts"],
        }
        return {name: np.ascontiguousarray(values[name], dtype) for name, dtype in COLUMNS.items()}


def is_sampled(request_id: str, percent: float) -> bool:
    """Whether a request is among the sampled; the same request always is, or never.

    >>> is_sampled("order-4711", 100), is_sampled("order-4711", 0)
    (True, False)
    """
    return zlib.crc32(request_id.encode()) < percent / 100 * 2**32


def _size_of(arrays: Arrays) -> int:
    return sum(_element_bytes(array) if array.dtype.kind == "O" else array.nbytes for array in arrays.values())


def _element_bytes(array: npt.NDArray[Any]) -> int:
    return sum(4 + len(element or b"") for element in array.reshape(-1).tolist())


def _picked(captured: Captured, wanted: list[bool]) -> Captured:
    if all(wanted):
        return captured
    parts = [_part(captured, place) for place, is_wanted in enumerate(wanted) if is_wanted] if captured.is_joinable else []
    return _joined(parts) if parts else Captured((), (), {}, {}, 0, captured.is_joinable)


def _part(captured: Captured, place: int) -> Captured:
    """One request of several."""
    begin = sum(captured.rows[:place])
    end = begin + captured.rows[place]
    inputs = {name: array[begin:end] for name, array in captured.inputs.items()}
    outputs = {name: array[begin:end] for name, array in captured.outputs.items()}
    size_bytes = _size_of(inputs) + _size_of(outputs)
    return Captured([captured.sequences[place]], [captured.rows[place]], inputs, outputs, size_bytes, is_joinable=True)


def _joined(parts: Sequence[Captured]) -> Captured:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Captured(
        [sequence for part in parts for sequence in part.sequences],
        [count for part in parts for count in part.rows],
        {name: np.concatenate([part.inputs[name] for part in parts]) for name in first.inputs},
        {name: np.concatenate([part.outputs[name] for part in parts]) for name in first.outputs},
        sum(part.size_bytes for part in parts),
        is_joinable=True,
    )


def _blocks(captured: Sequence[Captured]) -> Iterator[tuple[Block, int]]:
    """Blocks with their sizes; what has equal tensors shares a block, as far as it may grow."""
    groups: defaultdict[Hashable, list[Captured]] = defaultdict(list)
    for place, each in enumerate(captured):
        groups[_key(each) if each.is_joinable else place].append(each)
    for group in groups.values():
        parts: list[Captured] = []
        size_bytes = 0
        for each in group:
            if parts and size_bytes + each.size_bytes > MAX_BLOCK_BYTES:
                yield _block(_joined(parts))
                parts, size_bytes = [], 0
            parts.append(each)
            size_bytes += each.size_bytes
        yield _block(_joined(parts))


def _block(captured: Captured) -> tuple[Block, int]:
    sequence, rows = np.array(captured.sequences, "<i8"), np.array(captured.rows, "<u4")
    described_bytes = 100 * (2 + len(captured.inputs) + len(captured.outputs))
    return Block(sequence, rows, captured.inputs, captured.outputs), captured.size_bytes + 12 * len(sequence) + described_bytes


def _key(captured: Captured) -> Hashable:
    tensors = (captured.inputs, captured.outputs)
    return (len(captured.inputs), *[(name, array.dtype, array.shape[1:]) for arrays in tensors for name, array in arrays.items()])


@dataclass(frozen=True, slots=True)
class Item:
    """A record on its way to the broker, with the requests whose rows it holds."""

    record: Record
    sequences: npt.NDArray[np.int64]
    counts: OutcomeCounts


class LogWriter:
    """Sends records to the broker in the order in which they come, and keeps them until it has acknowledged them.

    Parameters
    ----------
    written
        Called for each record that was acknowledged.
    failed
        Called for each attempt that failed.
    """

    def __init__(self, producer: Producer, written: Callable[[Item], None], failed: Callable[[], None], retry: Retry | None = None) -> None:
        self._producer = producer
        self._written = written
        self._failed = failed
        self._retry = retry or Retry(longest_s=5.0)
        self._queue: deque[Item] = deque()
        self._is_filled = asyncio.Event()
        self._is_drained = asyncio.Event()
        self._is_drained.set()
        self._is_failing = False
        self._sending_since_s = 0.0
        self.queued_bytes = 0

    def put(self, item: Item) -> None:
        """Have a record sent."""
        self._queue.append(item)
        self.queued_bytes += item.record.size_bytes
        self._is_filled.set()
        self._is_drained.clear()

    def is_away(self, now_s: float) -> bool:
        """Whether the broker does not take records now, on the monotonic clock."""
        return self._is_failing or (self._sending_since_s > 0 and now_s - self._sending_since_s > PATIENCE_S)

    async def run(self) -> None:
        """Send for ever."""
        attempt = 0
        while True:
            await self._is_filled.wait()
            if await self._send():
                attempt = 0
            else:
                attempt += 1
                await asyncio.sleep(self._retry.delay_s(attempt))

    async def drain(self) -> bool:
        """Wait until everything is written; False when the broker does not take it in time."""
        try:
            async with asyncio.timeout(_STOP_S):
                await self._is_drained.wait()
        except TimeoutError:
            return False
        return True

    async def _send(self) -> bool:
        items = self._next()
        self._sending_since_s = time.monotonic()
        try:
            await self._producer.send([item.record for item in items])
        except MillraceError as error:
            self._failed()
            if not self._is_failing:
                log.warning("the prediction log is not written: %s", error)
            self._is_failing = True
            return False
        finally:
            self._sending_since_s = 0.0
        if self._is_failing:
            log.info("the prediction log is written again")
        self._is_failing = False
        for item in items:
            self._queue.popleft()
            self.queued_bytes -= item.record.size_bytes
            self._written(item)
        if not self._queue:
            self._is_filled.clear()
            self._is_drained.set()
        return True

    def _next(self) -> list[Item]:
        items: list[Item] = []
        size_bytes = 0
        for item in self._queue:
            if items and size_bytes + item.record.size_bytes > _SEND_BYTES:
                break
            items.append(item)
            size_bytes += item.record.size_bytes
        return items
