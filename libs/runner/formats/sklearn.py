"""scikit-learn estimators and what follows their interface, saved by joblib or pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, product
from typing import Any

import numpy as np

from ..errors import InvalidInputError, LoadError, first_sentence
from ..wire import Arrays, WireError, datatype_of
from .tables import Table, find_opaque, find_table, inner_of, unkept_columns, working_steps

INPUT_NAME = "input"
METHODS = ("predict", "predict_proba", "decision_function")
_TEXT_MODULE = "sklearn.feature_extraction.text"
_NOT_FITTED = "NotFittedError"
_CHECKS_OF_INPUT = (
    "sklearn.utils.validation",
    "sklearn.utils._array_api",
    "sklearn.preprocessing._encoders",
    "sklearn.utils._encode",
    _TEXT_MODULE,
)
_MOST_GUESSES = 16
"""Ways to take columns for text that are tried, at most."""

_SAMPLE_ROWS = 11
_MADE_UP_ROWS = (5, 7)
"""Two batches of made-up rows: an axis that has the size of both is the rows'."""


def load(path: str, declared: Mapping[str, Any]) -> SklearnModel:
    """Read the file; this runs its code. ``declared`` is the signature as far as it is known (see ``formats``)."""
    try:
        from joblib import load as load_file
    except ImportError:
        import pickle

        with open(path, "rb") as file:
            estimator = pickle.load(file)  # noqa: S301 (this is the one place, inside the cage)
    else:
        estimator = load_file(path)
    return SklearnModel(estimator, declared)


