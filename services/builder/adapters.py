"""uv as the builder's resolver, with a memory."""

import asyncio
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

from libs.environments import EnvironmentUnavailableError, base_python, find_uv, first_cause, make_lock, run_uv
from libs.errors import DeadlineExceededError, InvalidArgumentError
from schemas.environment import EnvironmentLock
from services.builder.environment import EnvironmentRequest, explain
from services.builder.errors import BuildFailed

log = logging.getLogger(__name__)

RESOLUTION_MAX_AGE_S = 7 * 24 * 3600.0
RESOLUTION_TIMEOUT_S = 120.0


class Resolver(Protocol):
    """Chooses packages; the builder calls it once for every version it builds, from the event loop, for several at once."""

    async def resolve(self, request: EnvironmentRequest) -> EnvironmentLock:
        """The lock for a request.

        Raises
        ------
        BuildFailed
            The requirements cannot be met.
        EnvironmentUnavailableError
            The package index cannot be reached.
        """
        ...


class Environments(Protocol):
    """Where environments are; ``libs.environments.EnvironmentCache`` is one."""

    def holds(self, lock: EnvironmentLock) -> bool:
        """Whether the environment is there, complete."""
        ...

    async def ensure(self, lock: EnvironmentLock) -> Path:
        """Make the environment unless it is there.

        Raises
        ------
        ImpossibleEnvironmentError, EnvironmentUnavailableError, DeadlineExceededError
            As ``EnvironmentCache.ensure`` does.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Remembered:
    lock: str
    age_s: float


class UvResolver:
    """Resolution by ``uv pip compile``: wheels only, every package pinned and hashed.

    What was resolved is remembered in ``<directory>/<key>.json``, so equal requirements give an equal lock, and versions uploaded together
    share one environment, although the index moves on. Staleness: a resolution is used for ``max_age_s`` (a week) and then made again,
    which picks up new releases of whatever the requirements leave open; it is used for longer only while the index cannot be reached.
    A version that is built keeps the lock of its event for ever. Failures are not remembered.

    Parameters
    ----------
    directory
        Where resolutions are kept; created with the first one. Removing it is always safe.
    clock
        Seconds since the epoch.
    """

    def __init__(
        self,
        directory: Path,
        *,
        uv: Path | None = None,
        timeout_s: float = RESOLUTION_TIMEOUT_S,
        max_age_s: float = RESOLUTION_MAX_AGE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._uv = uv or find_uv()
        self._timeout_s = timeout_s
        self._max_age_s = max_age_s
        self._clock = clock
        self._resolving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def resolve(self, request: EnvironmentRequest) -> EnvironmentLock:
        async with self._resolving.setdefault(request.key, asyncio.Lock()):
            return await self._resolve(request)

    async def _resolve(self, request: EnvironmentRequest) -> EnvironmentLock:
        remembered = self._recall(request)
        if remembered and remembered.age_s <= self._max_age_s:
            return _lock(request, remembered.lock)
        try:
            text = await self._compile(request)
        except (EnvironmentUnavailableError, DeadlineExceededError):
            if not remembered:
                raise
            log.warning("the package index cannot be reached; using a resolution that is %.0f days old", remembered.age_s / 86_400)
            return _lock(request, remembered.lock)
        lock = _lock(request, text)
        self._remember(request, lock.lock)
        return lock

    async def _compile(self, request: EnvironmentRequest) -> str:
        python = await base_python(request.python, self._uv)
        with tempfile.TemporaryDirectory() as directory:
            asked = Path(directory, "requirements.txt")
            await asyncio.to_thread(asked.write_text, request.text)
            outcome = await run_uv(
                self._uv,
                *("pip", "compile", str(asked), "--python", str(python)),
                *("--generate-hashes", "--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet"),
                timeout_s=self._timeout_s,
            )
        if not outcome.status:
            return outcome.stdout
        if "No solution found" in outcome.stderr:
            raise BuildFailed(explain(outcome.stderr), outcome.stderr)
        raise BuildFailed(f"The requirements cannot be resolved: {first_cause(outcome.stderr)}", outcome.stderr)

    def _recall(self, request: EnvironmentRequest) -> _Remembered | None:
        try:
            row = json.loads(self._path(request).read_text())
            return _Remembered(str(row["lock"]), self._clock() - float(row["resolved_at"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self, request: EnvironmentRequest, lock: str) -> None:
        """A full disk must not fail a build that has succeeded, so an error here is only logged."""
        path = self._path(request)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        row = {"requirements": request.text.splitlines(), "resolved_at": self._clock(), "lock": lock}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(row))
            os.replace(part, path)
        except OSError as error:
            log.warning("cannot remember a resolution: %s", error)
            part.unlink(missing_ok=True)

    def _path(self, request: EnvironmentRequest) -> Path:
        return self._directory / f"{request.key}.json"


def _lock(request: EnvironmentRequest, text: str) -> EnvironmentLock:
    try:
        return make_lock(text, python=request.python, platform=request.platform)
    except InvalidArgumentError as error:
        raise BuildFailed(f"The requirements resolve to what is no lock: {error}", text) from error
