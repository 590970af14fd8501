"""Which typed columns a fitted scikit-learn model takes, and the DataFrame that is made of them.

What the model was fitted on is read from what its transformers remember: the categories of encoders, the statistics of imputers, the kind
of the vectorizers. A model whose columns are all numbers, and all used, has no table here; it takes one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InvalidInputError, LoadError
from ..wire import Arrays, is_missing

_TEXT_MODULE = "sklearn.feature_extraction.text"
_PLAIN = ("object", "float64", "bool")
_NULLABLE = ("boolean", "Int64")
_NULLABLE_OF = {"BOOL": "boolean", "INT64": "Int64"}
_DATE_UNITS = ("s", "ms", "us", "ns")
"""Those that pandas keeps dates in; nanoseconds hold no date beyond 2262."""

_EXACT = 2**53
"""From here on a float stands for more than one integer."""

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
"""An integer as Python writes it; a text of digits with zeros before them is none."""

_MOST_MEMBERS = 16
"""Members of an ensemble that are looked at; a forest has more, and all see the same."""

_INNER = ("best_estimator_", "regressor_", "classifier_", "estimator_")
_WORDS = ("a sample", "another text", "some other words", "one more", "the last one")


class Column:
    """One column of the training table.

    Attributes
    ----------
    datatype, dtype
        Element type on the wire, and pandas dtype in the DataFrame.
    categories
        Of dtype ``category``, in order.
    known
        Values that the model has seen, for made-up rows.
    missing
        What stands for a missing text or boolean: NaN, or None where the model was fitted with that.
    as_objects
        Of dtype ``boolean``: whether the model was fitted on Python's booleans and what stands for missing ones, not on pandas' own.
    optional
        Whether a request may leave it out.
    is_exact
        Of numbers: whether the model tells them apart by what floats do not keep, so that they cannot travel in one matrix of FP64.
    """

    def __init__(self, name: str, datatype: str, dtype: str, known: Sequence[Any] = (), missing: Any = np.nan) -> None:
        self.name = name
        self.datatype = datatype
        self.dtype = dtype
        self.known = list(known)
        self.missing = missing
        self.categories: list[Any] | None = None
        self.as_objects = False
        self.optional = False
        self.is_exact = False

    def describe(self) -> dict[str, Any]:
        """Return it as an input of the signature."""
        spec: dict[str, Any] = {"name": self.name, "datatype": self.datatype, "shape": [-1], "dtype": self.dtype}
        if self.categories is not None:
            spec["categories"] = self.categories
        if self.optional:
            spec["optional"] = True
        return spec

    def let_out(self) -> None:
        """Let requests leave it out; what has no missing value becomes what has one."""
        self.optional = True
        if self.datatype in _NULLABLE_OF:
            self.dtype = _NULLABLE_OF[self.datatype]
            self.datatype, self.known, self.as_objects = "FP64", [], self.datatype == "BOOL"

    def made_up(self, count: int) -> np.ndarray[Any, Any]:
        """Return values that differ, as they come from the wire."""
        if self.datatype == "BYTES":
            words = self.known or (["2020-01-01", "2021-06-15"] if self.dtype.startswith("datetime64") else _WORDS)
            return _objects([str(words[index % len(words)]).encode() for index in range(count)])
        if self.datatype == "BOOL":
            return np.array([index % 2 == 0 for index in range(count)])
        if self.datatype == "INT64":
            values = self.known or range(count)
            return np.array([values[index % len(values)] for index in range(count)], dtype=np.int64)
        if self.dtype == "boolean":
            return (np.arange(count) % 2).astype(np.float64)
        values = self.known or [index + (0.0 if self.dtype == "Int64" else 0.5) for index in range(count)]
        return np.array([values[index % len(values)] for index in range(count)], dtype=np.float64)

    def series(self, values: np.ndarray[Any, Any]) -> Any:
        """Return the column as pandas had it in training.

        Raises
        ------
        InvalidInputError
            A value that the dtype cannot hold.
        """
        import pandas as pd  # type: ignore[import-untyped,unused-ignore]

        if self.datatype == "BYTES":
            texts = [self._text(value) for value in values.tolist()]
            if self.dtype == "category":
                return pd.Series(pd.Categorical(texts, categories=self.categories))
            if self.dtype.startswith("datetime64"):
                return self._dates(texts)
            if self.dtype == "string":
                return pd.Series(texts, dtype="string")
            is_bare = self.missing is not np.nan or all(text is np.nan for text in texts)
            return pd.Series(texts, dtype=object if is_bare else None)
        if self.dtype == "category":
            return pd.Series(pd.Categorical(values, categories=self.categories))
        if self.as_objects:
            return pd.Series([self.missing if value != value else bool(value) for value in self._whole(values).tolist()], dtype=object)
        if self.dtype in _NULLABLE:
            return pd.Series(pd.array(self._whole(values), dtype="Int64")).astype(self.dtype)
        return pd.Series(values, dtype=self.dtype if self.dtype == "float32" else None)

    def _whole(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the floats that a nullable column travels as, if each is NaN or stands for exactly one of its values."""
        there = values[~np.isnan(values)]
        if self.dtype == "boolean":
            fits, expected = (there == 0) | (there == 1), "true, false, 1, 0 or null"
        else:
            fits, expected = (there == np.trunc(there)) & (np.abs(there) < _EXACT), f"whole numbers below {_EXACT} or null"
        if not fits.all():
            raise InvalidInputError(f"column '{self.name}' takes {expected}; {there[~fits][0]:.17g} is not one of them")
        return values

    def _text(self, value: Any) -> Any:
        if value is None:
            return self.missing
        if not isinstance(value, bytes):
            return str(value)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"column '{self.name}' has an element that is not UTF-8 text") from error

    def _dates(self, texts: Sequence[Any]) -> Any:
        import pandas as pd

        try:
            return pd.Series(pd.to_datetime(texts, format="ISO8601")).astype(self.dtype)
        except (TypeError, ValueError) as error:
            text = f"column '{self.name}' takes dates in ISO 8601 without a time zone, such as 2026-11-30; one is not"
            raise InvalidInputError(text) from error


