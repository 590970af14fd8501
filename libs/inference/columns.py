"""Named columns: which inputs the names of a request stand for.

A model on a table has one input for each column. A model on numbers that was trained with names has one matrix, and takes its columns by
name as well.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import numpy as np

from libs.inference.errors import InvalidInputError, printable
from libs.inference.tensors import Array, convert
from libs.runner.wire import NUMPY_DTYPES
from schemas.inference import Datatype, Signature, TensorSpec

NULLABLE = ("boolean", "Int64")
"""dtypes of columns that travel as floats, in which NaN is a missing value."""

EXACT = 2**53
"""From here on a float stands for more than one integer."""


@lru_cache(maxsize=256)
def _feature_specs(names: tuple[str, ...], datatype: Datatype) -> Mapping[str, TensorSpec]:
    dtype = NUMPY_DTYPES[datatype].name
    return {name: TensorSpec(name=name, datatype=datatype, shape=(-1,), dtype=dtype) for name in names}


def specs_for(names: Sequence[str], signature: Signature) -> Mapping[str, TensorSpec]:
    """The inputs that a request with these names gives, by name: the signature's own, the columns of its matrix, or its only input.

    A table that has no texts may be given as one matrix, too.

    Examples
    --------
    >>> matrix = TensorSpec(name="input", datatype=Datatype.FP64, shape=(-1, 2))
    >>> signature = Signature(inputs=(matrix,), outputs=(matrix,), feature_names=("a", "b"))
    >>> list(specs_for(["b", "a"], signature)), specs_for(["input-0"], signature)["input-0"].name
    (['a', 'b'], 'input')
    """
    specs = {spec.name: spec for spec in signature.inputs}
    if signature.is_table and len(specs) > 1 and len(names) == 1 and names[0] not in specs and names[0] not in signature.ignored_columns:
        if all(spec.datatype != Datatype.BYTES for spec in signature.inputs):
            return {names[0]: TensorSpec(name=names[0], datatype=Datatype.FP64, shape=(-1, -1))}
        return specs
    if len(specs) > 1 or specs.keys() >= set(names):
        return specs
    (spec,) = signature.inputs
    features = signature.feature_names
    if features is not None and len(spec.shape) == 2 and not set(features).isdisjoint(names):
        return _feature_specs(features, spec.datatype)
    return dict.fromkeys(names, spec) if len(names) == 1 else specs


def assembled(arrays: dict[str, Array], signature: Signature) -> dict[str, Array]:
    """The signature's inputs, from arrays by the names of ``specs_for``, all of which are there but for optional columns.

    Raises
    ------
    InvalidInputError
        Columns differ in how many rows they have.
    """
    if signature.is_table:
        if len(arrays) == 1:
            ((name, array),) = arrays.items()
            if array.ndim == 2:
                return _columns_of(array, name, signature)
        _check_rows(arrays)
        return arrays if len(arrays) == len(signature.inputs) else completed(arrays, signature)
    own = [spec.name for spec in signature.inputs]
    if len(arrays) == len(own) and own[0] in arrays:
        return arrays
    features = signature.feature_names or ()
    if arrays.keys() == set(features):
        _check_rows(arrays)
        return {own[0]: np.stack([arrays[name] for name in features], axis=1)}
    (only,) = arrays.values()
    return {own[0]: only}


def _columns_of(array: Array, name: str, signature: Signature) -> dict[str, Array]:
    order = places(array.shape[1], signature)
    if order is None:
        raise InvalidInputError(f"input '{name}' has {array.shape[1]} columns; {_wanted(signature)}")
    placed = list(zip(signature.inputs, order, strict=True))
    for spec, place in placed:
        if spec.datatype == Datatype.INT64 and np.abs(array[:, place]).max(initial=0) >= EXACT:
            raise InvalidInputError(
                f"column '{spec.name}' has integers that a matrix of floats does not keep: send a tensor for each column"
            )
    return {
        spec.name: convert(array[:, place], NUMPY_DTYPES[spec.datatype], spec.datatype.value, f"column '{spec.name}'")
        for spec, place in placed
    }


def places(width: int, signature: Signature) -> Sequence[int] | None:
    """Where the inputs stand among so many columns without names: in their own order, or in that of the whole training table.

    None: there are neither so many inputs nor so many columns of the training table.
    """
    if width == len(signature.inputs):
        return range(width)
    if not width or width != len(signature.training_columns):
        return None
    found = {name: place for place, name in enumerate(signature.training_columns)}
    return [found[spec.name] for spec in signature.inputs]


def _wanted(signature: Signature) -> str:
    whole = signature.training_columns
    return f"the model takes {len(signature.inputs)}" + (f", or the {len(whole)} of its training table" if whole else "")


def completed(arrays: dict[str, Array], signature: Signature) -> dict[str, Array]:
    """The columns of a table, those that the request has left out being all missing values."""
    rows = len(next(iter(arrays.values())))
    return {spec.name: arrays[spec.name] if spec.name in arrays else _missing(spec, rows) for spec in signature.inputs}


def _missing(spec: TensorSpec, rows: int) -> Array:
    return np.full(rows, None if spec.datatype == "BYTES" else np.nan, NUMPY_DTYPES[spec.datatype])


def check_complete(given: Collection[str], specs: Mapping[str, TensorSpec]) -> None:
    """Raise ``InvalidInputError`` for the first input that is not given, and is not optional."""
    for name, spec in specs.items():
        if name not in given and not spec.optional:
            raise InvalidInputError(f"{spec.label} is missing")


def unknown_input(name: str, specs: Mapping[str, TensorSpec]) -> InvalidInputError:
    """The error of a request that has an input, or a column, which the model does not know."""
    kind = next(iter(specs.values())).kind
    return InvalidInputError(f"the model has no {kind} '{printable(name, 80)}'; it has {', '.join(specs)}")


def _check_rows(arrays: Mapping[str, Array]) -> None:
    first, *others = arrays.items()
    for name, array in others:
        if len(array) != len(first[1]):
            raise InvalidInputError(f"column '{name}' has {len(array)} values, column '{first[0]}' has {len(first[1])}")
