"""The V1 form (TensorFlow Serving, KServe): ``{"instances": […]}`` in, ``{"predictions": […]}`` out.

Instances are rows, or objects keyed by feature name or by input name; ``inputs`` takes whole tensors or columns instead, as TensorFlow
Serving does. ``"outputs": ["predict_proba"]``, at the top or in ``parameters``, asks for other outputs than the first. Where a model has
several targets, and so the outputs ``predict_proba_0``, ``predict_proba_1`` …, that name stands for all of them.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import orjson

from libs.inference.bodies import object_or_empty, parse_object, requested_groups
from libs.inference.columns import assembled, check_complete, places, unknown_input
from libs.inference.errors import InvalidInputError, printable
from libs.inference.requests import Groups, InferRequest, InferResponse
from libs.inference.tensors import Array, array_from_json, check_shape, has_shape, json_ready, nested_shape, show
from schemas.inference import Signature, TensorSpec


def parse(body: bytes | bytearray | memoryview, signature: Signature) -> InferRequest:
    """Read a V1 body.

    Raises
    ------
    InvalidInputError
        The body is malformed or does not fit the signature.
    """
    return from_document(parse_object(body), signature)


def from_document(document: Mapping[str, Any], signature: Signature) -> InferRequest:
    """Read a V1 body that is parsed already.

    Raises
    ------
    InvalidInputError
        The body is malformed or does not fit the signature.
    """
    parameters: Mapping[str, Any] = {}
    outputs: tuple[str, ...] | None = None
    groups: Groups = ()
    if len(document) > 1:
        parameters = object_or_empty(document.get("parameters"), "parameters")
        outputs, groups = requested_groups(document.get("outputs", parameters.get("outputs")), signature)
    has_instances, has_inputs = "instances" in document, "inputs" in document
    if has_instances == has_inputs:
        raise InvalidInputError("the request needs exactly one of 'instances' and 'inputs'")
    inputs = _from_instances(document["instances"], signature) if has_instances else _from_columns(document["inputs"], signature)
    return InferRequest(inputs, outputs, groups, parameters=parameters)


def _from_instances(instances: Any, signature: Signature) -> dict[str, Array]:
    if type(instances) is not list or not instances:
        raise InvalidInputError("'instances' must be a non-empty list")
    spec = signature.inputs[0]
    first = instances[0]
    if type(first) is dict and not (spec.datatype == "BYTES" and list(first) == ["b64"]):
        return _from_objects(instances, signature)
    if len(signature.inputs) > 1 or (signature.is_table and type(first) is list):
        return _from_positions(instances, signature)
    return {spec.name: _rows(instances, spec, "instances")}


def _rows(values: list[Any], spec: TensorSpec, field: str) -> Array:
    """Return rows as an array; a wrong row is looked for only once something is wrong."""
    try:
        array = array_from_json(values, spec.datatype, spec.label, may_miss=spec.dtype is not None)
    except InvalidInputError:
        _explain_rows(values, spec, field)
        raise
    if array.ndim == len(spec.shape) - 1 and spec.shape[-1] == 1:
        array = array[..., None]
    if has_shape(array.shape, spec.shape) and array.size:
        return array
    _explain_rows(values, spec, field)
    return check_shape(array, spec)


def _explain_rows(values: list[Any], spec: TensorSpec, field: str) -> None:
    """Raise for the first row whose shape is not the signature's, if there is one."""
    wanted = spec.shape[1:]
    for index, row in enumerate(values):
        shape = nested_shape(row)
        if shape is None or not has_shape(shape, wanted):
            raise InvalidInputError(f"{spec.label} expects {_expected(spec)}; {field}[{index}] {_got(row, shape, wanted)}")


def _expected(spec: TensorSpec) -> str:
    elements = "strings" if spec.datatype == "BYTES" else "numbers"
    wanted = spec.shape[1:]
    if not wanted:
        return f"one of {elements} per row" if elements == "strings" else "one number per row"
    if len(wanted) > 1:
        return f"rows of shape {list(wanted)}"
    return f"rows of {elements}" if wanted[0] < 0 else f"rows of {wanted[0]} {elements}"


