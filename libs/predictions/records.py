"""Records of the prediction log: requests in columns, and inputs and outputs as raw tensors.

``schemas.predictions`` says what they hold. A record's value is a JSON head and then the bytes of its tensors, as in the binary extension
of the Open Inference Protocol; its header ``inference-header-content-length`` says where the head ends. Beyond that extension, a text that
is missing in a column has the length 0xFFFFFFFF and no bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import ValidationError

from libs.errors import InvalidMessage
from libs.messaging.cloudevents import read_envelope
from libs.messaging.records import Record
from libs.runner.wire import Arrays, Buffer, WireError, decode_tensor, encode_tensor
from schemas.predictions import LoggedTensor, OutcomeCounts, PredictionsLogged, RequestsCounted
from schemas.topics import PREDICTIONS

SOURCE = "/millrace/gateway"
HEAD_LENGTH = "inference-header-content-length"

OUTCOMES = ("completed", "failed", "expired")
"""How a request ends, in the order of ``OutcomeCounts``."""

COLUMNS: Mapping[str, np.dtype[Any]] = {
    "sequence": np.dtype("<i8"),
    "outcome": np.dtype("u1"),
    "error": np.dtype("u1"),
    "status": np.dtype("<u2"),
    "protocol": np.dtype("u1"),
    "principal": np.dtype("<u2"),
    "accepted_at": np.dtype("<f8"),
    "latency_s": np.dtype("<f4"),
    "queue_s": np.dtype("<f4"),
    "model_s": np.dtype("<f4"),
    "rows": np.dtype("<u4"),
    "request_bytes": np.dtype("<u4"),
    "response_bytes": np.dtype("<u4"),
    "attempts": np.dtype("u1"),
}
"""Name and type of each column."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Block:
    """Inputs and outputs of some requests, row after row: request ``i`` is ``sequence[i]`` and has the next ``rows[i]`` rows."""

    sequence: Array
    rows: Array
    inputs: Arrays
    outputs: Arrays

    def requests(self) -> Iterator[tuple[int, Arrays, Arrays]]:
        """Each request's sequence number, inputs and outputs; a request that is alone in its block has the arrays as they are."""
        if len(self.sequence) == 1:
            yield int(self.sequence[0]), self.inputs, self.outputs
            return
        begin = 0
        for sequence, count in zip(self.sequence.tolist(), self.rows.tolist(), strict=True):
            end = begin + count
            yield sequence, _cut(self.inputs, begin, end), _cut(self.outputs, begin, end)
            begin = end


@dataclass(frozen=True, slots=True)
class PredictionBatch:
    """One record, read: the head, its columns by name, and its blocks."""

    head: PredictionsLogged
    columns: Arrays
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.head.request_ids)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each request as a dictionary of plain values; places are replaced by the words they stand for."""
        head = self.head
        words = {"outcome": head.outcomes, "error": head.errors, "protocol": head.protocols, "principal": head.principals}
        values = [[words[name][place] for place in column.tolist()] if name in words else column.tolist() for name, column in self._named()]
        names = [name for name, _ in self._named()]
        for request_id, *row in zip(head.request_ids, *values, strict=True):
            yield {"request_id": request_id, **dict(zip(names, row, strict=True))}

    def _named(self) -> list[tuple[str, Array]]:
        return list(self.columns.items())


def write(head: Mapping[str, Any], columns: Arrays, blocks: Iterable[Block], now: datetime) -> Record:
    """A record; ``head`` has what ``PredictionsLogged`` has beside ``columns`` and ``payload``."""
    parts: list[Buffer] = []
    described = _encode(columns, parts)
    payload = [
        {
            "requests": _encode({"sequence": block.sequence, "rows": block.rows}, parts),
            "inputs": _encode(block.inputs, parts),
            "outputs": _encode(block.outputs, parts),
        }
        for block in blocks
    ]
    front = orjson.dumps({**head, "columns": described, "payload": payload})
    endpoint_name = str(head["endpoint_name"])
    headers = (
        ("content-type", PredictionsLogged.content_type.encode()),
        (HEAD_LENGTH, b"%d" % len(front)),
        *_attributes(f"{head['instance']}-{head['record']}", PredictionsLogged.event_type, endpoint_name, now),
    )
    return Record(PREDICTIONS.name, endpoint_name.encode(), b"".join((front, *parts)), headers)


def write_count(counted: RequestsCounted, number: int, now: datetime) -> Record:
    """The record of what an instance has counted; ``number`` tells it from the instance's others."""
    headers = (
        ("content-type", counted.content_type.encode()),
        *_attributes(f"{counted.instance}-{counted.state}-{number}", counted.event_type, counted.instance, now),
    )
    return Record(PREDICTIONS.name, counted.instance.encode(), counted.model_dump_json().encode(), headers)


