"""Signatures as uploaders declare them: the inputs in the terms of the Open Inference Protocol, or the columns in MLflow's.

References
----------
MLflow, "Model Signatures": column specifications ``{"type", "name", "required"}``, in the file ``MLmodel`` as JSON text.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from libs.errors import InvalidArgumentError
from libs.inference.errors import printable
from schemas.inference import Datatype, DeclaredSignature

_MLFLOW = {
    "string": ("BYTES", "object"),
    "boolean": ("BOOL", "bool"),
    "integer": ("INT64", "int64"),
    "long": ("INT64", "int64"),
    "float": ("FP64", "float64"),
    "double": ("FP64", "float64"),
    "datetime": ("BYTES", "datetime64[ns]"),
}
"""MLflow's type -> datatype on the wire, and dtype of the column that the model is given."""

_DTYPES = {
    "object": "BYTES",
    "str": "BYTES",
    "string": "BYTES",
    "category": "BYTES",
    "datetime64[ns]": "BYTES",
    "bool": "BOOL",
    "boolean": "FP64",
    "int64": "INT64",
    "Int64": "FP64",
    "float32": "FP64",
    "float64": "FP64",
}
"""dtype of a column -> its datatype on the wire; nullable integers and booleans travel as floats, in which NaN is a missing value."""


_NULLABLE = {"bool": "boolean", "int64": "Int64"}
"""dtypes without a missing value -> those that have one."""


def read(document: Any) -> DeclaredSignature:
    """Read a declared signature: ``{"inputs": [...]}`` or the list alone; outputs, if there are any, are found in the trial.

    Each input is a tensor (``name``, ``datatype``, ``shape``), a column (``name``, ``dtype``, maybe ``categories`` and ``optional``) or a
    column in MLflow's terms (``name``, ``type``, maybe ``required``). A column of integers or booleans that is optional is a nullable one.

    Raises
    ------
    InvalidArgumentError
        It is something else; the message names the input.

    Examples
    --------
    >>> [column.datatype.value for column in read([{"name": "day", "type": "datetime"}, {"name": "n", "dtype": "Int64"}]).inputs]
    ['BYTES', 'FP64']
    """
    inputs = document.get("inputs") if isinstance(document, dict) else document
    if isinstance(inputs, str):
        try:
            inputs = json.loads(inputs)
        except ValueError as error:
            raise InvalidArgumentError("the signature's 'inputs' is text that is not JSON") from error
    if not isinstance(inputs, list) or not inputs or not all(isinstance(item, dict) for item in inputs):
        raise InvalidArgumentError("a signature is an object with a list 'inputs', or that list: an object for each input or column")
    specs = [_spec(item) for item in inputs]
    names = [spec["name"] for spec in specs]
    if len(set(names)) < len(names):
        raise InvalidArgumentError("the signature names an input twice")
    if len({"dtype" in spec for spec in specs}) > 1:
        raise InvalidArgumentError("the inputs of a signature are columns, or tensors, not some of each")
    try:
        return DeclaredSignature.model_validate({"inputs": specs})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidArgumentError(f"the signature's {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _spec(item: Mapping[str, Any]) -> dict[str, Any]:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError("each input of a signature needs a 'name'")
    shown = printable(name, 80)
    if "type" in item and "datatype" not in item and "dtype" not in item:
        datatype, dtype = _one_of(_MLFLOW, item["type"], f"type of column '{shown}'")
        optional = item.get("required", True) is False
        if optional and dtype in _NULLABLE:
            datatype, dtype = "FP64", _NULLABLE[dtype]
        return {"name": name, "datatype": datatype, "shape": (-1,), "dtype": dtype, "optional": optional}
    if "dtype" in item:
        dtype = item["dtype"]
        datatype = _one_of(_DTYPES, dtype, f"dtype of column '{shown}'")
        if item.get("optional") and dtype in _NULLABLE:
            datatype, dtype = "FP64", _NULLABLE[dtype]
        categories = item.get("categories")
        if dtype == "category" and categories and not all(isinstance(value, str) for value in categories):
            datatype = "FP64"
        return {
            "name": name,
            "datatype": datatype,
            "shape": (-1,),
            "dtype": dtype,
            "categories": categories,
            "optional": item.get("optional", False),
        }
    if item.get("datatype") not in list(Datatype):
        raise InvalidArgumentError(f"input '{shown}' of the signature needs a 'datatype', one of {', '.join(Datatype)}, or a 'dtype'")
    return {"name": name, "datatype": item["datatype"], "shape": item.get("shape")}


def _one_of(known: Mapping[str, Any], value: Any, what: str) -> Any:
    if not isinstance(value, str) or value not in known:
        raise InvalidArgumentError(f"the {what} is {printable(value, 40)!r}; it can be {', '.join(known)}")
    return known[value]