class Table:
    """The columns of a model that was trained on a table with text, categories or dates in it.

    Parameters
    ----------
    ignored
        Columns that the model does not use.
    passed
        Columns that the model does not use, and has to be given: it drops them only after it has passed them on.
    order
        All columns of the training table, if it does not use some.
    as_dicts
        Whether the model takes a list of dictionaries instead of a DataFrame.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        ignored: Sequence[str] = (),
        passed: Sequence[str] = (),
        order: Sequence[str] = (),
        as_dicts: bool = False,
    ) -> None:
        self.columns = list(columns)
        self.ignored = list(ignored)
        self.order = list(order)
        self._passed = list(passed)
        self._as_dicts = as_dicts

    def made_up(self, count: int) -> Arrays:
        """Return rows that differ from one another."""
        return {column.name: column.made_up(count) for column in self.columns}

    def sample(self, count: int) -> dict[str, list[Any]]:
        """Return made-up rows as the columns of a V1 body."""
        return {
            name: [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
            for name, values in self.made_up(count).items()
        }

    def frame(self, inputs: Arrays) -> Any:
        """Return what the model takes, made of one array for each column."""
        if len({len(inputs[column.name]) for column in self.columns}) > 1:
            raise InvalidInputError("the columns differ in how many rows they have")
        if self._as_dicts:
            values = [_python_values(column, inputs[column.name]) for column in self.columns]
            names = [column.name for column in self.columns]
            return [{name: value for name, value in zip(names, row) if value == value and value is not None} for row in zip(*values)]
        from pandas import DataFrame  # type: ignore[import-untyped,unused-ignore]

        frame = {column.name: column.series(inputs[column.name]) for column in self.columns}
        return DataFrame(frame if not self._passed else {**frame, **dict.fromkeys(self._passed, np.nan)})


def _python_values(column: Column, values: np.ndarray[Any, Any]) -> list[Any]:
    if column.datatype != "BYTES":
        return list(values.tolist())
    return [column._text(value) for value in values.tolist()]


def _objects(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def find_table(
    estimator: Any, names: Sequence[str] | None, declared: Sequence[Mapping[str, Any]] = (), guessed: Sequence[Column] = ()
) -> Table | None:
    """Return the table that a fitted model takes; None when all of it is numbers that the model uses, or columns have no names.

    Parameters
    ----------
    names
        The columns of training, in order (``feature_names_in_``).
    declared
        Inputs, columns having a ``dtype``: as the uploader declares them, as the example shows them, or as they were found in the trial. A
        plain dtype (``object``, ``float64``, ``bool``) completes the columns that the model remembers nothing of; others outrank what it
        remembers.
    guessed
        Columns that only functions see (``find_opaque``), as they are taken to be.

    Raises
    ------
    LoadError
        A column holds text and numbers, which no request can tell apart.
    """
    vectorizer = _dict_vectorizer(estimator)
    if vectorizer is not None:
        return Table(_dict_columns(vectorizer), as_dicts=True)
    search = _Search()
    if names is not None:
        search.visit(estimator, list(names))
    search.found.update((column.name, column) for column in guessed)
    columns = {name: search.found.get(name) or search.codes.get(name) or Column(name, "FP64", "float64") for name in names or ()}
    for spec in declared:
        if not spec.get("dtype"):
            continue
        name = str(spec["name"])
        is_known = name in search.found or name in search.dropped - search.used or (names is not None and name not in columns)
        is_known = is_known or (name in search.codes and spec["dtype"] == "float64")
        if not (is_known and spec["dtype"] in _PLAIN):
            columns[name] = _declared(spec, columns.get(name))
        if spec.get("optional") and name in columns:
            columns[name].let_out()
    ignored = [name for name in names or () if name in search.dropped and name not in search.used]
    taken = [column for name, column in columns.items() if name not in ignored]
    is_matrix = any(not spec.get("dtype") for spec in declared)
    is_numbers = all(column.datatype != "BYTES" and column.dtype not in _NULLABLE and not column.optional for column in taken)
    is_exact = any(column.is_exact for column in taken)
    if is_numbers and (is_matrix or not (ignored or is_exact)):
        return None
    passed = [name for name in ignored if name in search.passed]
    return Table(taken, ignored, passed, order=names if ignored and names and set(columns) == set(names) else ())


def unkept_columns(estimator: Any, count: int) -> list[int]:
    """Return the columns, of a model without names, with integers that it tells apart and a matrix of FP64 does not keep."""
    names = [str(place) for place in range(count)]
    search = _Search()
    try:
        search.visit(estimator, names)
    except (LoadError, IndexError):  # text among numbers, say: what the trial says of that is better
        return []
    seen = [search.found.get(name) or search.codes.get(name) for name in names]
    return [place for place, column in enumerate(seen) if column is not None and column.is_exact]


def find_opaque(estimator: Any, names: Sequence[str] | None, declared: Sequence[Mapping[str, Any]] = ()) -> list[list[Column]]:
    """Return the columns that only functions see, so that nothing tells whether they are text: as texts, those of a function together."""
    if names is None:
        return []
    search = _Search()
    search.visit(estimator, list(names))
    known = {*search.found, *(str(spec["name"]) for spec in declared)}
    groups = [[column for name, column in group.items() if name not in known] for group in search.opaque]
    return [group for group in groups if group]


def _declared(spec: Mapping[str, Any], found: Column | None) -> Column:
    known = found.known if found is not None and found.datatype == spec["datatype"] else []
    if found is not None and (found.datatype, found.dtype) == (spec["datatype"], spec["dtype"]) and not spec.get("categories"):
        return found
    column = Column(str(spec["name"]), str(spec["datatype"]), str(spec["dtype"]), known)
    if column.dtype == "category":
        column.categories = list(spec.get("categories") or (found.categories if found else None) or known)
        column.known = column.categories
    return column


def inner_of(estimator: Any) -> list[Any]:
    """Return the fitted parts of an estimator that see its input as it comes: the first step of a pipeline, the members of an ensemble."""
    steps = getattr(estimator, "steps", None)
    if isinstance(steps, list) and steps:
        return working_steps(steps)[:1]
    union = getattr(estimator, "transformer_list", None)
    if isinstance(union, list):
        return [part for _, part in union]
    for name in _INNER:
        if hasattr(estimator, name):
            return [getattr(estimator, name)]
    members = getattr(estimator, "estimators_", None)
    if isinstance(members, list) and not hasattr(estimator, "estimators_features_"):
        return members[:_MOST_MEMBERS]
    calibrated = getattr(estimator, "calibrated_classifiers_", None)
    if isinstance(calibrated, list):
        return [part.estimator for part in calibrated if hasattr(part, "estimator")][:_MOST_MEMBERS]
    return []


def working_steps(steps: Sequence[Any]) -> list[Any]:
    """Return the steps of a pipeline that do something."""
    return [step for _, step in steps if step is not None and not isinstance(step, str) and not _is_identity(step)]


class _Search:
    """Walks a fitted model from its input on, with the names of the columns that each part sees.

    Attributes
    ----------
    found
        Columns whose kind something remembers.
    used, dropped
        Names of columns that something looks at, and that something drops.
    passed
        Of the dropped ones, those that are passed on at first.
    opaque
        Columns that a function sees first, those of one function together.
    codes
        Of these, the integers and booleans that the function seems to write as text: what the encoder behind it knows looks like them.
    """

    def __init__(self) -> None:
        self.found: dict[str, Column] = {}
        self.used: set[str] = set()
        self.dropped: set[str] = set()
        self.passed: set[str] = set()
        self.opaque: list[dict[str, Column]] = []
        self.codes: dict[str, Column] = {}
        self._nested = 0

    def visit(self, estimator: Any, names: list[str], depth: int = 0) -> None:
        if depth > 8 or isinstance(estimator, str):
            self.used.update(names)
            return
        steps = getattr(estimator, "steps", None)
        if isinstance(steps, list) and steps:
            parts = working_steps(steps)
            if parts and type(parts[0]).__name__ == "FunctionTransformer":
                self._add_opaque(names, parts[1:])
            elif parts:
                self.visit(parts[0], names, depth + 1)
                if hasattr(parts[0], "statistics_") and parts[1:]:
                    self._learn(names, parts[1])
            return
        if hasattr(estimator, "transformers_"):
            self._visit_parts(estimator, names, depth)
            return
        inner = inner_of(estimator)
        if inner:
            if getattr(estimator, "passthrough", False) is True:
                self.used.update(names)  # stacked: the last estimator sees all of them beside the others' answers
            for part in inner:
                self.visit(part, names, depth + 1)
            return
        preprocessor = getattr(estimator, "_preprocessor", None)
        if preprocessor is not None and hasattr(preprocessor, "transformers_"):
            self._visit_parts(preprocessor, names, depth)
            self._mark_categories(estimator, names)
            return
        self._read(estimator, names)

    def _learn(self, names: list[str], encoder: Any) -> None:
        """Take over the values that an encoder behind an imputer knows; the imputer knows only what it fills in."""
        behind = _Search()
        behind.visit(encoder, names)
        for name, column in behind.found.items():
            found = self.found.get(name)
            if found is not None and found.datatype == column.datatype == "BYTES":
                found.known = column.known

    def _add_opaque(self, names: list[str], rest: Sequence[Any]) -> None:
        """Note columns that a function sees first, each as the text that it might be: what is encoded behind it, if anything is."""
        self.used.update(names)
        behind = _Search()
        if rest:
            behind.visit(rest[0], names)
        texts = {name: column for name, column in behind.found.items() if column.datatype == "BYTES" and column.dtype == "object"}
        self.opaque.append({name: texts.get(name) or Column(name, "BYTES", "object") for name in names})
        codes = {name: _code_of(column) for name, column in texts.items()}
        self.codes.update({name: code for name, code in codes.items() if code is not None})

    def _visit_parts(self, transformer: Any, names: list[str], depth: int) -> None:
        for _, part, selected in transformer.transformers_:
            columns = _selected(selected, names)
            if isinstance(part, str) and part == "drop":
                self.dropped.update(columns)
                if self._nested:
                    self.passed.update(columns)
                continue
            self._nested += 1
            self.visit(part, columns, depth + 1)
            self._nested -= 1

    def _mark_categories(self, estimator: Any, names: list[str]) -> None:
        flags = getattr(estimator, "is_categorical_", None)
        for name, flag in zip(names, flags if flags is not None else ()):
            column = self.found.get(name)
            if flag and column is not None and column.datatype == "BYTES":
                column.dtype, column.categories = "category", list(column.known)

    def _read(self, estimator: Any, names: list[str]) -> None:
        self.used.update(names)
        if type(estimator).__name__ == "FunctionTransformer" and not _is_identity(estimator):
            self._add_opaque(names, ())
            return
        if any(kind.__module__ == _TEXT_MODULE for kind in type(estimator).__mro__):
            for name in names:
                self._add(Column(name, "BYTES", "object"))
            return
        for attribute in ("categories_", "statistics_"):
            values = getattr(estimator, attribute, None)
            if values is None or len(values) != len(names):
                continue
            for name, known in zip(names, values):
                is_imputer = attribute == "statistics_"
                column = _column_of(name, np.atleast_1d(np.asarray(known)), is_imputer)
                if column is None:
                    continue
                stands = getattr(estimator, "missing_values", np.nan)
                if is_imputer and is_missing(stands) and not isinstance(stands, float):
                    column.missing = stands
                self._add(column)
            return

    def _add(self, column: Column) -> None:
        before = self.found.get(column.name)
        if before is None or (before.datatype != "BYTES" and column.datatype == "BYTES") or not before.known:
            self.found[column.name] = column


def _is_identity(estimator: Any) -> bool:
    return type(estimator).__name__ == "FunctionTransformer" and getattr(estimator, "func", None) is None


def _column_of(name: str, values: np.ndarray[Any, Any], is_imputer: bool) -> Column | None:
    """Return the column whose distinct values an encoder, or whose fill value an imputer, remembers; None if they tell nothing."""
    if values.dtype.kind == "M":
        unit = np.datetime_data(values.dtype)[0]
        dtype = f"datetime64[{unit if unit in _DATE_UNITS else 'ns'}]"
        return Column(name, "BYTES", dtype, np.datetime_as_string(values[~np.isnat(values)]).tolist())
    if values.dtype.kind in "iu":
        if is_imputer:
            return None
        column = Column(name, "INT64", "int64", values.tolist())
        column.is_exact = any(abs(value) > _EXACT for value in column.known)
        return column
    if values.dtype.kind == "f":
        return None if is_imputer else Column(name, "FP64", "float64", values[np.isfinite(values)].tolist())
    there = [value for value in values.tolist() if value is not None and value == value]
    if not there:
        return None
    missing: Any = None if any(value is None for value in values.tolist()) else np.nan
    if all(isinstance(value, str) for value in there):
        return Column(name, "BYTES", "object", there, missing)
    if all(isinstance(value, bool) for value in there):
        if not is_imputer and len(there) == len(values):
            return Column(name, "BOOL", "bool", there)
        column = Column(name, "FP64", "boolean", missing=missing)
        column.as_objects = True
        return column
    if all(isinstance(value, (int, float)) for value in there):
        return None if is_imputer else Column(name, "FP64", "float64", there)
    raise LoadError("not_a_model", f"column '{name}' of the model holds text and numbers, which a request cannot tell apart")


def _code_of(text: Column) -> Column | None:
    """Return the column whose values, written as text, are those that an encoder knows: ``75001`` of a float would be ``75001.0``."""
    if not text.known:
        return None
    if set(text.known) <= {"True", "False"}:
        code = Column(text.name, "BOOL", "bool")
    elif all(_INTEGER.fullmatch(value) for value in text.known):
        code = Column(text.name, "INT64", "int64", [int(value) for value in text.known])
    else:
        return None
    code.is_exact = True
    return code


def _selected(selected: Any, names: list[str]) -> list[str]:
    """Return the names of the columns that a part of a column transformer takes."""
    if callable(selected):
        return []
    if isinstance(selected, slice):
        if isinstance(selected.start, str) or isinstance(selected.stop, str):
            start = names.index(selected.start) if selected.start is not None else 0
            stop = names.index(selected.stop) + 1 if selected.stop is not None else len(names)
            return names[start:stop]
        return names[selected]
    if isinstance(selected, (str, int, np.integer)) and not isinstance(selected, bool):
        selected = [selected]
    entries: Iterable[Any] = np.asarray(selected).tolist()
    entries = list(entries)
    if entries and all(isinstance(entry, bool) for entry in entries):
        return [name for name, flag in zip(names, entries) if flag]
    return [entry if isinstance(entry, str) else names[entry] for entry in entries]


def _dict_vectorizer(estimator: Any) -> Any:
    steps = getattr(estimator, "steps", None)
    first = steps[0][-1] if isinstance(steps, list) and steps else estimator
    return first if type(first).__name__ == "DictVectorizer" and hasattr(first, "feature_names_") else None


def _dict_columns(vectorizer: Any) -> list[Column]:
    """Return the members of the dictionaries: ``city=Paris`` is a value of a text, a name without the separator is a number.

    All of them are optional, as they are for the vectorizer: a member that is not there, or has no value, counts as 0.
    """
    known: dict[str, list[str]] = {}
    for feature in vectorizer.feature_names_:
        name, separator, value = str(feature).partition(vectorizer.separator)
        values = known.setdefault(name, [])
        if separator:
            values.append(value)
    columns = [Column(name, "BYTES", "object", values) if values else Column(name, "FP64", "float64") for name, values in known.items()]
    for column in columns:
        column.let_out()
    return columns
