"""Tables: request bodies in CSV, in NumPy's ``.npy`` form and as MLflow's data frames; answers in CSV and ``.npy``.

Columns with names are put into the order of the signature's ``feature_names``; a single column feeds a single input of one dimension,
columns named like the inputs feed a model of several. Where the model knows no names, columns are taken in the order they come in.

References
----------
RFC 4180 (CSV); NumPy Enhancement Proposal 1 (``.npy``); MLflow, "Local Inference Server Specification".
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson

from libs.errors import PayloadTooLargeError
from libs.inference import v1
from libs.inference.bodies import check_size, object_or_empty, parse_bounded, requested_groups
from libs.inference.columns import EXACT, completed, places
from libs.inference.errors import InvalidInputError, printable
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.tensors import Array, array_from_json, check_shape, convert, show
from libs.runner.wire import NUMPY_DTYPES, Arrays
from schemas.inference import Signature, TensorSpec

MAX_CELLS = 1_000_000
"""A cell costs up to 100 bytes of memory and a microsecond on the way to a number; larger tables belong in binary form."""

MAX_LENIENT_BYTES = 8 * 2**20
"""JSON with ``NaN`` or ``Infinity`` in it takes five times as long to read as without, 50 ms a MiB; nobody is answered meanwhile."""

NPY_MAGIC = b"\x93NUMPY"

_MAX_NPY_HEADER_BYTES = 10_000
_MAX_DIMENSIONS = 8
_NUMBER = re.compile(r"\s*[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf(?:inity)?)\s*", re.IGNORECASE)
_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,40}\s*")
_BOOLEANS = {"true": 1, "false": 0, "1": 1, "0": 0}
_WORDS = {"true": 1.0, "false": 0.0, "": math.nan}
"""Cells of a column of floats that are no numbers: booleans as pandas writes them, and missing values."""

_FORMS = ("instances", "inputs", "dataframe_split", "dataframe_records")


def parse_json(body: bytes | bytearray | memoryview, signature: Signature) -> InferRequest:
    """Read a body in one of MLflow's JSON forms.

    It has exactly one of ``instances``, ``inputs``, ``dataframe_split`` and ``dataframe_records``, beside it ``params`` (or V1's
    ``parameters``), whose member ``outputs`` may name the outputs wanted. ``NaN`` and ``Infinity``, which MLflow's clients write, are
    taken for what they mean.

    Raises
    ------
    InvalidInputError
        The body is malformed or does not fit the signature.
    PayloadTooLargeError
        The data frame has more than ``MAX_CELLS``.
    """
    return from_document(parse_lenient(body), signature)


def from_document(document: Mapping[str, Any], signature: Signature) -> InferRequest:
    """Read a body in one of MLflow's JSON forms that is parsed already; raises what ``parse_json`` raises."""
    given = [form for form in _FORMS if form in document]
    if len(given) != 1:
        raise InvalidInputError(f"the request needs exactly one of {', '.join(map(repr, _FORMS))}; it has {' and '.join(given) or 'none'}")
    parameters = object_or_empty(document.get("params", document.get("parameters")), "params")
    outputs = document.get("outputs", parameters.get("outputs"))
    form, value = given[0], document[given[0]]
    if form in ("instances", "inputs"):
        return v1.from_document({form: value, "outputs": outputs, "parameters": parameters}, signature)
    table = _split(value) if form == "dataframe_split" else _records(value)
    return InferRequest(_arrays(table, signature, _JsonCells()), *requested_groups(outputs, signature), parameters=parameters)


