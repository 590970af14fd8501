"""Artifacts for the tests: honest models that need NumPy only, so that a runner starts quickly, and hostile ones."""

import functools
import pickle
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from libs.inference.supervisor import RunnerProcess, RunnerSpec
from libs.runner.cage import CageSpec, platform_layers

STRICT = CageSpec(memory_bytes=1 << 30, cpu_s=20, file_size_bytes=1 << 20, required=platform_layers())


class Source:
    """Pickles as an expression that is evaluated when it is loaded."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __reduce__(self) -> Any:
        return eval, (self.expression,)


class Call:
    """Pickles as a call that is made when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class UnknownModule:
    """Pickles as a name in a module that no environment has."""

    def __reduce__(self) -> str:
        return "UnknownModule"


def row_sums() -> Any:
    """An honest model: the sum of each row of three numbers."""
    return SimpleNamespace(predict=functools.partial(np.sum, axis=1), n_features_in_=3)


def model(expression: str) -> Any:
    """A model whose ``predict`` is the function that the expression gives; loading evaluates it.

    A runner asks a fresh model for five and for seven rows of zeros: an expression that looks at ``len(X)`` can behave until a request
    comes.
    """
    return SimpleNamespace(predict=Source(expression), n_features_in_=3)


def on_request(expression: str) -> Any:
    """A model that behaves while it is loaded and evaluates the expression when one row is predicted."""
    return model(f"lambda X: X.sum(1) if len(X) > 1 else ({expression})")


def write(value: Any, path: Path) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=4))
    return path


@asynccontextmanager
async def running(artifact: Any, folder: Path, **changes: Any) -> AsyncIterator[RunnerProcess]:
    """Start a runner on a value (pickled) or a file, and see to its end."""
    runner = await RunnerProcess.start(spec(artifact, folder, **changes))
    try:
        yield runner
    finally:
        await runner.stop(grace_s=0.5)


def spec(artifact: Any, folder: Path, **changes: Any) -> RunnerSpec:
    path = artifact if isinstance(artifact, Path) else write(artifact, folder / "model.pkl")
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    made = RunnerSpec(
        python=Path(sys.executable),
        artifact=path,
        format="sklearn",
        runner_id="r1",
        token="secret-token",
        address="tcp:127.0.0.1:0",
        scratch=scratch,
        log=folder / "log",
        cage=STRICT,
        start_timeout_s=20.0,
    )
    return replace(made, **changes)
