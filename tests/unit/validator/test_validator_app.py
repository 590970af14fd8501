"""The validator as a whole, on the log in memory, with real artifacts and real runners."""

import asyncio
import hashlib
import pickle
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from libs.artifacts.memory import MemoryStore
from libs.environments import ImpossibleEnvironmentError, make_lock
from libs.errors import ConfigurationError, InvalidMessage
from libs.messaging import cloudevents
from libs.messaging.memory import MemoryBroker
from libs.settings import ProcessSettings
from schemas.base import Payload
from schemas.environment import EnvironmentLock, VersionBuilt
from schemas.registry import Artifact, ArtifactFormat, ExampleSet, VersionRegistered, VersionSnapshot, VersionSpec, VersionStatus
from schemas.topics import DLQ, EVENTS
from schemas.validation import Gate, VersionInspected, VersionNeedsExample, VersionRejected, VersionValidated
from services.validator import adapters
from services.validator.adapters import Versions, Workplace
from services.validator.app import GROUP, build
from services.validator.handlers import Handlers, Tools
from services.validator.rules import rejection
from services.validator.settings import Settings
from services.validator.validation import Trial, Validation
from tests.unit.runner.models import on_request, row_sums
from tests.unit.validator.files import fitted, saved

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LOCK = make_lock(f"scikit-learn==1.7.2 --hash=sha256:{'0' * 64}")
EXAMPLE = {"instances": [[1.0, 2.0, 3.0]]}


