"""The Serve deployment class: one replica supervises one runner. Nothing of a model is imported or unpickled here."""

import asyncio
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from libs.artifacts.cache import ArtifactCache
from libs.artifacts.factory import from_settings
from libs.environments import EnvironmentCache
from libs.inference.client import RunnerClient
from libs.inference.supervisor import RunnerExit, RunnerProcess, RunnerSpec
from libs.inference.tokens import runner_token
from libs.runner.cage import REQUIRED_LAYERS, CageSpec
from libs.settings import ArtifactSettings
from services.serving import adapters
from services.serving.keeper import Announcement, RunnerKeeper
from services.serving.spec import ReplicaSpec

PING_TIMEOUT_S = 5.0
DRAIN_S = 5.0
"""How long a stopping runner may take to finish what it was asked; gateways have been told by then."""


class ModelRunner:
    """A runner and a connection to it; what ``RunnerKeeper`` keeps."""

    def __init__(self, process: RunnerProcess) -> None:
        self._process = process
        self._client: RunnerClient = process.client()

    @property
    def address(self) -> str:
        return self._process.address

    async def ping(self) -> float:
        return await self._client.ping(timeout_s=PING_TIMEOUT_S)

    async def wait_exit(self) -> RunnerExit:
        return await self._process.wait_exit()

    async def stop(self) -> None:
        await self._client.close()
        await self._process.stop(DRAIN_S)

    def kill(self) -> None:
        self._process.kill()


@dataclass(frozen=True, slots=True)
class _Files:
    """Where a version's files are; ``folder`` is that of a set, ``code`` that of the modules beside the model."""

    model: Path
    folder: Path | None
    code: Path | None


class ModelReplica:
    """Fetches an artifact, ensures its environment, keeps a runner of it alive.

    Serve makes it with a ``ReplicaSpec`` as JSON, calls ``check_health`` and, at the end, ``__del__`` (both may be coroutines). It takes no
    requests: gateways talk to the runner, whose address is announced by ``adapters.announce``.
    """

    async def __init__(self, spec: str) -> None:  # type: ignore[misc]  # Serve awaits it
        adapters.keep_on_loopback()
        self._spec = ReplicaSpec.model_validate_json(spec)
        self._replica_id = adapters.own_replica_id()
        self._directory = adapters.replica_directory(self._replica_id)
        places = self._spec.places
        self._damaged: Counter[str] = Counter()
        store = from_settings(ArtifactSettings(url=places.artifacts_url))
        self._artifacts = ArtifactCache(places.artifact_cache_dir, store, on_damaged=lambda: self._damaged.update(["artifact"]))
        self._keeper = RunnerKeeper(self._start_runner, self._announce, predict_timeout_s=self._spec.limits.predict_timeout_s)
        try:
            self._runner_spec = await self._prepare()
            await self._keeper.start()
        except Exception as error:
            await asyncio.to_thread(adapters.announce_failure, self._spec.deployment_id, str(error))
            raise

    async def check_health(self) -> None:
        """Raise when the runner does not answer or cannot be brought back; while it is being restarted the replica is healthy."""
        await self._keeper.check()

    async def __del__(self) -> None:
        await self._keeper.stop()
        await asyncio.to_thread(adapters.remove_directory, self._directory)

    async def _prepare(self) -> RunnerSpec:
        spec, places = self._spec, self._spec.places
        environments = EnvironmentCache(places.environments_dir, on_damaged=lambda: self._damaged.update(["environment"]))
        python, files = await asyncio.gather(environments.ensure(spec.environment), self._files())
        key = await asyncio.to_thread(places.runner_key_file.read_bytes)
        scratch = self._directory / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        return RunnerSpec(
            python=python,
            artifact=files.model,
            format=spec.format.value,
            runner_id=self._replica_id,
            token=runner_token(key.strip(), self._replica_id),
            address=adapters.listen_address(places.listen, self._directory),
            scratch=scratch,
            log=adapters.runner_log(spec.deployment_id, self._replica_id),
            cage=CageSpec(memory_bytes=spec.limits.memory_bytes, file_size_bytes=spec.limits.file_size_bytes, required=REQUIRED_LAYERS),
            threads=spec.limits.threads,
            start_timeout_s=spec.limits.start_timeout_s,
            predict_timeout_s=spec.limits.predict_timeout_s,
            signature=spec.signature,
            files=files.folder,
            code=files.code,
        )

    async def _files(self) -> "_Files":
        """Verified copies of what the version is made of."""
        spec = self._spec
        code = None if spec.code is None else await self._artifacts.ensure_set(spec.code.sha256)
        if spec.files is None:
            return _Files(await self._artifacts.ensure(spec.artifact_sha256), None, code)
        folder = await self._artifacts.ensure_set(spec.files.sha256)
        return _Files(folder / (spec.files.model or ""), folder, code)

    async def _start_runner(self) -> ModelRunner:
        await self._files()  # a copy may have been damaged since the last start
        return ModelRunner(await RunnerProcess.start(self._runner_spec))

    async def _announce(self, announcement: Announcement) -> None:
        await asyncio.to_thread(adapters.announce, self._spec.deployment_id, self._replica_id, announcement, self._damaged)
