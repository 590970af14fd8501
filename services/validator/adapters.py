"""What the validator asks of the outside: environments, a place to work in, the registry's view of a version."""

import asyncio
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Protocol

from libs.errors import ConfigurationError, InvalidMessage
from libs.inference.errors import RunnerStartError
from libs.inference.supervisor import RunnerProcess, RunnerSpec
from libs.messaging import cloudevents
from libs.messaging.records import Record
from schemas.environment import EnvironmentLock
from schemas.registry import VersionSnapshot
from services.validator.validation import TrialLimits

log = logging.getLogger(__name__)


class Environments(Protocol):
    """Model environments by their lock (``libs.environments.EnvironmentCache``)."""

    async def ensure(self, lock: EnvironmentLock) -> Path:
        """Return the interpreter of the environment, installing it first where it is missing."""
        ...


class Versions:
    """The registry's latest word on every version, folded from its state topic."""

    def __init__(self) -> None:
        self._by_entity: dict[str, VersionSnapshot] = {}

    def apply(self, record: Record) -> None:
        """Take a record of the state topic; one that cannot be read is skipped."""
        if record.value is None:
            self._by_entity.pop((record.key or b"").decode("utf-8", "replace"), None)
            return
        try:
            data = cloudevents.read(record).data
        except InvalidMessage as error:
            log.warning("skipped %s offset %d: %s", record.topic, record.offset, error)
            return
        if isinstance(data, VersionSnapshot):
            self._by_entity[data.entity] = data

    def get(self, model_name: str, version: int) -> VersionSnapshot | None:
        """Return what is known of a version; ``None`` before its first snapshot was read."""
        return self._by_entity.get(f"{model_name}@{version}")


class Workplace:
    """The directory in which artifacts are looked at and tried; a component, so that leftovers of a killed process are gone at start."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def start(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, mode=0o700)

    async def run(self) -> None:
        """Nothing to watch."""
        await _forever()

    async def stop(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class SandboxCheck:
    """Refuses to start where models cannot be caged: the first upload would be a bad moment to notice."""

    def __init__(self, workplace: Workplace, limits: TrialLimits) -> None:
        self._workplace = workplace
        self._limits = limits

    async def start(self) -> None:
        """Start a runner on nothing; it must fail for want of an artifact, not of a sandbox.

        Raises
        ------
        ConfigurationError
            A required layer of the sandbox cannot be had.
        """
        with tempfile.TemporaryDirectory(dir=self._workplace.path) as folder:
            spec = RunnerSpec(
                python=Path(sys.executable),
                artifact=Path(folder),
                format="none",
                runner_id="check",
                token="check",  # noqa: S106 (nobody will ask this runner anything)
                address="tcp:127.0.0.1:0",
                scratch=Path(folder),
                log=Path(folder) / "log",
                cage=self._limits.cage,
                start_timeout_s=30.0,
            )
            try:
                runner = await RunnerProcess.start(spec)
            except RunnerStartError as error:
                if error.kind != "unknown_format":
                    raise ConfigurationError(f"models cannot be tried on this machine: {error.message}") from error
                return
            await runner.stop()

    async def run(self) -> None:
        """Nothing to watch."""
        await _forever()

    async def stop(self) -> None:
        pass


async def _forever() -> None:
    await asyncio.Event().wait()