def _got(row: Any, shape: tuple[int, ...] | None, wanted: tuple[int, ...]) -> str:
    if shape is None:
        return "has parts of different lengths"
    if len(shape) == 1 and len(wanted) == 1:
        return f"has {shape[0]}"
    return f"has shape {list(shape)}" if len(shape) > 1 else f"is {show(row)}"


def _names(signature: Signature) -> str:
    return f"{signature.inputs[0].kind}s {', '.join(spec.name for spec in signature.inputs)}"


def _from_positions(instances: list[Any], signature: Signature) -> dict[str, Array]:
    """Rows as lists, for a model of several inputs: one value for each, in the signature's order or that of the whole training table."""
    first = instances[0]
    order = places(len(first), signature) if type(first) is list else None
    count = None if order is None else len(first)
    for index, row in enumerate(instances):
        if type(row) is not list or len(row) != count:
            got = f"has {len(row)} values" if isinstance(row, list) else f"is {show(row)}"
            raise InvalidInputError(f"each instance must be an object or a list with the {_names(signature)}; instances[{index}] {got}")
    return {
        spec.name: _rows([row[place] for row in instances], spec, f"'{spec.name}' of instances")
        for spec, place in zip(signature.inputs, order or (), strict=True)
    }


def _from_objects(instances: list[Any], signature: Signature) -> dict[str, Array]:
    if set(map(type, instances)) != {dict}:
        index, row = next((index, row) for index, row in enumerate(instances) if type(row) is not dict)
        raise InvalidInputError(f"instances[0] is an object, so instances[{index}] must be one too; it is {show(row)}")
    spec = signature.inputs[0]
    inputs = [each.name for each in signature.inputs]
    if signature.ignored_columns:
        ignored = set(signature.ignored_columns)
        instances = [{name: value for name, value in row.items() if name not in ignored} for row in instances]
    if signature.feature_names is not None and len(inputs) == 1 and not instances[0].keys() <= {spec.name}:
        return {spec.name: _rows(list(map(list, _members(instances, signature.feature_names, "column"))), spec, "instances")}
    optional = [each.name for each in signature.inputs if each.optional]
    if optional:
        absent = dict.fromkeys(optional)
        instances = [{**absent, **row} for row in instances]
    columns = zip(*_members(instances, inputs, spec.kind), strict=True)
    return {each.name: _rows(list(column), each, "instances") for each, column in zip(signature.inputs, columns, strict=True)}


def _members(instances: list[dict[str, Any]], names: Sequence[str], kind: str) -> list[tuple[Any, ...]]:
    """The members of objects that each must have these names and no other; ``kind`` is what they name."""
    try:
        members = [(row[names[0]],) for row in instances] if len(names) == 1 else list(map(itemgetter(*names), instances))
    except KeyError:
        members = []
    if not members or set(map(len, instances)) != {len(names)}:
        known = set(names)
        for index, row in enumerate(instances):
            _check_keys(row, known, f"instances[{index}]", kind)
    return members


