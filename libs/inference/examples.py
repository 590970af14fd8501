"""Examples: request bodies that a version was uploaded with, in any form that the protocols take.

A CSV file travels as ``{"csv": text}``, because an example is a JSON object inside an event.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from libs.inference import tabular, v1, v2
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferRequest
from schemas.inference import Datatype, DeclaredSignature, Signature, TensorSpec

FORMS = ("instances", "inputs", "dataframe_split", "dataframe_records", "csv")
"""Members of which an example has exactly one."""

_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan", re.IGNORECASE)
_KINDS = {"BYTES": "text", "BOOL": "boolean"}
_DATATYPES = {"text": (Datatype.BYTES, "object"), "boolean": (Datatype.BOOL, "bool"), "number": (Datatype.FP64, "float64")}


def read(example: Mapping[str, Any], signature: Signature) -> InferRequest:
    """Read an example as the protocol of its form reads it.

    Raises
    ------
    InvalidInputError
        It is malformed or does not fit the signature.
    """
    if "csv" in example:
        if not isinstance(example["csv"], str):
            raise InvalidInputError("'csv' must be the text of a CSV file")
        return tabular.parse_csv(example["csv"].encode("utf-8", "surrogatepass"), signature)
    if is_v2(example):
        return v2.from_document(example, signature)
    if "dataframe_split" in example or "dataframe_records" in example:
        return tabular.from_document(example, signature)
    return v1.from_document(example, signature)


def is_v2(example: Mapping[str, Any]) -> bool:
    """Whether an example is a body of the Open Inference Protocol."""
    inputs = example.get("inputs")
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], dict) and "datatype" in inputs[0]


def column_kinds(example: Mapping[str, Any]) -> dict[str, str] | None:
    """``text``, ``boolean`` or ``number`` for each named column whose values tell; None: the example has no named columns.

    Examples
    --------
    >>> column_kinds({"instances": [{"age": None, "city": "Paris"}, {"age": 29, "city": "Lyon"}]})
    {'age': 'number', 'city': 'text'}
    >>> column_kinds({"csv": "plan,score,zip\\nfree,1.5,00501\\n"})
    {'plan': 'text', 'score': 'number', 'zip': 'text'}
    >>> column_kinds({"instances": [[1, 2]]}) is None
    True
    """
    if is_v2(example):
        tensors = [tensor for tensor in example["inputs"] if isinstance(tensor, dict)]
        return {str(tensor.get("name")): _KINDS.get(str(tensor.get("datatype")), "number") for tensor in tensors}
    columns = _columns(example)
    if not columns:
        return None
    kinds = {name: _kind(values) for name, values in columns.items()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def shown_columns(example: Mapping[str, Any]) -> DeclaredSignature | None:
    """The columns whose kinds an example shows, as a declared signature; None unless one of them is text."""
    kinds = column_kinds(example)
    if kinds is None or "text" not in kinds.values():
        return None
    columns = [TensorSpec(name=name, datatype=_DATATYPES[kind][0], shape=(-1,), dtype=_DATATYPES[kind][1]) for name, kind in kinds.items()]
    return DeclaredSignature(inputs=tuple(columns))


def _columns(example: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Values by the name of the column; empty when columns have no names, or the example is malformed."""
    if isinstance(example.get("csv"), str):
        return _csv_columns(example["csv"])
    split = example.get("dataframe_split")
    if isinstance(split, dict):
        return _by_position(split.get("columns"), split.get("data"))
    if isinstance(example.get("inputs"), dict):
        return {str(name): values for name, values in example["inputs"].items() if isinstance(values, list)}
    rows = example.get("dataframe_records", example.get("instances"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return {}
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _by_position(names: Any, rows: Any) -> dict[str, list[Any]]:
    if not isinstance(names, list) or not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return {}
    return {str(name): [row[place] for row in rows if place < len(row)] for place, name in enumerate(names)}


def _csv_columns(text: str) -> dict[str, list[Any]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True) if row]
    except csv.Error:
        return {}
    if len(rows) < 2 or any(_NUMBER.fullmatch(cell.strip()) for cell in rows[0]):
        return {}
    return _by_position([name.strip() for name in rows[0]], [[_cell(cell) for cell in row] for row in rows[1:]])


def _cell(cell: str) -> Any:
    """A cell as the JSON value that it would be; text that only looks like a number, such as ``00501``, is text."""
    stripped = cell.strip()
    if not stripped:
        return None
    if stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    return 0.0 if _NUMBER.fullmatch(stripped) else cell


def _kind(values: Iterable[Any]) -> str | None:
    """The kind of the values that are there; None when they disagree, or there are none."""
    kinds = {_kind_of(value) for value in values if value is not None}
    return kinds.pop() if len(kinds) == 1 else None


def _kind_of(value: Any) -> str | None:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else None