class OwnEnvironment:
    """Every environment is the one that the tests run in."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def ensure(self, lock: EnvironmentLock) -> Path:
        if self.error:
            raise self.error
        return Path(sys.executable)


async def stored(store: MemoryStore, content: bytes) -> Artifact:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    artifact = await store.put(chunks(), max_bytes=1 << 30)
    return Artifact(sha256=artifact.sha256, size_bytes=len(content), filename="m.joblib")


@asynccontextmanager
async def validator(broker: MemoryBroker, store: MemoryStore, home: Path, **parts: Any) -> AsyncIterator[None]:
    """A running validator; on leaving the block it has handled every event that was there."""
    settings = Settings(process=ProcessSettings(home=home))
    components = build(settings, broker=broker, store=store, clock=lambda: NOW, **{"environments": OwnEnvironment(), **parts})
    started = []
    running: list[asyncio.Task[None]] = []
    try:
        for component in components:
            started.append(component)
            await component.start()
            running.append(asyncio.create_task(component.run()))
        yield
        written = len(broker.records(EVENTS.name))
        async with asyncio.timeout(20):
            while broker.committed(GROUP, EVENTS.name) < written:
                await asyncio.sleep(0.005)
                for task in running:
                    if task.done():
                        task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for component in reversed(started):
            await component.stop()


async def said(broker: MemoryBroker, store: MemoryStore, home: Path, *facts: Payload, **parts: Any) -> list[Any]:
    """What the validator says when it finds these facts on the log."""
    events = [cloudevents.new_event(fact, "/millrace/registry", now=NOW, event_id=f"e{n}") for n, fact in enumerate(facts)]
    on_log = sum(event.data.topic == EVENTS.name for event in events)
    await broker.append([cloudevents.write(event) for event in events])
    async with validator(broker, store, home, **parts):
        pass
    return [cloudevents.read(record).data for record in broker.records(EVENTS.name)[on_log:]]


def registered(artifact: Artifact, **changes: Any) -> VersionRegistered:
    return VersionRegistered(model_name="iris", version=1, spec=VersionSpec(artifact=artifact, **changes))


def snapshot(artifact: Artifact, **changes: Any) -> VersionSnapshot:
    spec = VersionSpec(artifact=artifact, example=EXAMPLE)
    values: dict[str, Any] = {"status": VersionStatus.BUILT, "spec": spec, "format": ArtifactFormat.SKLEARN, **changes}
    return VersionSnapshot(model_name="iris", version=1, created_at=NOW, updated_at=NOW, **values)


BUILT = VersionBuilt(model_name="iris", version=1, environment=LOCK, reused=False, resolve_s=0.1, install_s=0.1)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def test_a_good_artifact_is_inspected(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, saved(fitted(), tmp_path / "m").read_bytes())
    (fact,) = await said(memory_broker, store, tmp_path / "home", registered(artifact))
    assert isinstance(fact, VersionInspected)
    assert (fact.format, fact.inferred, fact.findings) == ("sklearn", True, ())
    assert any(line.startswith("scikit-learn==") for line in fact.requirements)


async def test_a_hostile_artifact_is_rejected_before_anything_is_built(
    memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path
) -> None:
    artifact = await stored(store, b"cposix\nsystem\n(S'id'\ntR.")
    (fact,) = await said(memory_broker, store, tmp_path / "home", registered(artifact))
    assert isinstance(fact, VersionRejected)
    assert (fact.gate, fact.reason) == (
        Gate.INSPECTION,
        "the artifact imports 'posix.system' when it is loaded, which no model needs; if that is meant, upload it with --allow-code",
    )


@pytest.mark.parametrize(("allowed", "fact_type"), [("true", VersionInspected), ("false", VersionRejected)])
async def test_an_uploader_consents_to_code_where_the_operator_allows_it(
    memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str, fact_type: type
) -> None:
    monkeypatch.setenv("VALIDATOR_ALLOW_CODE", allowed)
    artifact = await stored(store, pickle.dumps(str.split))
    (fact,) = await said(memory_broker, store, tmp_path / "home", registered(artifact, allow_code=True))
    assert type(fact) is fact_type


async def test_an_artifact_that_is_not_in_the_store_is_rejected(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    (fact,) = await said(memory_broker, store, tmp_path / "home", registered(Artifact(sha256=digest, size_bytes=1, filename="m.joblib")))
    assert isinstance(fact, VersionRejected)
    assert [finding.rule for finding in fact.findings] == ["artifact.missing"]


async def test_a_wrong_size_is_rejected(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, pickle.dumps(1))
    (fact,) = await said(memory_broker, store, tmp_path / "home", registered(artifact.model_copy(update={"size_bytes": 1})))
    assert fact.findings[0].rule == "artifact.size"


async def test_text_that_no_event_can_carry_is_made_printable(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, b"\x80\x04X\x05\x00\x00\x00os\xed\xa0\x80X\x03\x00\x00\x00a\nb\x93.")
    (fact,) = await said(memory_broker, store, tmp_path / "home", registered(artifact))
    assert isinstance(fact, VersionRejected)
    assert "os\ufffd" in fact.findings[0].message


@pytest.mark.parametrize("known_format", [ArtifactFormat.SKLEARN, None])
async def test_a_built_version_is_tried_in_its_environment(
    known_format: ArtifactFormat | None, memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path
) -> None:
    artifact = await stored(store, pickle.dumps(row_sums()))
    (fact,) = await said(memory_broker, store, tmp_path / "home", snapshot(artifact, format=known_format), BUILT)
    assert isinstance(fact, VersionValidated)
    assert fact.golden == {"request": EXAMPLE, "response": {"predictions": [6.0]}}
    assert fact.measurements.predict_p50_s is not None
    assert fact.signature.inputs[0].shape == (-1, 3)
    assert list((tmp_path / "home").rglob("artifact*")) == []


POSITIVE = "X.sum(1) if (X > 2).all() else 1 / 0"
"""Answers a row whose numbers are all greater than 2, which no made-up row has."""


async def test_a_model_that_answers_no_made_up_row_needs_an_example(
    memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path
) -> None:
    artifact = await stored(store, pickle.dumps(on_request(POSITIVE)))
    (fact,) = await said(memory_broker, store, tmp_path / "home", snapshot(artifact, spec=VersionSpec(artifact=artifact)), BUILT)
    assert isinstance(fact, VersionNeedsExample)
    assert fact.reason == "there is no example, and the model refused a made-up row: the model raised ZeroDivisionError: division by zero"
    assert fact.signature.inputs[0].shape == (-1, 3)


@pytest.mark.parametrize(("row", "verdict"), [([3.0, 4.0, 5.0], VersionValidated), ([0.0, 4.0, 5.0], VersionRejected)])
async def test_a_version_that_waited_is_tried_with_its_new_example(
    row: list[float], verdict: type[Payload], memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path
) -> None:
    artifact = await stored(store, pickle.dumps(on_request(POSITIVE)))
    example = {"instances": [row]}
    given = VersionSpec(artifact=artifact, example=example)
    waiting = snapshot(artifact, spec=given, status=VersionStatus.NEEDS_EXAMPLE, environment=LOCK)
    (fact,) = await said(memory_broker, store, tmp_path / "home", waiting, ExampleSet(model_name="iris", version=1, example=example))
    assert type(fact) is verdict


@pytest.mark.parametrize("status", [VersionStatus.VALIDATED, VersionStatus.ARCHIVED])
async def test_an_example_that_is_read_again_when_all_is_decided_is_not_tried(
    status: VersionStatus, memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path
) -> None:
    artifact = await stored(store, pickle.dumps(row_sums()))
    decided = snapshot(artifact, status=status, environment=LOCK)
    assert await said(memory_broker, store, tmp_path / "home", decided, ExampleSet(model_name="iris", version=1, example=EXAMPLE)) == []


async def test_a_built_version_waits_for_what_is_known_of_it(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, pickle.dumps(row_sums()))
    await memory_broker.append([cloudevents.write(cloudevents.new_event(BUILT, "/millrace/builder", now=NOW))])
    async with validator(memory_broker, store, tmp_path / "home"):
        await asyncio.sleep(0)
        await memory_broker.append([cloudevents.write(cloudevents.new_event(snapshot(artifact), "/millrace/registry", now=NOW))])
    assert isinstance(cloudevents.read(memory_broker.records(EVENTS.name)[-1]).data, VersionValidated)
    assert memory_broker.records(DLQ.name) == ()


async def test_an_event_about_a_version_that_nobody_registered_is_given_up(store: MemoryStore, tmp_path: Path) -> None:
    tools = Tools(Versions(), store, OwnEnvironment(), Workplace(tmp_path), Settings().limits, 1 << 20, snapshot_wait_s=0.1)
    event = cloudevents.new_event(BUILT, "/millrace/builder", now=NOW)
    with pytest.raises(InvalidMessage, match="the registry knows no version 1 of 'iris'"):
        await Handlers(tools).built(event)


async def test_a_model_that_hangs_holds_up_no_other(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, pickle.dumps(row_sums()))
    other = snapshot(artifact).model_copy(update={"model_name": "wine", "spec": VersionSpec(artifact=artifact, example=None)})
    hangs, ends = asyncio.Event(), asyncio.Event()

    async def attempt(trial: Trial, work_dir: Path) -> Validation:
        if trial.example is None:
            ends.set()
        else:
            hangs.set()
            await ends.wait()
        return Validation(findings=(rejection("trial.start", "it does not load"),))

    facts = (snapshot(artifact), other, BUILT, BUILT.model_copy(update={"model_name": "wine"}))
    verdicts = await said(memory_broker, store, tmp_path / "home", *facts, attempt=attempt)
    assert hangs.is_set()
    assert {verdict.model_name for verdict in verdicts} == {"iris", "wine"}


async def test_an_environment_that_cannot_be_installed_is_rejected(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, pickle.dumps(row_sums()))
    broken = OwnEnvironment(ImpossibleEnvironmentError("The environment cannot be installed: no wheel."))
    (fact,) = await said(memory_broker, store, tmp_path / "home", snapshot(artifact), BUILT, environments=broken)
    assert isinstance(fact, VersionRejected)
    assert (fact.gate, fact.reason) == (Gate.VALIDATION, "The environment cannot be installed: no wheel.")


async def test_a_model_that_fails_its_trial_is_rejected(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, pickle.dumps({"no": "model"}))
    (fact,) = await said(memory_broker, store, tmp_path / "home", snapshot(artifact), BUILT)
    assert isinstance(fact, VersionRejected)
    assert fact.reason == "the artifact holds dict, which has no predict method; save the fitted model itself, not what it is kept in"


async def test_a_machine_without_a_sandbox_refuses_to_start(tmp_path: Path) -> None:
    from dataclasses import replace

    from services.validator.validation import TrialLimits

    class Vacuum(TrialLimits):
        @property
        def cage(self) -> Any:
            return replace(TrialLimits().cage, required=("vacuum",))

    workplace = adapters.Workplace(tmp_path / "work")
    await workplace.start()
    with pytest.raises(ConfigurationError, match="models cannot be tried on this machine: the sandbox layer 'vacuum' is required"):
        await adapters.SandboxCheck(workplace, Vacuum()).start()
