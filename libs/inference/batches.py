"""Requests joined into one batch and its answer taken apart again; pure functions on arrays.

Only requests of one deployment are joined, so datatypes agree; what must agree besides is the shape of a row and the outputs asked for.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from libs.inference.requests import InferRequest
from libs.inference.tensors import Array
from libs.runner.wire import Arrays, Rows
from schemas.inference import Signature

_COPIED_BYTES = 65_536
"""Inputs up to this size are copied into one array; larger ones are written to the runner one behind the other."""


class UnevenBatchError(ValueError):
    """The answer does not have one row for each row asked: the model does not treat rows independently."""


def is_batchable(signature: Signature) -> bool:
    """Tell whether requests may be joined: every input and output has a first dimension of any size, the rows, and rows are independent."""
    return signature.batchable and all(spec.shape[:1] == (-1,) for spec in (*signature.inputs, *signature.outputs))


def row_count(request: InferRequest) -> int | None:
    """Return how many rows a request has; ``None`` when its inputs do not agree on it."""
    counts = {array.shape[0] if array.ndim else None for array in request.inputs.values()}
    return counts.pop() if len(counts) == 1 else None


def batch_key(request: InferRequest) -> Hashable:
    """Return what two requests to one deployment must have in common to share a batch.

    Examples
    --------
    >>> one = InferRequest({"x": np.zeros((1, 4))})
    >>> batch_key(one) == batch_key(InferRequest({"x": np.zeros((9, 4))}))
    True
    >>> batch_key(one) == batch_key(InferRequest({"x": np.zeros((1, 5))}))
    False
    """
    inputs = request.inputs
    if len(inputs) == 1:
        ((name, array),) = inputs.items()
        return (request.outputs, name, array.shape[1:])
    return (request.outputs, *sorted((name, array.shape[1:]) for name, array in inputs.items()))


def join(requests: Sequence[InferRequest]) -> dict[str, Rows]:
    """Return the inputs of requests with one key, row after row; those of a single request, and large ones, as they are."""
    first = requests[0].inputs
    if len(requests) == 1:
        return dict(first)
    return {name: _joined([request.inputs[name] for request in requests]) for name in first}


def _joined(arrays: list[Array]) -> Rows:
    is_large = arrays[0].dtype.kind != "O" and sum(array.nbytes for array in arrays) > _COPIED_BYTES
    return arrays if is_large else np.concatenate(arrays)


def whole(inputs: Mapping[str, Rows]) -> Arrays:
    """Return the inputs of a batch as one array each."""
    return {name: np.concatenate(rows) if isinstance(rows, list) else rows for name, rows in inputs.items()}


def split(outputs: Arrays, counts: Sequence[int]) -> list[Arrays]:
    """Return the outputs of each request, as views, given how many rows each had.

    Raises
    ------
    UnevenBatchError
        An output has more or fewer rows than were asked.

    Examples
    --------
    >>> [part["y"].tolist() for part in split({"y": np.arange(3)}, [1, 2])]
    [[0], [1, 2]]
    """
    total = sum(counts)
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != total:
            raise UnevenBatchError(f"output '{name}' has shape {list(array.shape)} for {total} rows")
    parts: list[Arrays] = []
    begin = 0
    for count in counts:
        end = begin + count
        parts.append({name: array[begin:end] for name, array in outputs.items()})
        begin = end
    return parts


def piece(inputs: Arrays, begin: int, rows: int) -> Arrays:
    """Return some rows of a request, as views."""
    return {name: array[begin : begin + rows] for name, array in inputs.items()}


def concatenated(answers: Sequence[Arrays], counts: Sequence[int]) -> Arrays:
    """Return the outputs of a request that was asked piece by piece, given how many rows each piece had.

    Raises
    ------
    UnevenBatchError
        A piece's answer does not have its rows, or differs in kind from the others.

    Examples
    --------
    >>> concatenated([{"y": np.arange(2)}, {"y": np.arange(1)}], [2, 1])["y"].tolist()
    [0, 1, 0]
    """
    first = answers[0]
    for outputs, count in zip(answers, counts, strict=True):
        split(outputs, [count])
        if [(name, array.shape[1:]) for name, array in outputs.items()] != [(name, array.shape[1:]) for name, array in first.items()]:
            raise UnevenBatchError("the answers to the pieces of a request have different outputs or shapes")
    return {name: np.concatenate([outputs[name] for outputs in answers]) for name in first}
