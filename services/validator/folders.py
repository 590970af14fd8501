"""Which file of a set is the model, and what lies beside it."""

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from libs.artifacts.manifest import Manifest
from libs.requirement_lines import lines_of, without_mlflow
from schemas.validation import Finding
from services.validator.formats import MODEL_SUFFIXES
from services.validator.rules import rejection

_IMPORT = re.compile(rb"^\s*(?:import|from)\s+([A-Za-z_]\w*)", re.MULTILINE)
_MOST_SHOWN = 5
_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A set of files in a folder; ``model`` is the path of the model's file in it."""

    root: Path
    manifest: Manifest
    model: str | None = None


def find_model(manifest: Manifest, kind: str) -> tuple[str | None, tuple[Finding, ...]]:
    """Return the path of the model's file, or why there is none that is plainly it.

    It is the only one with the suffix of a model at the top, or at the top of the one folder that everything is in; in a folder that MLflow
    saved a model in, ``model.pkl``.
    """
    top = _top(manifest.paths)
    here = [path for path in manifest.paths if path.startswith(top) and "/" not in path[len(top) :]]
    if f"{top}MLmodel" in here and f"{top}model.pkl" in here:
        return f"{top}model.pkl", ()
    candidates = [path for path in here if path.endswith(MODEL_SUFFIXES)]
    if len(candidates) == 1:
        return candidates[0], ()
    if candidates:
        message = f"{kind} with {len(candidates)} files that may be the model ({_shown(candidates)}); leave one of them at its top"
    else:
        message = f"{kind} without a model's file ({', '.join(MODEL_SUFFIXES)}) at its top"
        deeper = [path for path in manifest.paths if path.endswith(MODEL_SUFFIXES)]
        message += f"; it has {_shown(deeper)} in folders" if deeper else ""
    return None, (rejection("archive.model", f"the artifact is {message}", candidates=candidates[:_MOST_SHOWN]),)


def mlflow_requirements(files: Unpacked) -> tuple[str, ...] | None:
    """The requirements that MLflow saved with a model, without MLflow itself, which only saves models; None where there are none."""
    folder = files.root / os.path.dirname(files.model or "")
    if not (folder / "MLmodel").is_file() or not (folder / "requirements.txt").is_file():
        return None
    with (folder / "requirements.txt").open("rb") as file:
        text = file.read(_MAX_TEXT_BYTES).decode("utf-8", "replace")
    return tuple(without_mlflow(lines_of(text)))


def modules(paths: Sequence[str]) -> frozenset[str]:
    """Names that code can be imported by: its modules and packages at the top."""
    found = set()
    for path in paths:
        name, separator, _ = path.partition("/")
        if separator or name.endswith(".py"):
            found.add(name.removesuffix(".py"))
    return frozenset(name for name in found if name.isidentifier())


def imported(code: Unpacked) -> frozenset[str]:
    """Top-level modules that the files of code name in their imports, as far as a look at their lines tells."""
    found: set[str] = set()
    for file in code.manifest.files:
        if file.path.endswith(".py"):
            with (code.root / file.path).open("rb") as source:
                found.update(name.decode() for name in _IMPORT.findall(source.read(_MAX_TEXT_BYTES)))
    return frozenset(found)


def _top(paths: Sequence[str]) -> str:
    """The folder that all files are in, with a slash at its end; empty when there is none."""
    folders = [os.path.dirname(path) for path in paths]
    common = os.path.commonpath(folders) if all(folders) else ""
    return f"{common}/" if common else ""


def _shown(paths: Sequence[str]) -> str:
    named = ", ".join(f"'{path}'" for path in paths[:_MOST_SHOWN])
    return f"{named} and {len(paths) - _MOST_SHOWN} more" if len(paths) > _MOST_SHOWN else named
