"""scikit-learn estimators and what follows their interface, saved by joblib or pickle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InvalidInputError, LoadError, first_sentence
from ..wire import Arrays, WireError, datatype_of

INPUT_NAME = "input"
METHODS = ("predict", "predict_proba", "decision_function")
_TEXT_MODULE = "sklearn.feature_extraction.text"
_NOT_FITTED = "NotFittedError"
_CHECKS_OF_INPUT = ("sklearn.utils.validation", "sklearn.utils._array_api")


def load(path: str) -> SklearnModel:
    """Read the file; this runs its code."""
    try:
        from joblib import load as load_file
    except ImportError:
        import pickle

        with open(path, "rb") as file:
            estimator = pickle.load(file)  # noqa: S301 (this is the one place, inside the cage)
    else:
        estimator = load_file(path)
    return SklearnModel(estimator)


class SklearnModel:
    """An estimator that answers one input with its methods.

    Parameters
    ----------
    estimator
        Any object with ``predict``, or failing that ``transform``.
    """

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        self._methods = [name for name in METHODS if _has(estimator, name)]
        if "predict" not in self._methods and _has(estimator, "transform"):
            self._methods = ["transform"]
        if not self._methods:
            raise LoadError("not_a_model", f"the artifact holds {_type_name(estimator)}, which has no predict method")
        self._takes_text = _takes_text(estimator)
        self._feature_names = _feature_names(estimator)
        self._frame = _frame_maker(estimator, self._feature_names)

    def describe(self) -> dict[str, Any]:
        n_features = _n_features(self._estimator)
        if self._takes_text:
            sample: Any = np.array(["a sample", "another"], dtype=object)
            input_spec = {"name": INPUT_NAME, "datatype": "BYTES", "shape": [-1]}
        else:
            sample = np.zeros((2, max(n_features, 1)))
            input_spec = {"name": INPUT_NAME, "datatype": "FP64", "shape": [-1, n_features]}
        outputs = [self._describe_output(name, sample) for name in self._methods]
        answered = [spec for spec in outputs if spec is not None]
        if not answered:
            raise LoadError("not_a_model", f"{_type_name(self._estimator)} gives no answer that is an array")
        return {"inputs": [input_spec], "outputs": answered, "feature_names": self._feature_names}

    def predict(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        values = inputs[INPUT_NAME]
        if self._takes_text:
            values = np.array([_text(element) for element in values.tolist()], dtype=object)
        return {name: self._call(name, values) for name in outputs}

    def _call(self, method: str, values: Any) -> Any:
        try:
            answer = getattr(self._estimator, method)(self._frame(values))
        except ValueError as error:
            if type(error).__name__ != _NOT_FITTED and _is_about_input(error):
                raise InvalidInputError(first_sentence(error)) from error
            raise
        return answer.toarray() if hasattr(answer, "toarray") else np.asarray(answer)

    def _describe_output(self, method: str, sample: Any) -> dict[str, Any] | None:
        """Ask the method for two made-up rows; a method that takes none of ours is described by what is known of it."""
        try:
            answer = self._call(method, sample)
            if answer.ndim == 0 or answer.shape[0] != len(sample):
                return None
            return {"name": method, "datatype": datatype_of(answer.dtype), "shape": [-1, *answer.shape[1:]]}
        except WireError:
            return None
        except BaseException as error:  # the model's code may raise anything; what it says to real input is seen later
            if method == self._methods[0] and type(error).__name__ == _NOT_FITTED:
                raise LoadError("not_a_model", f"the artifact holds {_type_name(self._estimator)}, which is not fitted") from error
            return self._guess_output(method)

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


def _first_step(estimator: Any) -> Any:
    """Return what sees the input first: the first step of a pipeline, the estimator inside a search."""
    for _ in range(8):
        steps = getattr(estimator, "steps", None)
        if isinstance(steps, list) and steps:
            estimator = steps[0][-1]
        elif hasattr(estimator, "best_estimator_"):
            estimator = estimator.best_estimator_
        else:
            break
    return estimator


def _takes_text(estimator: Any) -> bool:
    return any(kind.__module__ == _TEXT_MODULE for kind in type(_first_step(estimator)).__mro__)


def _n_features(estimator: Any) -> int:
    """Return the number of columns seen in fit, or -1 when the estimator does not tell."""
    for candidate in (estimator, _first_step(estimator)):
        try:
            return int(candidate.n_features_in_)
        except (AttributeError, TypeError, ValueError):
            continue
    return -1


def _feature_names(estimator: Any) -> list[str] | None:
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        return None
    return [str(name) for name in names]


def _frame_maker(estimator: Any, names: list[str] | None) -> Any:
    """Return what turns an array into what the estimator takes: a column transformer that selects by name needs names."""
    if names is None or type(_first_step(estimator)).__name__ != "ColumnTransformer":
        return _unchanged
    try:
        from pandas import DataFrame  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return _unchanged
    return lambda values: DataFrame(values, columns=names)


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
