"""What ``millrace models upload`` is given: a model's file, or a folder that MLflow saved a model in."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libs.cli.errors import UsageError

_SUFFIXES = (".joblib", ".pkl", ".pickle", ".onnx")
_MLFLOW = re.compile(r"mlflow(-skinny|-tracing)?\s*($|[\[=<>!~;@ ])", re.IGNORECASE)
_EXAMPLES = ("serving_input_example.json", "input_example.json")
"""The first has the form of a request, and newer versions of MLflow write both."""


@dataclass(frozen=True, slots=True)
class Given:
    """The file to upload, and what lies beside it in a folder of MLflow."""

    file: Path
    requirements: Path | None = None
    example: Path | None = None


def resolve(path: Path) -> Given:
    """Say which file is to be uploaded; raises ``UsageError`` with the remedy when that is not plain."""
    if path.is_file():
        return Given(path)
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    if not path.is_dir():
        raise UsageError(f"{path} is neither a file nor a directory; upload the model's file")
    if (path / "MLmodel").is_file():
        return _mlflow_model(path)
    files = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    wanted = f"the model's file in it: {path / files[0]}" if len(files) == 1 else "the model's file in it"
    raise UsageError(f"{path} is a directory, and a model is one file; upload {wanted}")


def without_mlflow(lines: Sequence[str]) -> list[str]:
    """Requirements without MLflow itself, which saves models and is not needed to serve them."""
    return [line for line in lines if not _MLFLOW.match(line)]


def as_request(example: Any) -> Any:
    """MLflow's example as a request: a table is saved as ``columns`` and ``data`` without the name of the form."""
    if isinstance(example, dict) and "data" in example and set(example) <= {"columns", "index", "data"}:
        if "columns" in example:
            return {"dataframe_split": example}
        return {"instances": example["data"]}
    return example


def _mlflow_model(folder: Path) -> Given:
    file = folder / "model.pkl"
    if not file.is_file():
        raise UsageError(f"{folder} is an MLflow model without a model.pkl, so not one of scikit-learn; upload the model's own file")
    beside = [folder / name for name in ("requirements.txt", *_EXAMPLES)]
    requirements, *examples = [path if path.is_file() else None for path in beside]
    return Given(file, requirements, examples[0] or examples[1])
