"""What ``millrace models upload`` is given: a model's file, an archive, a folder, or a folder that MLflow saved a model in."""

import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libs.cli.errors import CommandError, UsageError

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_LEFT_OUT = ("__pycache__", ".git", ".ipynb_checkpoints", ".DS_Store")
"""What Python, git and others leave beside files."""

_SUFFIXES = (".joblib", ".pkl", ".pickle", ".onnx")
_CODE = re.compile(r"^\s+code: *['\"]?([\w.-]+)['\"]?\s*$", re.MULTILINE)
_EXAMPLES = ("serving_input_example.json", "input_example.json")
"""The first has the form of a request, and newer versions of MLflow write both."""


@dataclass(frozen=True, slots=True)
class Given:
    """The file or folder to upload, and what lies beside the file in a folder of MLflow."""

    path: Path
    requirements: Path | None = None
    example: Path | None = None
    code: Path | None = None


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
    if not any(name.endswith(_SUFFIXES) for name, _ in _files(path)):
        raise UsageError(f"{path} is a directory without a model's file ({', '.join(_SUFFIXES)}) in it")
    return Given(path)


@contextmanager
def packed(path: Path, prefix: str = "") -> Iterator[Path]:
    """A file as it is; a folder as an archive that is gone afterwards, the same for the same files, with ``prefix`` before their names."""
    if not path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="millrace-") as directory:
        archive = Path(directory) / f"{path.resolve().name or 'files'}.tar"
        try:
            _pack(path, archive, prefix)
        except OSError as error:
            raise CommandError(f"{path} cannot be read: {error}") from error
        yield archive


def check_code(path: Path) -> str:
    """Check what ``--code`` names, a folder of modules, a package's folder, a module or an archive; what comes before names in it."""
    if path.is_dir():
        top = {name.split("/")[0] for name, _ in _files(path) if name.endswith(".py")}
        if not top:
            raise UsageError(f"{path} has no Python module in it")
        return f"{path.resolve().name}/" if "__init__.py" in top else ""
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    if path.suffix == ".py" and not path.stem.isidentifier():
        raise UsageError(f"{path} is no module that can be imported: '{path.stem}' is no name in Python")
    if path.suffix != ".py" and not path.name.endswith(_ARCHIVES):
        raise UsageError(f"{path} is neither a folder, a Python module (.py) nor an archive ({', '.join(_ARCHIVES)})")
    return ""


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Files below a folder in the order of their names, which are relative to it; raises ``UsageError`` for what no set may have."""
    from libs.artifacts.manifest import Paths
    from libs.errors import InvalidArgumentError

    found: list[tuple[str, Path]] = []
    paths = Paths()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in [*files, *folders]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise UsageError(f"{path} is a link, which does not travel; put what it leads to in its place")
            if name in folders or name in _LEFT_OUT:
                continue
            if not path.is_file():
                raise UsageError(f"{path} is neither a file nor a directory")
            try:
                paths.add(relative)
            except InvalidArgumentError as error:
                raise UsageError(f"{folder} cannot be uploaded: {error.message}") from error
            found.append((relative, path))
    return sorted(found)


def _pack(folder: Path, archive: Path, prefix: str) -> None:
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in _files(folder):
            with path.open("rb") as file:
                entry = tarfile.TarInfo(prefix + name)  # of nobody, and made at no time
                entry.size = os.fstat(file.fileno()).st_size
                tar.addfile(entry, file)


def as_request(example: Any) -> Any:
    """MLflow's example as a request: a table is saved as ``columns`` and ``data`` without the name of the form."""
    if isinstance(example, dict) and "data" in example and set(example) <= {"columns", "index", "data"}:
        if "columns" in example:
            return {"dataframe_split": example}
        return {"instances": example["data"]}
    return example


def _mlflow_model(folder: Path) -> Given:
    file = folder / "model.pkl"
    if not file.is_file() and any(name.endswith(_SUFFIXES) for name in os.listdir(folder)):
        return Given(folder)
    if not file.is_file():
        raise UsageError(f"{folder} is an MLflow model without a model.pkl, so not one of scikit-learn; upload the model's own file")
    beside = [folder / name for name in ("requirements.txt", *_EXAMPLES)]
    requirements, *examples = [path if path.is_file() else None for path in beside]
    return Given(file, requirements, examples[0] or examples[1], _mlflow_code(folder))


def _mlflow_code(folder: Path) -> Path | None:
    """The folder of modules that MLflow saved with a model (``code_paths``), if there is one."""
    named = _CODE.search((folder / "MLmodel").read_text("utf-8", "replace"))
    code = folder / named[1] if named is not None else folder
    return code if named is not None and "/" not in named[1] and code.is_dir() and not code.is_symlink() else None
