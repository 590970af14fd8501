"""What the validator does with events: one function per gate."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from libs import telemetry
from libs.artifacts.cache import fetch_set, store_set
from libs.artifacts.store import ArtifactCorruptError, ArtifactNotFoundError, ArtifactStore
from libs.environments import ImpossibleEnvironmentError
from libs.errors import InvalidArgumentError, InvalidMessage, TransientError
from libs.inference import examples
from libs.messaging.cloudevents import Event
from libs.messaging.processing import Handler
from schemas.artifacts import FileSet
from schemas.base import Payload
from schemas.environment import EnvironmentLock, VersionBuilt
from schemas.registry import ArtifactFormat, ExampleSet, VersionRegistered, VersionSnapshot, VersionSpec, VersionStatus
from schemas.validation import Finding, Gate, VersionInspected, VersionNeedsExample, VersionRejected, VersionValidated
from services.validator.adapters import Environments, Versions, Workplace
from services.validator.folders import Unpacked
from services.validator.inspection import Code, Inspection, inspect
from services.validator.pickle_scan import Consent
from services.validator.rules import most_important, rejection, rejections
from services.validator.validation import Trial, TrialLimits, Validation, validate

_SNAPSHOT_POLL_S = 0.05

Try = Callable[[Trial, Path], Awaitable[Validation]]


async def try_in_runner(trial: Trial, work_dir: Path) -> Validation:
    """Try a version in a runner of its own."""
    return await validate(trial, work_dir=work_dir)


@dataclass(frozen=True, slots=True)
class Tools:
    """What the handlers work with."""

    versions: Versions
    store: ArtifactStore
    environments: Environments
    workplace: Workplace
    limits: TrialLimits
    expanded_max_bytes: int
    allow_code: bool = True
    attempt: Try = try_in_runner
    snapshot_wait_s: float = 60.0


class Handlers:
    """Says of every registered version whether it may be built, and of every built one whether it may be deployed.

    Repeating is harmless: the verdict on the same content is the same, and the fact's id is derived from its cause.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def table(self) -> Mapping[type[Payload], Handler]:
        """Handler by event."""
        return {VersionRegistered: self.registered, VersionBuilt: self.built, ExampleSet: self.example_set}

    async def registered(self, event: Event[VersionRegistered]) -> Sequence[Payload]:
        """The first gate."""
        version = event.data
        with telemetry.tracer().start_as_current_span("inspect artifact") as span:
            try:
                async with self._fetched(version.spec) as (path, code):
                    inspection = await asyncio.to_thread(self._inspect, path, code, version.spec)
                    if inspection.accepted:
                        await self._store_sets(inspection)
            except (ArtifactNotFoundError, ArtifactCorruptError, InvalidArgumentError) as error:
                finding = rejection("artifact.missing", error.message, sha256=version.spec.artifact.sha256)
                return [_rejected(version, Gate.INSPECTION, (finding,))]
            span.set_attribute("millrace.verdict", "inspected" if inspection.accepted else "rejected")
        return [_inspected(version, inspection)]

    def _inspect(self, path: Path, code: Code | None, spec: VersionSpec) -> Inspection:
        return inspect(
            path,
            size_bytes=spec.artifact.size_bytes,
            declared_format=spec.format,
            requirements=spec.requirements,
            expanded_limit_bytes=self._tools.expanded_max_bytes,
            consent=Consent(given=spec.allow_code, permitted=self._tools.allow_code),
            code=code,
        )

    async def _store_sets(self, inspection: Inspection) -> None:
        """Put what was unpacked into the store; nothing refers to it before the fact is on the log."""
        for unpacked in (inspection.files, inspection.code):
            if unpacked is not None:
                await store_set(self._tools.store, unpacked.manifest, unpacked.root)

    async def built(self, event: Event[VersionBuilt]) -> Sequence[Payload]:
        """The second gate.

        Raises
        ------
        TransientError
            This machine cannot try it now.
        InvalidMessage
            The registry knows no such version.
        """
        known = await self._known(event.data)
        return await self._judged(known, event.data, event.data.environment)

    async def example_set(self, event: Event[ExampleSet]) -> Sequence[Payload]:
        """The second gate again, for a version that waited for an example.

        Raises
        ------
        TransientError
            This machine cannot try it now.
        InvalidMessage
            The registry knows no such version with this example.
        """
        version = event.data
        known = await self._known(version, lambda known: not _waits(known) or known.spec.example == version.example)
        if not _waits(known) or known.environment is None:
            return []  # read again, or archived meanwhile: there is nothing left to decide
        return await self._judged(known, version, known.environment)

    async def _judged(self, known: VersionSnapshot, version: VersionBuilt | ExampleSet, environment: EnvironmentLock) -> Sequence[Payload]:
        with telemetry.tracer().start_as_current_span("validate version") as span:
            try:
                async with self._present(known) as files:
                    verdict = await self._try(files, known, environment)
            except (ArtifactNotFoundError, ArtifactCorruptError, InvalidArgumentError) as error:
                finding = rejection("artifact.missing", error.message, sha256=known.spec.artifact.sha256)
                return [_rejected(version, Gate.VALIDATION, (finding,))]
            except ImpossibleEnvironmentError as error:
                return [_rejected(version, Gate.VALIDATION, (rejection("trial.environment", error.message),))]
            fact = _verdict(version, verdict)
            span.set_attribute("millrace.verdict", fact.event_type.split(".")[-2])
        return [fact]

    async def _known(
        self, version: VersionBuilt | ExampleSet, current: Callable[[VersionSnapshot], bool] = lambda _: True
    ) -> VersionSnapshot:
        """Return the registry's snapshot of a version; fact and snapshot come from two topics, so it may be read a little later."""
        try:
            async with asyncio.timeout(self._tools.snapshot_wait_s):
                while True:
                    known = self._tools.versions.get(version.model_name, version.version)
                    if known is not None and current(known):
                        return known
                    await asyncio.sleep(_SNAPSHOT_POLL_S)  # milliseconds, once
        except TimeoutError as error:
            raise InvalidMessage(f"the registry knows no version {version.version} of {version.model_name!r}") from error

    async def _try(self, files: "_Files", known: VersionSnapshot, environment: EnvironmentLock) -> Validation:
        python = await self._tools.environments.ensure(environment)
        spec = known.spec
        signature = spec.signature or (examples.shown_columns(spec.example) if spec.example else None)
        trial = Trial(
            python,
            files.model,
            files.format,
            spec.example,
            signature,
            spec.forbid_batching,
            self._tools.limits,
            files=files.folder,
            code=files.code,
        )
        return await self._tools.attempt(trial, self._tools.workplace.path)

    @asynccontextmanager
    async def _present(self, known: VersionSnapshot) -> AsyncIterator["_Files"]:
        """The files of a version, as the first gate left them; the snapshot may be older than that verdict, then look again."""
        if known.format is None:
            async with self._fetched(known.spec) as (path, code):
                inspection = await asyncio.to_thread(self._inspect, path, code, known.spec)
                if inspection.format is None:
                    raise TransientError(f"the format of version {known.version} of {known.model_name} is not known yet")
                files, modules = inspection.files, inspection.code
                model = path if files is None else files.root / (files.model or "")
                yield _Files(inspection.format, model, _root(files), _root(modules))
            return
        with tempfile.TemporaryDirectory(dir=self._tools.workplace.path, prefix="artifact-") as directory:
            place = Path(directory)
            folder = await self._set_in(place / "files", known.files)
            code_folder = await self._set_in(place / "code", known.code)
            if folder is None or known.files is None:
                await self._tools.store.fetch_to(known.spec.artifact.sha256, place / "artifact")
                yield _Files(known.format, place / "artifact", None, code_folder)
            else:
                yield _Files(known.format, folder / (known.files.model or ""), folder, code_folder)

    async def _set_in(self, folder: Path, wanted: FileSet | None) -> Path | None:
        if wanted is None:
            return None
        await fetch_set(self._tools.store, wanted.sha256, folder)
        return folder

    @asynccontextmanager
    async def _fetched(self, spec: VersionSpec) -> AsyncIterator[tuple[Path, Code | None]]:
        """What was uploaded."""
        with tempfile.TemporaryDirectory(dir=self._tools.workplace.path, prefix="artifact-") as folder:
            path = Path(folder) / "artifact"
            await self._tools.store.fetch_to(spec.artifact.sha256, path)
            code: Code | None = None
            if spec.code is not None:
                code = Code(Path(folder) / "code", spec.code.filename)
                await self._tools.store.fetch_to(spec.code.sha256, code.path)
            yield path, code