def _check_keys(row: dict[str, Any], known: set[str], what: str, kind: str) -> None:
    if row.keys() == known:
        return
    missing, unknown = sorted(known - row.keys()), sorted(row.keys() - known)
    if missing:
        raise InvalidInputError(f"{what} lacks the {kind} '{missing[0]}'" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    raise InvalidInputError(f"{what} has the {kind} '{printable(unknown[0], 80)}', which the model does not know")


def _from_columns(columns: Any, signature: Signature) -> dict[str, Array]:
    if isinstance(columns, list) and columns and isinstance(columns[0], dict) and "datatype" in columns[0]:
        raise InvalidInputError("'inputs' is in the V2 form; send it to the model's /v2 route")
    if not isinstance(columns, dict):
        if signature.is_table and isinstance(columns, list) and columns and isinstance(columns[0], list):
            return _from_positions(columns, signature)
        if len(signature.inputs) > 1:
            raise InvalidInputError(f"'inputs' must be an object with the {_names(signature)}")
        columns = {signature.inputs[0].name: columns}
    if signature.ignored_columns:
        columns = {name: values for name, values in columns.items() if name not in signature.ignored_columns}
    known = {spec.name for spec in signature.inputs}
    unknown = columns.keys() - known
    if unknown and signature.feature_names is not None and len(known) == 1:
        return _from_features(columns, signature.feature_names, signature.inputs[0])
    if unknown:
        raise unknown_input(min(unknown), {spec.name: spec for spec in signature.inputs})
    arrays: dict[str, Array] = {}
    check_complete(columns, {spec.name: spec for spec in signature.inputs})
    if not columns:
        raise InvalidInputError("'inputs' has no columns")
    for spec in signature.inputs:
        if spec.name not in columns:
            continue
        if not isinstance(columns[spec.name], list):
            raise InvalidInputError(f"{spec.label} must be a list, got {show(columns[spec.name])}")
        arrays[spec.name] = _rows(columns[spec.name], spec, spec.name)
    return assembled(arrays, signature)


def _from_features(columns: dict[str, Any], names: tuple[str, ...], spec: TensorSpec) -> dict[str, Array]:
    """Columns by feature name, each with one value for each row."""
    _check_keys(columns, set(names), "'inputs'", "column")
    length = None
    for name in names:
        column = columns[name]
        if not isinstance(column, list):
            raise InvalidInputError(f"column '{name}' of 'inputs' must be a list, got {show(column)}")
        if length not in (None, len(column)):
            raise InvalidInputError(f"column '{name}' of 'inputs' has {len(column)} values, the columns before it have {length}")
        length = len(column)
    if not length:
        raise InvalidInputError("the columns of 'inputs' are empty")
    return {spec.name: _rows([list(row) for row in zip(*(columns[name] for name in names), strict=True)], spec, "row ")}


def render(response: InferResponse, groups: Groups = ()) -> bytes:
    """Write ``{"predictions": rows}``: rows of the one output, or an object by output name for each row.

    Outputs of different lengths cannot be put into rows; they are given whole, as ``{"predictions": {name: tensor}}``.
    ``groups`` are those of the request: a row of a group is the list of its outputs' rows.
    """
    return orjson.dumps({"predictions": predictions(response, groups)}, option=orjson.OPT_SERIALIZE_NUMPY)


def predictions(response: InferResponse, groups: Groups = ()) -> Any:
    """Return the ``predictions`` member: a value that orjson writes with ``OPT_SERIALIZE_NUMPY``."""
    outputs = {name: json_ready(array) for name, array in response.outputs.items()}
    if len(outputs) == 1 and not groups:
        return next(iter(outputs.values()))
    if len({array.shape[:1] for array in response.outputs.values()}) != 1 or any(a.ndim == 0 for a in response.outputs.values()):
        return outputs
    if groups:
        outputs = {name: outputs[name] if members == (name,) else _beside(outputs, members) for name, members in groups}
        if len(outputs) == 1:
            return next(iter(outputs.values()))
    return [dict(zip(outputs, row, strict=True)) for row in zip(*map(_iterate, outputs.values()), strict=True)]


def _beside(outputs: Mapping[str, Any], members: Sequence[str]) -> Any:
    """For each row the list of these outputs' rows."""
    arrays = [outputs[name] for name in members]
    if all(isinstance(array, np.ndarray) for array in arrays) and len({(array.dtype, array.shape) for array in arrays}) == 1:
        return np.stack(arrays, axis=1)
    return [list(row) for row in zip(*map(_iterate, arrays), strict=True)]


def _iterate(values: Any) -> Any:
    return values if isinstance(values, list) else values.tolist()