def parse_lenient(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Parse a body that must be a JSON object, in which numbers may be ``NaN`` or ``Infinity`` as Python writes them.

    Raises
    ------
    InvalidInputError
        Not JSON, not an object, too much to parse (``check_size``), or such numbers in more than ``MAX_LENIENT_BYTES``.
    """
    check_size(body)
    try:
        return parse_bounded(body)
    except InvalidInputError as error:
        content = bytes(body)
        if b"NaN" not in content and b"Infinity" not in content:
            raise
        if len(content) > MAX_LENIENT_BYTES:
            raise InvalidInputError(
                f"{error.message}; NaN and Infinity are read in bodies of up to {MAX_LENIENT_BYTES} bytes: send null for a missing number, "
                "or binary tensors (V2)"
            ) from error
    try:
        document = json.loads(content.decode(), object_pairs_hook=_unique)
        if b"\\u" in content:
            json.dumps(document, ensure_ascii=False).encode()  # raises where an escape is half a character: no answer could repeat it
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"the request body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInputError("the request body must be a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise InvalidInputError("the request body gives a name twice in one object")
    return document


def parse_csv(body: bytes | bytearray | memoryview, signature: Signature, header: bool | None = None) -> InferRequest:
    """Read a CSV body: UTF-8, commas, quotes doubled within quotes; empty lines are passed over, an empty cell of floats is NaN, and an
    empty cell of a column of text is a missing text, as it is for pandas.

    Parameters
    ----------
    header
        Whether the first row is names. None: it is, if it holds just the names that the model knows, or, for a model without text
        inputs, if any of its cells is not a number, or, for one on a table with text, if any of its cells is the name of a column.

    Raises
    ------
    InvalidInputError
        The body is malformed or does not fit the signature.
    PayloadTooLargeError
        It has more than ``MAX_CELLS``.
    """
    content = bytes(body)
    if content.count(b",") + content.count(b"\n") + content.count(b"\r") > MAX_CELLS:
        raise PayloadTooLargeError(f"a CSV body may have at most {MAX_CELLS} cells; send larger tables in binary form")
    quick = _parse_numbers(content, signature, header)
    if quick is not None:
        return quick
    try:
        text = content.decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"the request body is not CSV in UTF-8: {error}") from error
    names = None
    if rows and (_is_header(rows[0], signature) if header is None else header):
        names = [name.strip() for name in rows.pop(0)]
    return InferRequest(_arrays(_table(names, rows), signature, _TextCells(plain=text.isascii() and "_" not in text)))


def _parse_numbers(content: bytes, signature: Signature, header: bool | None) -> InferRequest | None:
    """Read a CSV body of plain numbers by way of JSON, which is some six times as fast.

    None: it is something else, or does not fit the signature; what exactly, the slower way can tell.
    """
    if b'"' in content or any(spec.datatype == "BYTES" for spec in signature.inputs):
        return None
    text = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").strip(b"\n")
    first, _, rest = text.partition(b"\n")
    try:
        cells = [cell.strip() for cell in first.decode().split(",")]
        is_header = _is_header(cells, signature) if header is None else header
        rows = _rows_of_numbers(rest if is_header else text, all(spec.datatype.startswith("FP") for spec in signature.inputs))
        return None if rows is None else InferRequest(_arrays(_table(cells if is_header else None, rows), signature, _JsonCells()))
    except (UnicodeDecodeError, InvalidInputError):
        return None


def _rows_of_numbers(text: bytes, may_be_floats: bool) -> list[list[Any]] | None:
    """Lines of numbers that JSON knows as such, with None for those that are missing; None if there is anything else."""
    if text.translate(None, b"0123456789.eE+-,\n " if may_be_floats else b"0123456789-,\n "):
        return None
    while b"\n\n" in text:
        text = text.replace(b"\n\n", b"\n")
    if b",," in text or b",\n" in text or b"\n," in text or text[:1] == b"," or text[-1:] == b",":
        text = b"\n%b\n" % text.strip(b"\n")
        text = text.replace(b",,", b",null,").replace(b",,", b",null,").replace(b"\n,", b"\nnull,").replace(b",\n", b",null\n")
    try:
        rows: list[list[Any]] = orjson.loads(b"[[%b]]" % text.strip(b"\n").replace(b"\n", b"],["))
    except orjson.JSONDecodeError:
        return None
    return rows


def parse_npy(body: bytes | bytearray | memoryview, signature: Signature) -> InferRequest:
    """Read a body in NumPy's ``.npy`` form: rows of the one input, or a column for each input.

    Raises
    ------
    InvalidInputError
        The body is malformed, holds Python objects, or does not fit the signature.
    PayloadTooLargeError
        It holds more than ``MAX_CELLS`` strings.
    """
    array = read_npy(body)
    specs = signature.inputs
    if len(specs) == 1 and (array.ndim != 2 or not signature.is_table):
        return InferRequest({specs[0].name: _fitted(array, specs[0])})
    order = places(array.shape[1], signature) if array.ndim == 2 else None
    if order is None:
        raise InvalidInputError(f"the model has {len(specs)} inputs, so the array must have as many columns; its shape is {array.shape}")
    return InferRequest({spec.name: _fitted(array[:, place], spec) for spec, place in zip(specs, order, strict=True)})


def check_writable(request: InferRequest, signature: Signature, form: str) -> None:
    """Refuse a request whose answer could not be given as ``form``, ``csv`` or ``npy``.

    Raises
    ------
    InvalidInputError
        NumPy's form holds one array, and text only as a pickle; CSV holds no more than two dimensions.
    """
    asked = request.outputs or (signature.outputs[0].name,)
    specs = [spec for spec in signature.outputs if spec.name in asked]
    if form == "npy" and len(specs) > 1:
        raise InvalidInputError("an answer in NumPy's form holds one output; ask for one, or for JSON")
    for spec in specs:
        if form == "npy" and spec.datatype == "BYTES":
            raise InvalidInputError(f"output '{spec.name}' is text, which NumPy's form holds only as a pickle; accept JSON or CSV")
        if form == "csv" and len(spec.shape) > 2:
            raise InvalidInputError(f"output '{spec.name}' has the shape {list(spec.shape)}, which CSV cannot hold; accept JSON")


def render_csv(response: InferResponse) -> bytes:
    """Write a line for each row, without a header: the columns of all outputs in their order; NaN is ``nan``.

    Raises
    ------
    InvalidInputError
        Outputs of different lengths, of more than two dimensions, or text that is not UTF-8.
    """
    columns: list[list[Any]] = []
    for name, array in response.outputs.items():
        if array.ndim not in (1, 2) or len(array) != len(next(iter(response.outputs.values()))):
            raise InvalidInputError(
                f"output '{name}' has the shape {list(array.shape)}, which CSV cannot hold beside the others; accept JSON"
            )
        matrix = array if array.ndim == 2 else array[:, None]
        columns += [[_cell_text(value, name) for value in matrix[:, index].tolist()] for index in range(matrix.shape[1])]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
    return text.getvalue().encode()


def render_npy(response: InferResponse) -> bytes:
    """Write the one output in NumPy's form.

    Raises
    ------
    InvalidInputError
        Text, or several outputs.
    """
    arrays = list(response.outputs.values())
    if len(arrays) != 1 or arrays[0].dtype.hasobject:
        raise InvalidInputError("an answer in NumPy's form holds one output of numbers; accept JSON")
    file = io.BytesIO()
    np.lib.format.write_array(file, arrays[0], allow_pickle=False)
    return file.getvalue()


def _cell_text(value: Any, name: str) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return ""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"output '{name}' is not UTF-8, which CSV cannot hold; accept JSON") from error


@dataclass(frozen=True, slots=True)
class _Table:
    """Rows of equal length; ``names`` are None where the columns have none."""

    names: list[str] | None
    rows: list[list[Any]]

    @property
    def width(self) -> int:
        return len(self.rows[0])

    def label(self, column: int) -> str:
        return f"column {column + 1}" if self.names is None else f"column '{printable(self.names[column], 80)}'"


def _table(names: list[str] | None, rows: list[list[Any]]) -> _Table:
    """Check that rows and names fit each other; names that only count the columns are none."""
    if not rows:
        raise InvalidInputError("the table has no rows")
    width = len(rows[0]) if names is None else len(names)
    if len(rows) * max(width, 1) > MAX_CELLS:
        raise PayloadTooLargeError(f"a table may have at most {MAX_CELLS} cells; send larger ones in binary form")
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise InvalidInputError(f"row {number} has {len(row)} cells; {'the first row' if names is None else 'the header'} has {width}")
    if width == 0:
        raise InvalidInputError("the table has no columns")
    if names is not None and len(set(names)) < width:
        raise InvalidInputError(f"the column '{printable(_repeated(names), 80)}' is there twice")
    return _Table(names, rows)


def _repeated(names: list[str]) -> str:
    return next(name for name, count in Counter(names).items() if count > 1)


def _split(value: Any) -> _Table:
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise InvalidInputError("'dataframe_split' must be an object with 'columns' and a list 'data'")
    unknown = value.keys() - {"columns", "data", "index"}
    if unknown:
        raise InvalidInputError(f"'dataframe_split' has 'columns', 'index' and 'data', not '{printable(min(unknown), 80)}'")
    for index, row in enumerate(value["data"]):
        if not isinstance(row, list):
            raise InvalidInputError(f"'dataframe_split': data[{index}] must be a list, got {show(row)}")
    columns = value.get("columns")
    if columns is None:
        return _table(None, value["data"])
    if not isinstance(columns, list) or not all(isinstance(name, str | int) and not isinstance(name, bool) for name in columns):
        raise InvalidInputError("'dataframe_split': 'columns' must be a list of names")
    return _table([str(name) for name in columns], value["data"])


def _records(value: Any) -> _Table:
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise InvalidInputError("'dataframe_records' must be a list of objects")
    names = list(dict.fromkeys(name for record in value for name in record))
    if len(names) * len(value) > MAX_CELLS:
        raise PayloadTooLargeError(f"a table may have at most {MAX_CELLS} cells; send larger ones in binary form")
    return _table(names, [[record.get(name) for name in names] for record in value])


class _Cells(Protocol):
    """Makes arrays of cells."""

    def matrix(self, table: _Table, order: list[int], spec: TensorSpec) -> Array: ...

    def column(self, table: _Table, column: int, spec: TensorSpec) -> Array: ...


def _arrays(table: _Table, signature: Signature, cells: _Cells) -> Arrays:
    """The model's inputs, by the names of columns or by their order."""
    specs = signature.inputs
    names = [spec.name for spec in specs]
    if signature.ignored_columns and table.names is not None:
        table = _without(table, set(signature.ignored_columns))
    if len(specs) > 1 or (signature.is_table and table.width > 1):
        there = set(table.names or ())
        if not there.isdisjoint(names):
            specs = tuple(spec for spec in specs if not spec.optional or spec.name in there)
        order = _places(table, signature) or _order(table, [spec.name for spec in specs])
        arrays = {spec.name: _shaped(cells.column(table, column, spec), spec) for spec, column in zip(specs, order, strict=True)}
        return arrays if len(arrays) == len(names) else completed(arrays, signature)
    spec = specs[0]
    if table.width == 1 and (len(spec.shape) != 2 or (table.names == names and signature.feature_names is None)):
        return {spec.name: _shaped(cells.column(table, 0, spec), spec)}
    if len(spec.shape) != 2:
        raise InvalidInputError(f"{spec.label} has the shape {list(spec.shape)}: it takes a table of one column, not {table.width}")
    order = list(range(table.width)) if signature.feature_names is None else _order(table, signature.feature_names)
    return {spec.name: check_shape(cells.matrix(table, order, spec), spec)}


def _places(table: _Table, signature: Signature) -> Sequence[int] | None:
    """Where each column stands in a whole training table without names, or with names that only count; None: it is something else."""
    counted = list(map(str, range(table.width)))
    if table.width != len(signature.training_columns) or (table.names is not None and sorted(table.names) != sorted(counted)):
        return None
    by_name = {name: place for place, name in enumerate(table.names or counted)}
    return [by_name[str(place)] for place in places(table.width, signature) or ()]


def _without(table: _Table, names: set[str]) -> _Table:
    """The table without these columns."""
    assert table.names is not None  # noqa: S101 (checked by the caller; for the type checker)
    kept = [place for place, name in enumerate(table.names) if name not in names]
    return _Table([table.names[place] for place in kept], [[row[place] for place in kept] for row in table.rows])


def _order(table: _Table, wanted: Sequence[str]) -> list[int]:
    """Where each wanted column stands; columns without names, or with the numbers that data frames give for want of names, are in order.

    Raises
    ------
    InvalidInputError
        A column is missing or not known, or there are more or fewer of them.
    """
    places = {name: column for column, name in enumerate(table.names or ())}
    if table.names is not None and places.keys() == set(wanted):
        return [places[name] for name in wanted]
    counted = [str(column) for column in range(len(wanted))]
    if places.keys() == set(counted):
        return [places[name] for name in counted]
    if table.names is None:
        if table.width == len(wanted):
            return list(range(table.width))
        raise InvalidInputError(f"the model takes {len(wanted)} columns; the table has {table.width}")
    missing = [name for name in wanted if name not in places]
    unknown = [name for name in table.names if name not in set(wanted)]
    said = [_named("lacks the column", missing)] if missing else []
    said += [_named("has the column", unknown) + ", which the model does not know"] if unknown else []
    raise InvalidInputError(f"the table {' and '.join(said)}")


def _named(verb: str, names: Sequence[str]) -> str:
    shown = ", ".join(f"'{printable(name, 80)}'" for name in names[:5])
    return f"{verb}{'s' if len(names) > 1 else ''} {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shaped(array: Array, spec: TensorSpec) -> Array:
    if array.ndim == len(spec.shape) - 1 and spec.shape[-1] in (1, -1):
        array = array[..., None]
    return check_shape(array, spec)


class _JsonCells:
    """Cells that are JSON values; null is a missing one."""

    def matrix(self, table: _Table, order: list[int], spec: TensorSpec) -> Array:
        in_order = order == list(range(table.width))
        rows = table.rows if in_order else [[row[column] for column in order] for row in table.rows]
        return array_from_json(rows, spec.datatype, spec.label)

    def column(self, table: _Table, column: int, spec: TensorSpec) -> Array:
        return array_from_json([row[column] for row in table.rows], spec.datatype, table.label(column), may_miss=spec.dtype is not None)


class _TextCells:
    """Cells of a CSV file; ``plain`` says that nothing in it is read as a number by Python alone (``1_000``, digits of other scripts)."""

    def __init__(self, plain: bool) -> None:
        self._plain = plain

    def matrix(self, table: _Table, order: list[int], spec: TensorSpec) -> Array:
        array = self._floats(table.rows, spec)
        if array is not None:
            return array[:, order]
        return np.stack([self.column(table, column, spec) for column in order], axis=1)

    def column(self, table: _Table, column: int, spec: TensorSpec) -> Array:
        cells = [row[column] for row in table.rows]
        if spec.dtype is not None and spec.datatype == "BYTES":
            return array_from_json([cell or None for cell in cells], spec.datatype, table.label(column), may_miss=True)
        array = self._floats(cells, spec)
        if array is not None:
            return array
        read = _READERS.get(NUMPY_DTYPES[spec.datatype].kind, _integer)
        values = []
        for number, cell in enumerate(cells, start=1):
            value = read(cell)
            if value is None:
                shown = f"is {cell[:40]!r}" if cell.strip() else "is empty"
                raise InvalidInputError(f"{spec.label} expects {spec.datatype}; row {number}, {table.label(column)} {shown}")
            values.append(value)
        return array_from_json(values, spec.datatype, table.label(column))

    def _floats(self, cells: Sequence[Any], spec: TensorSpec) -> Array | None:
        """Cells as floats when all of them are plain numbers; the quick way."""
        target = NUMPY_DTYPES[spec.datatype]
        if target.kind != "f" or not self._plain:
            return None
        for attempt in (_as_is, _filled):
            try:
                array = np.array(attempt(cells), dtype=np.float64)
            except ValueError:
                continue
            return convert(array, target, spec.datatype, spec.label)
        return None


def _as_is(cells: Sequence[Any]) -> Sequence[Any]:
    return cells


def _filled(cells: Sequence[Any]) -> Sequence[Any]:
    """The cells of a column or of rows, with ``nan`` where they are empty."""
    if cells and isinstance(cells[0], list):
        return [_filled(row) for row in cells]
    return [cell if cell.strip() else "nan" for cell in cells]


def _float(cell: str) -> float | None:
    if _NUMBER.fullmatch(cell):
        return float(cell)
    return _WORDS.get(cell.strip().lower())


def _integer(cell: str) -> int | None:
    if _INTEGER.fullmatch(cell):
        return int(cell)
    if not _NUMBER.fullmatch(cell):
        return {"true": 1, "false": 0}.get(cell.strip().lower())
    number = float(cell)
    return int(number) if abs(number) < EXACT and number.is_integer() else None


_READERS: Mapping[str, Callable[[str], Any]] = {
    "O": lambda cell: cell,
    "f": _float,
    "b": lambda cell: _BOOLEANS.get(cell.strip().lower()),
}
"""By the kind of the element: the value of a cell, or None where it has none."""


def _is_header(first: list[str], signature: Signature) -> bool:
    known = signature.feature_names or [spec.name for spec in signature.inputs]
    cells = {cell.strip() for cell in first} - set(signature.ignored_columns)
    if cells and set(known) - {spec.name for spec in signature.inputs if spec.optional} <= cells <= set(known):
        return True
    datatypes = {spec.datatype for spec in signature.inputs}
    if "BYTES" in datatypes:
        return signature.is_table and not cells.isdisjoint(known)
    values = _BOOLEANS if "BOOL" in datatypes else {}
    return not all(not cell.strip() or _NUMBER.fullmatch(cell) or cell.strip().lower() in values for cell in first)


def read_npy(body: bytes | bytearray | memoryview) -> Array:
    """Read an array of booleans, integers, floats or strings; strings become an object array of ``bytes``.

    Raises
    ------
    InvalidInputError
        Not such an array; one of Python objects (a pickle) above all.
    PayloadTooLargeError
        More than ``MAX_CELLS`` strings.
    """
    view = memoryview(body)
    dtype, fortran_order, shape, offset = _npy_header(view)
    count = math.prod(shape)
    if count == 0:
        raise InvalidInputError(f"the array is empty: its shape is {list(shape)}")
    if count * dtype.itemsize != len(view) - offset:
        needs = count * dtype.itemsize
        raise InvalidInputError(
            f"an array of {dtype.str} with the shape {list(shape)} has {needs} bytes; {len(view) - offset} follow its header"
        )
    if dtype.kind in "SU":
        return _strings(view, dtype, count, offset).reshape(shape, order="F" if fortran_order else "C")
    array = np.frombuffer(view, dtype, count, offset)
    if dtype.kind == "b":
        array = _booleans(array)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _booleans(array: Array) -> Array:
    content = array.view(np.uint8)
    if content.max() > 1:
        raise InvalidInputError("an array of booleans holds bytes other than 0 and 1")
    return array


def _strings(view: memoryview, dtype: np.dtype[Any], count: int, offset: int) -> Array:
    if dtype.itemsize == 0:
        raise InvalidInputError("the array's strings have no characters")
    if count > MAX_CELLS:
        raise PayloadTooLargeError(f"an array may hold at most {MAX_CELLS} strings")
    array = np.empty(count, dtype=object)
    try:
        values = np.frombuffer(view, dtype, count, offset).tolist()
        array[:] = [value.encode() for value in values] if dtype.kind == "U" else values
    except (UnicodeError, ValueError) as error:
        raise InvalidInputError(f"the array's text is not Unicode: {error}") from error
    return array


_NPY_ENTRY = re.compile(r"\s*'(\w{1,20})'\s*:\s*('[^']{0,40}'|True|False|\([0-9,\s]{0,200}\))\s*(,|$)")
_NPY_DESCRIPTION = re.compile(r"'([<>|=]?(?:b1|[iu][1248]|f[248]|[SU][0-9]{1,9}))'")


def _npy_header(view: memoryview) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """Element type, order, shape, and where the elements begin.

    NumPy's own reader evaluates the header as a Python literal; here only what it writes for plain arrays is known.
    """
    if bytes(view[:6]) != NPY_MAGIC or len(view) < 12 or view[6] not in (1, 2, 3):
        raise InvalidInputError("the request body is not in NumPy's .npy form")
    width = 2 if view[6] == 1 else 4
    length = int.from_bytes(view[8 : 8 + width], "little")
    offset = 8 + width + length
    if length > _MAX_NPY_HEADER_BYTES or offset > len(view):
        raise InvalidInputError(f"the header of the array is said to have {length} bytes")
    entries = _npy_entries(bytes(view[8 + width : offset]).decode("latin-1"))
    description = _NPY_DESCRIPTION.fullmatch(entries.get("descr", ""))
    order, shape = entries.get("fortran_order"), re.findall(r"[0-9]+", entries.get("shape", "-"))
    if description is None or order not in ("True", "False") or not entries.get("shape", "").startswith("(") or len(entries) != 3:
        raise InvalidInputError("the array is not one of booleans, integers, floats or strings; arrays of Python objects are never read")
    if len(shape) > _MAX_DIMENSIONS or any(len(size) > 12 for size in shape):
        raise InvalidInputError("the array has too many dimensions, or too large ones")
    return np.dtype(description[1]), order == "True", tuple(map(int, shape)), offset


def _npy_entries(header: str) -> dict[str, str]:
    text = header.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return {}
    inner, place = text[1:-1].rstrip(), 0
    entries: dict[str, str] = {}
    while place < len(inner):
        entry = _NPY_ENTRY.match(inner, place)
        if entry is None:
            return {}
        entries[entry[1]] = entry[2]
        place = entry.end()
    return entries


def _fitted(array: Array, spec: TensorSpec) -> Array:
    what = spec.label
    if (array.dtype.kind == "O") != (spec.datatype == "BYTES"):
        raise InvalidInputError(f"{what} expects {spec.datatype}; the array holds {'text' if array.dtype.kind == 'O' else 'numbers'}")
    if spec.datatype != "BYTES":
        array = convert(array, NUMPY_DTYPES[spec.datatype], spec.datatype, what)
    if array.ndim == len(spec.shape) - 1 and spec.shape[-1] == 1:
        array = array[..., None]
    return check_shape(np.ascontiguousarray(array), spec)