class SklearnModel:
    """An estimator that answers one input with its methods.

    Parameters
    ----------
    estimator
        Any object with ``predict``, or failing that ``transform``.
    declared
        What is known of the signature: ``inputs``, those with a ``dtype`` being columns.
    """

    def __init__(self, estimator: Any, declared: Mapping[str, Any] | None = None) -> None:
        self._estimator = estimator
        self._methods = [name for name in METHODS if _has(estimator, name)]
        if "predict" not in self._methods and _has(estimator, "transform"):
            self._methods = ["transform"]
        if not self._methods:
            remedy = "; save the fitted model itself, not what it is kept in" if isinstance(estimator, (dict, list, tuple)) else ""
            raise LoadError("not_a_model", f"the artifact holds {_type_name(estimator)}, which has no predict method{remedy}")
        self._feature_names = _feature_names(estimator)
        self._takes_text = self._feature_names is None and _takes_text(estimator)
        self._frame = _frame_maker(estimator, self._feature_names)
        self._declared = list((declared or {}).get("inputs", ()))
        self._table: Table | None = None if self._takes_text else find_table(estimator, self._feature_names, self._declared)
        self._opaque = [] if self._takes_text else find_opaque(estimator, self._feature_names, self._declared)
        self._sources: dict[str, tuple[str, int | None]] = {}
        self._takes_made_up = False

    def describe(self) -> dict[str, Any]:
        n_features = _n_features(self._estimator)
        if self._table is None and not self._takes_text and self._feature_names is None and not self._declared:
            self._refuse_unkept(n_features)
        self._guess_columns(n_features)
        outputs = [spec for name in self._methods for spec in self._describe_outputs(name, n_features)]
        if not outputs:
            raise LoadError("not_a_model", f"{_type_name(self._estimator)} gives no answer that is an array")
        if self._table is not None:
            inputs = [column.describe() for column in self._table.columns]
            return {
                "inputs": inputs,
                "outputs": outputs,
                "feature_names": None,
                "ignored_columns": self._table.ignored,
                "training_columns": self._table.order,
            }
        if self._takes_text:
            input_spec = {"name": INPUT_NAME, "datatype": "BYTES", "shape": [-1]}
        else:
            input_spec = {"name": INPUT_NAME, "datatype": "FP64", "shape": [-1, n_features]}
        return {"inputs": [input_spec], "outputs": outputs, "feature_names": self._feature_names}

    def _refuse_unkept(self, n_features: int) -> None:
        places = unkept_columns(self._estimator, n_features)
        if places:
            raise LoadError(
                "not_a_model",
                f"the model tells integers apart that a matrix of floats does not keep (column {places[0]}); "
                "train it on a DataFrame, whose columns have names, and they travel as integers",
            )

    def sample(self) -> dict[str, list[Any]] | None:
        """Return made-up rows that differ, as the columns of a V1 body, where the model takes a table."""
        return None if self._table is None else self._table.sample(_SAMPLE_ROWS)

    def predict(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        values, estimator = self._given(inputs), self._estimator
        sources = {name: self._sources.get(name, (name, None)) for name in outputs}
        methods = dict.fromkeys(method for method, _ in sources.values())
        if len(methods) > 1 and _is_pipeline(estimator):
            # Its methods would each begin with the same steps.
            values, estimator = self._guarded(self._before_last, values), estimator.steps[-1][1]
        answers = {method: self._guarded(getattr(estimator, method), values) for method in methods}
        named: Arrays = {}
        for name, (method, target) in sources.items():
            named[name] = _as_array(answers[method]) if target is None else _as_array(answers[method][target])
        return named

    def _before_last(self, values: Any) -> Any:
        """What the last step of a pipeline is given."""
        for _, step in self._estimator.steps[:-1]:
            if step is not None and step != "passthrough":
                values = step.transform(values)
        return values

    def _given(self, inputs: Arrays) -> Any:
        """What the estimator is given."""
        if self._table is not None:
            return self._table.frame(inputs)
        values = inputs[INPUT_NAME]
        if self._takes_text:
            return np.array([_text(element) for element in values.tolist()], dtype=object)
        return self._frame(values)

    def _made_up(self, count: int, n_features: int) -> Any:
        if self._table is not None:
            return self._table.frame(self._table.made_up(count))
        if self._takes_text:
            return np.array([f"a sample {index}" for index in range(count)], dtype=object)
        return self._frame(np.zeros((count, max(n_features, 1))))

    def _guess_columns(self, n_features: int) -> None:
        """Find out which of the columns that only functions see are text, when they do not take them all for numbers."""
        if not self._opaque or any(not spec.get("dtype") for spec in self._declared):
            return  # there are none, or it takes a matrix
        for is_text in islice(product((False, True), repeat=len(self._opaque)), _MOST_GUESSES):
            texts = [column for group, flag in zip(self._opaque, is_text) if flag for column in group]
            before, self._table = self._table, find_table(self._estimator, self._feature_names, self._declared, texts)
            try:
                getattr(self._estimator, self._methods[0])(self._made_up(_MADE_UP_ROWS[0], n_features))
            except BaseException as error:  # noqa: BLE001 (the model's code may raise anything)
                self._table = before
                if not texts and not isinstance(error, (TypeError, AttributeError)):
                    return  # it takes numbers, if not these
            else:
                self._opaque = []
                return

    def _call(self, method: str, values: Any) -> Any:
        """Return the method's answer: an array, or what becomes one; a list of arrays where there are several targets."""
        return self._guarded(getattr(self._estimator, method), values)

    def _guarded(self, function: Any, values: Any) -> Any:
        """Call the model's code; what it says of its input becomes ``InvalidInputError``."""
        try:
            return function(values)
        except ValueError as error:
            if type(error).__name__ != _NOT_FITTED and _is_about_input(error):
                raise InvalidInputError(first_sentence(error)) from error
            raise
        except (TypeError, AttributeError) as error:
            if not self._opaque:
                raise
            names = ", ".join(f"'{column.name}'" for group in self._opaque for column in group)
            text = f"a function of the model takes no numbers ({first_sentence(error)}), and nothing tells what belongs into {names}"
            raise InvalidInputError(f"{text}: give the version an example with names (--example), or a signature (--signature)") from error

    def _describe_outputs(self, method: str, n_features: int) -> list[dict[str, Any]]:
        """Ask the method for made-up rows; a method that takes none of ours is described by what is known of it.

        None if the first method has answered these rows and this one raises: it is there only to say that it is not supported.
        """
        try:
            answers = [self._call(method, self._made_up(count, n_features)) for count in _MADE_UP_ROWS]
        except BaseException as error:  # the model's code may raise anything; what it says to real input is seen later
            if method == self._methods[0] and type(error).__name__ == _NOT_FITTED:
                raise LoadError("not_a_model", f"the artifact holds {_type_name(self._estimator)}, which is not fitted") from error
            return [] if self._takes_made_up else [self._guess_output(method)]
        self._takes_made_up = True
        if not _has_targets(answers[0]):
            return self._described(method, answers)
        described = []
        for target in range(len(answers[0])):
            name = f"{method}_{target}"
            self._sources[name] = (method, target)
            described += self._described(name, [answer[target] for answer in answers])
        return described

    def _described(self, name: str, answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Describe an output by its answers to the two batches; none if its rows are not those of the batch."""
        try:
            arrays = [_as_array(answer) for answer in answers]
            datatype = datatype_of(arrays[0].dtype)
        except (WireError, ValueError) as error:
            if name == self._methods[0]:
                raise LoadError("not_a_model", f"the model's {name} gives what no datatype of the protocol holds: {error}") from error
            return []
        if any(array.ndim == 0 or len(array) != count for array, count in zip(arrays, _MADE_UP_ROWS)):
            return []
        return [{"name": name, "datatype": datatype, "shape": [-1, *arrays[0].shape[1:]]}]

    def _guess_output(self, method: str) -> dict[str, Any]:
        classes = getattr(self._estimator, "classes_", None)
        if method == "predict" and isinstance(classes, np.ndarray):
            return {"name": method, "datatype": datatype_of(classes.dtype), "shape": [-1]}
        if method == "predict_proba" and isinstance(classes, np.ndarray):
            return {"name": method, "datatype": "FP64", "shape": [-1, len(classes)]}
        return {"name": method, "datatype": "FP64", "shape": [-1]}


def _has(estimator: Any, method: str) -> bool:
    return callable(getattr(estimator, method, None))


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _is_pipeline(estimator: Any) -> bool:
    """Tell whether it is scikit-learn's own pipeline, with more than one step."""
    kind = type(estimator)
    return kind.__module__ == "sklearn.pipeline" and kind.__name__ == "Pipeline" and len(estimator.steps) > 1


def _first_step(estimator: Any) -> Any:
    """Return what sees the input first: the first step of a pipeline, the estimator inside a search."""
    for _ in range(8):
        inner = inner_of(estimator)
        if len(inner) != 1:
            break
        estimator = inner[0]
    return estimator


def _takes_text(estimator: Any, depth: int = 0) -> bool:
    """Tell whether a text vectorizer, itself or behind functions, sees the input as it comes, in any of the parts that see it."""
    if any(kind.__module__ == _TEXT_MODULE for kind in type(estimator).__mro__):
        return True
    steps = getattr(estimator, "steps", None)
    if isinstance(steps, list) and steps:
        parts = [step for step in working_steps(steps) if type(step).__name__ != "FunctionTransformer"][:1]
    else:
        parts = inner_of(estimator)
    return depth < 8 and any(_takes_text(part, depth + 1) for part in parts)


def _n_features(estimator: Any) -> int:
    """Return the number of columns seen in fit, or -1 when the estimator does not tell."""
    for candidate in (estimator, _first_step(estimator)):
        try:
            return int(candidate.n_features_in_)
        except (AttributeError, TypeError, ValueError):
            continue
    return -1


def _feature_names(estimator: Any, depth: int = 0) -> list[str] | None:
    """Return the names of the columns seen in fit, where the estimator or the first that sees its input tells them."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is not None:
        return [str(name) for name in names]
    inner = inner_of(estimator)
    return _feature_names(inner[0], depth + 1) if inner and depth < 8 else None


def _frame_maker(estimator: Any, names: list[str] | None) -> Any:
    """Return what turns an array into what the estimator takes: a column transformer or a function that selects by name needs names."""
    if names is None or not _selects(estimator):
        return _unchanged
    try:
        from pandas import DataFrame  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return _unchanged
    return lambda values: DataFrame(values, columns=names)


def _selects(estimator: Any, depth: int = 0) -> bool:
    """Tell whether something that sees the input may select columns by name."""
    if type(estimator).__name__ in ("ColumnTransformer", "FunctionTransformer"):
        return True
    return depth < 8 and any(_selects(part, depth + 1) for part in inner_of(estimator))


def _has_targets(answer: Any) -> bool:
    """Tell whether an answer is a list of arrays, one for each target, as ``predict_proba`` of several targets is."""
    return isinstance(answer, list) and bool(answer) and all(isinstance(part, np.ndarray) and part.ndim > 0 for part in answer)


def _as_array(answer: Any) -> Any:
    """Return an answer as an array; dates, for which the protocol has no datatype, as ISO 8601 text."""
    array = answer.toarray() if hasattr(answer, "toarray") else np.asarray(answer)
    return np.datetime_as_string(array).astype(object) if array.dtype.kind == "M" else array


def _unchanged(values: Any) -> Any:
    return values


def _text(element: Any) -> str:
    if not isinstance(element, bytes):
        return str(element)
    try:
        return element.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError("input 'input' has an element that is not UTF-8 text") from error


def _is_about_input(error: BaseException) -> bool:
    """Tell whether scikit-learn's own check of its input raised, by the function the exception came from."""
    trace = error.__traceback__
    module = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return module in _CHECKS_OF_INPUT
