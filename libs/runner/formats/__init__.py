"""One adapter per model format: load a file, describe its tensors, answer named arrays with named arrays.

Signature as a dictionary: ``{"inputs": [{"name", "datatype", "shape"}], "outputs": […], "feature_names": [str] | None}``; a
dimension of any size is -1. The first output is what a request gets that names none. An input with a ``dtype`` is a column of a table;
``ignored_columns`` are those that the model does not use, ``training_columns`` then all of them in order.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import LoadError, describe_exception, own_line
from ..wire import Arrays

_ADAPTERS = {"sklearn": ".sklearn", "onnx": ".onnx"}


class Model(Protocol):
    """A loaded model."""

    def describe(self) -> dict[str, Any]:
        """Return the signature."""
        ...

    def predict(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Answer ``inputs``, which fit the signature, with the named ``outputs``.

        Raises
        ------
        InvalidInputError
            The model's library rejects the values, such as a NaN where it takes none.
        """
        ...


def open_model(name: str, path: str, declared: Mapping[str, Any] | None = None, code: str | None = None) -> Model:
    """Load the artifact with the adapter of its format.

    ``declared`` is what is known of the signature: as the uploader declares it, or as it was found in the trial. ``code`` is the folder of
    the modules that came with the model.

    Raises
    ------
    LoadError
        The artifact cannot become a model; the message says why in one sentence.
    """
    if name not in _ADAPTERS:
        raise LoadError("unknown_format", f"the runner knows the formats {', '.join(sorted(_ADAPTERS))}, not {name!r}")
    try:
        adapter = importlib.import_module(_ADAPTERS[name], __name__)
        model: Model = adapter.load(path, declared or {})
    except LoadError:
        raise
    except BaseException as error:  # loading runs the artifact's code: it may raise anything, SystemExit too
        raise explain(error, code) from error
    return model


def explain(error: BaseException, code: str | None = None) -> LoadError:
    """Turn what loading raised into one clear sentence, with the line of the model's own code that it came from."""
    explained, line = _explained(error), own_line(error, code)
    if line is not None:
        explained.message += f" ({line})"
    return explained


def _explained(error: BaseException) -> LoadError:
    text = describe_exception(error)
    kind = type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing_module(error.name)
    if isinstance(error, (ImportError, AttributeError)):
        return LoadError("missing_name", f"the artifact needs a name that its environment does not have: {text}")
    if isinstance(error, MemoryError):
        return LoadError("memory", "loading the artifact needs more memory than it is allowed")
    if isinstance(error, PermissionError):
        return LoadError("forbidden", f"loading the artifact tried something that the sandbox forbids: {text}")
    if isinstance(error, SystemExit):
        return LoadError("load_failed", "loading the artifact tried to end the process (SystemExit)")
    return LoadError("load_failed", f"loading the artifact failed: {kind}: {text}")


def _missing_module(name: str) -> LoadError:
    root = name.partition(".")[0]
    if root != name and importlib.util.find_spec(root) is not None:
        version = getattr(importlib.import_module(root), "__version__", "of another version")
        message = f"the artifact needs the module '{name}', which {root} {version} in its environment does not have"
    else:
        message = f"the artifact needs the module '{name}', which its environment does not have"
    return LoadError("missing_module", message, module=name)