@dataclass(frozen=True, slots=True)
class _Files:
    """Where a version's files are while it is tried; ``folder`` is that of a set, ``code`` that of the modules beside the model."""

    format: ArtifactFormat
    model: Path
    folder: Path | None
    code: Path | None


def _root(unpacked: Unpacked | None) -> Path | None:
    return None if unpacked is None else unpacked.root


def _file_set(unpacked: Unpacked | None) -> FileSet | None:
    if unpacked is None:
        return None
    manifest = unpacked.manifest
    return FileSet(sha256=manifest.sha256, size_bytes=manifest.size_bytes, files=len(manifest.files), model=unpacked.model)


def _inspected(version: VersionRegistered, inspection: Inspection) -> Payload:
    if not inspection.accepted or inspection.format is None:
        return _rejected(version, Gate.INSPECTION, inspection.findings)
    return VersionInspected(
        model_name=version.model_name,
        version=version.version,
        format=inspection.format.value,
        files=_file_set(inspection.files),
        code=_file_set(inspection.code),
        requirements=inspection.requirements,
        inferred=inspection.inferred,
        findings=most_important(inspection.findings),
    )


def _waits(version: VersionSnapshot) -> bool:
    return version.status is VersionStatus.NEEDS_EXAMPLE


def _verdict(version: VersionBuilt | ExampleSet, verdict: Validation) -> VersionNeedsExample | VersionValidated | VersionRejected:
    if verdict.needs_example and verdict.signature is not None:
        return VersionNeedsExample(
            model_name=version.model_name,
            version=version.version,
            signature=verdict.signature,
            reason=verdict.reason,
            cage=verdict.cage,
            findings=most_important(verdict.findings),
        )
    if not verdict.accepted or verdict.signature is None or verdict.measurements is None:
        return _rejected(version, Gate.VALIDATION, verdict.findings)
    return VersionValidated(
        model_name=version.model_name,
        version=version.version,
        signature=verdict.signature,
        measurements=verdict.measurements,
        golden=verdict.golden,
        cage=verdict.cage,
        findings=most_important(verdict.findings),
    )


def _rejected(version: VersionRegistered | VersionBuilt | ExampleSet, gate: Gate, findings: tuple[Finding, ...]) -> VersionRejected:
    return VersionRejected(
        model_name=version.model_name,
        version=version.version,
        gate=gate,
        reason=rejections(findings)[0].message,
        findings=most_important(findings),
    )
