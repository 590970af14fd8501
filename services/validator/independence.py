"""Whether a model treats rows independently: only then may requests of different callers be joined, and large ones cut.

The same rows are asked together, twice, in another order, and some of them alone. Text, integers and booleans must agree exactly, floats
within ``RELATIVE`` of the largest value of the output, or within the difference between the two equal requests: numeric libraries may
round the last bits of differently shaped batches differently. At last one of the rows loses its values: a model that fills in what is
missing from the rows beside it treats rows independently as long as nothing is missing.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping

import numpy as np

from libs.inference.errors import InvalidInputError, ModelError
from libs.inference.tensors import Array
from libs.runner.wire import NUMPY_DTYPES, Arrays
from schemas.inference import Signature, TensorSpec

MAX_ROWS = 64
"""Rows of an example that are looked at."""

MAX_PREDICTIONS = 5
"""Of one set of rows; there are two sets at most, the example's and made-up ones, and two more predictions for a missing row."""

RELATIVE: Mapping[int, float] = {8: 1e-9, 4: 1e-5, 2: 1e-2}
"""Bytes of a float -> difference that is no difference, as a share of the largest value."""

_SIZES = (5, 7, 11, 13)

Ask = Callable[[Arrays], Awaitable[Arrays]]


async def find_dependence(ask: Ask, inputs: Arrays) -> str | None:
    """Why rows are not independent, as far as these rows show it; None: they are.

    Raises
    ------
    InvalidInputError, ModelError
        The model refuses the rows together and alone, which says nothing about independence.
    """
    count = len(next(iter(inputs.values())))
    alone = sorted({(count - 1) // 2, count - 1})[: MAX_PREDICTIONS - 3]
    try:
        together = await ask(inputs)
    except (InvalidInputError, ModelError) as error:
        await ask(_rows(inputs, slice(0, 1)))
        return f"one row is answered, {count} together are not: {error}"
    if any(array.ndim == 0 or array.shape[0] != count for array in together.values()):
        return f"{count} rows are not answered with as many"
    again = await ask(inputs)
    for name, array in together.items():
        if not agrees(array, again[name]):
            return f"output '{name}' differs when the same rows are asked again"
    spreads = {name: _spread(array, again[name]) for name, array in together.items()}
    backwards = await ask(_rows(inputs, slice(None, None, -1)))
    for name, array in together.items():
        if not agrees(array[::-1], backwards[name], spreads[name]):
            return f"output '{name}' of a row differs when the rows come in another order"
    for row in alone:
        try:
            single = await ask(_rows(inputs, slice(row, row + 1)))
        except (InvalidInputError, ModelError) as error:
            return f"{count} rows are answered together, and one of them alone is not: {error}"
        for name, array in together.items():
            if not agrees(array[row : row + 1], single[name], spreads[name], scale=_largest(array)):
                return f"output '{name}' of a row differs when it is asked alone"
    return None


async def find_dependence_of_missing(ask: Ask, inputs: Arrays, row: int) -> str | None:
    """Why the answer to a row whose values are missing depends on the other rows; None: it does not.

    Raises
    ------
    InvalidInputError, ModelError
        The model takes no missing values.
    """
    together = await ask(inputs)
    try:
        single = await ask(_rows(inputs, slice(row, row + 1)))
    except (InvalidInputError, ModelError) as error:
        return f"a row with missing values is answered beside others, and alone it is not: {error}"
    for name, array in together.items():
        if not agrees(array[row : row + 1], single[name], scale=_largest(array)):
            return f"output '{name}' of a row with missing values differs when it is asked alone"
    return None


def agrees(one: Array, other: Array, spread: float = 0.0, scale: float | None = None) -> bool:
    """Whether two answers are the same but for rounding; NaN equals NaN, and so do equal infinities.

    Examples
    --------
    >>> agrees(np.array([1.0, np.nan]), np.array([1.0 + 1e-12, np.nan])), agrees(np.array([1.0]), np.array([1.1]))
    (True, False)
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return bool((one == other).all())
    relative = RELATIVE.get(one.dtype.itemsize, RELATIVE[4])
    allowed = max(relative * (_largest(one) if scale is None else scale), spread)
    one, other = one.astype(np.float64), other.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        return bool((same | (np.abs(one - other) <= allowed)).all())


def _largest(array: Array) -> float:
    if array.dtype.kind != "f":
        return 0.0
    finite = array[np.isfinite(array)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def _spread(one: Array, other: Array) -> float:
    if one.dtype.kind != "f":
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    finite = difference[np.isfinite(difference)]
    return float(finite.max()) if finite.size else 0.0


def _rows(inputs: Arrays, rows: slice) -> Arrays:
    return {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}


def first_rows(inputs: Arrays) -> Arrays | None:
    """The first rows of a request that has several; None if it has one, or its inputs do not agree on how many."""
    counts = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
    if len(counts) != 1 or counts.pop() < 2:
        return None
    return _rows(inputs, slice(0, MAX_ROWS))


def varied(inputs: Arrays) -> Arrays | None:
    """Rows like the single row of a request, with other numbers in each; None if it has no row, or no numbers."""
    if any(array.ndim == 0 or array.shape[0] != 1 for array in inputs.values()):
        return None
    if not any(array.dtype.kind == "f" for array in inputs.values()):
        return None
    factors = np.linspace(1.0, 1.4, _SIZES[0])
    rows = {}
    for name, array in inputs.items():
        copies = np.repeat(array, len(factors), axis=0)
        if array.dtype.kind == "f":
            copies = (copies * factors.reshape(-1, *[1] * (array.ndim - 1))).astype(array.dtype)
        rows[name] = copies
    return rows


def with_missing(inputs: Arrays, nullable: Collection[str] = ()) -> tuple[Arrays, int] | None:
    """The rows with all floats of one of them missing, and which one that is; of rows without floats, the texts of ``nullable`` inputs.

    None: nothing can be missing.
    """
    floats = {name for name, array in inputs.items() if array.dtype.kind == "f"}
    emptied = floats or {name for name in nullable if inputs[name].dtype.kind == "O"}
    if not emptied:
        return None
    row = len(next(iter(inputs.values()))) // 2
    rows = {name: array.copy() if name in emptied else array for name, array in inputs.items()}
    for name in emptied:
        rows[name][row] = np.nan if name in floats else None
    return rows, row


def made_up_rows(signature: Signature) -> Arrays:
    """Rows that differ from one another in every input; as many as no other dimension of the signature has."""
    sizes = {size for spec in (*signature.inputs, *signature.outputs) for size in spec.shape[1:]}
    count = next((size for size in _SIZES if size not in sizes), _SIZES[0])
    chance = np.random.default_rng(0)
    return {spec.name: _made_up(spec, count, chance) for spec in signature.inputs}


def _made_up(spec: TensorSpec, count: int, chance: np.random.Generator) -> Array:
    shape = (count, *(1 if size < 0 else size for size in spec.shape[1:]))
    if spec.datatype == "BYTES":
        array = np.empty(shape, dtype=object)
        array.reshape(-1)[:] = [f"text {number}".encode() for number in range(array.size)]
        return array
    dtype = NUMPY_DTYPES[spec.datatype]
    if dtype.kind == "f":
        return chance.normal(1.0, 2.0, shape).astype(dtype)
    if dtype.kind == "b":
        booleans: Array = (np.arange(np.prod(shape)) % 2 == 0).reshape(shape)
        return booleans
    return chance.integers(0, 9, shape).astype(dtype)


async def judge(ask: Ask, sets: list[Arrays], nullable: Collection[str] = ()) -> str | None:
    """The first reason that any set of rows gives; sets that the model refuses say nothing.

    ``nullable`` are the inputs whose texts may be missing.
    """
    answered: Arrays | None = None
    for inputs in sets:
        try:
            reason = await find_dependence(ask, inputs)
        except (InvalidInputError, ModelError):
            continue
        if reason is not None:
            return reason
        answered = answered or inputs
    emptied = None if answered is None else with_missing(answered, nullable)
    if emptied is None:
        return None
    try:
        return await find_dependence_of_missing(ask, *emptied)
    except (InvalidInputError, ModelError):
        return None