def read(record: Record) -> PredictionBatch | RequestsCounted | None:
    """What a record of the topic says; None when it is of a type that is not known here.

    Raises
    ------
    InvalidMessage
        When it is not what its headers say.
    """
    envelope = read_envelope(record)
    try:
        if envelope.type == RequestsCounted.event_type:
            return RequestsCounted.model_validate_json(envelope.data)
        if envelope.type == PredictionsLogged.event_type:
            return _read_batch(record, envelope.data)
    except (ValidationError, WireError, ValueError) as error:
        raise InvalidMessage(f"{record.topic}-{record.partition} offset {record.offset} is not {envelope.type}: {error}") from error
    return None


def is_of(record: Record, instance: str) -> bool:
    """Whether an instance wrote a record; looks at nothing but its id."""
    return (record.header("ce_id") or "").startswith(f"{instance}-")


def _read_batch(record: Record, value: bytes) -> PredictionBatch:
    length = int(record.header(HEAD_LENGTH) or "")
    head = PredictionsLogged.model_validate_json(value[:length])
    tail = _Tail(memoryview(value)[length:])
    columns = tail.take(head.columns)
    blocks = []
    for block in head.payload:
        requests = tail.take(block.requests)
        blocks.append(Block(requests["sequence"], requests["rows"], tail.take(block.inputs), tail.take(block.outputs)))
    tail.end()
    if any(len(column) != len(head.request_ids) for column in columns.values()):
        raise WireError(f"its columns do not have the {len(head.request_ids)} rows of its request ids")
    return PredictionBatch(head, columns, tuple(blocks))


def counts_of(outcomes: Array) -> OutcomeCounts:
    """How many of each outcome there are in a column ``outcome``."""
    return OutcomeCounts(**dict(zip(OUTCOMES, np.bincount(outcomes, minlength=3).tolist(), strict=True)))


class _Tail:
    """Cuts tensors off the bytes behind a head, one after the other."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def take(self, tensors: Sequence[LoggedTensor]) -> Arrays:
        arrays: Arrays = {}
        for tensor in tensors:
            size = tensor.parameters.binary_data_size
            if size > len(self._view):
                raise WireError(f"tensor '{tensor.name}' announces {size} bytes but only {len(self._view)} are left")
            arrays[tensor.name] = decode_tensor(tensor.name, tensor.datatype.value, tensor.shape, self._view[:size], may_miss=True)
            self._view = self._view[size:]
        return arrays

    def end(self) -> None:
        if self._view:
            raise WireError(f"{len(self._view)} bytes follow the last tensor")


def _encode(arrays: Arrays, parts: list[Buffer]) -> list[dict[str, Any]]:
    descriptions = []
    for name, array in arrays.items():
        description, data = encode_tensor(name, array, may_miss=True)
        descriptions.append(description)
        parts.append(data)
    return descriptions


def _attributes(event_id: str, event_type: str, subject: str, now: datetime) -> tuple[tuple[str, bytes], ...]:
    values = {
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_type": event_type,
        "ce_source": SOURCE,
        "ce_time": now.isoformat().replace("+00:00", "Z"),
        "ce_subject": subject,
        "ce_correlationid": event_id,
    }
    return tuple((name, value.encode()) for name, value in values.items())


def _cut(arrays: Arrays, begin: int, end: int) -> Arrays:
    return {name: array[begin:end] for name, array in arrays.items()}
