"""The builder as a whole, on the log in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from libs.environments import EnvironmentUnavailableError, ImpossibleEnvironmentError, make_lock
from libs.errors import DeadlineExceededError
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Clock
from libs.messaging.memory import MemoryBroker
from schemas.environment import EnvironmentLock, VersionBuildFailed, VersionBuilt
from schemas.topics import DLQ, EVENTS
from schemas.validation import VersionInspected
from services.builder.app import GROUP, build
from services.builder.environment import EnvironmentRequest
from services.builder.errors import BuildFailed
from services.builder.settings import Settings

LOCK = make_lock(f"scikit-learn==1.7.2 --hash=sha256:{'0' * 64}")


class FakeResolver:
    """Answers every request with one lock, after the errors it was given."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked: list[str] = []

    async def resolve(self, request: EnvironmentRequest) -> EnvironmentLock:
        self.asked.append(request.text)
        if self.errors:
            raise self.errors.pop(0)
        return LOCK


class FakeEnvironments:
    """Remembers what was ensured."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.there: set[str] = set()

    def holds(self, lock: EnvironmentLock) -> bool:
        return lock.environment_id in self.there

    async def ensure(self, lock: EnvironmentLock) -> Path:
        if self.errors:
            raise self.errors.pop(0)
        self.there.add(lock.environment_id)
        return Path(lock.environment_id)


@pytest.fixture
def resolver() -> FakeResolver:
    return FakeResolver()


@pytest.fixture
def environments() -> FakeEnvironments:
    return FakeEnvironments()


@asynccontextmanager
async def _builder(broker: MemoryBroker, clock: Clock, resolver: FakeResolver, environments: FakeEnvironments) -> AsyncIterator[None]:
    """A running builder; on leaving the block it has handled every event that was there."""
    (runner,) = build(Settings(), broker=broker, resolver=resolver, environments=environments, clock=clock)
    await runner.start()
    running = asyncio.create_task(runner.run())
    try:
        yield
        written = len(broker.records(EVENTS.name))
        async with asyncio.timeout(5):
            while broker.committed(GROUP, EVENTS.name) < written:
                await asyncio.sleep(0.001)
                if running.done():
                    running.result()
    finally:
        await runner.stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _answers(
    broker: MemoryBroker, clock: Clock, resolver: FakeResolver, environments: FakeEnvironments, *asked: VersionInspected
) -> list[cloudevents.Event[Any]]:
    """What the builder says when it finds these facts on the log."""
    events = [cloudevents.new_event(fact, "/millrace/validator", now=clock(), event_id=f"e{n}") for n, fact in enumerate(asked)]
    await broker.append([cloudevents.write(event) for event in events])
    async with _builder(broker, clock, resolver, environments):
        pass
    return [cloudevents.read(record) for record in broker.records(EVENTS.name)[len(asked) :]]


def _inspected(version: int = 1, requirements: tuple[str, ...] = ("scikit-learn==1.7.2",)) -> VersionInspected:
    return VersionInspected(model_name="iris", version=version, format="sklearn", requirements=requirements, inferred=False)


async def test_an_inspected_version_gets_its_environment(
    memory_broker: MemoryBroker, clock: Clock, resolver: FakeResolver, environments: FakeEnvironments
) -> None:
    (built,) = await _answers(memory_broker, clock, resolver, environments, _inspected())
    assert isinstance(built.data, VersionBuilt)
    assert (built.data.model_name, built.data.version, built.data.environment) == ("iris", 1, LOCK)
    assert not built.data.reused
    assert (built.causation_id, built.source) == ("e0", "/millrace/builder")
    assert environments.holds(LOCK)
    assert resolver.asked == ["numpy\nscikit-learn==1.7.2\n"]


async def test_an_equal_environment_is_used_again(
    memory_broker: MemoryBroker, clock: Clock, resolver: FakeResolver, environments: FakeEnvironments
) -> None:
    answers = await _answers(memory_broker, clock, resolver, environments, _inspected(1), _inspected(2))
    assert [answer.data.reused for answer in answers] == [False, True]


async def test_a_build_that_takes_long_holds_up_no_other_model(memory_broker: MemoryBroker, clock: Clock, resolver: FakeResolver) -> None:
    ends = asyncio.Event()

    class Slow(FakeEnvironments):
        async def ensure(self, lock: EnvironmentLock) -> Path:
            if len(resolver.asked) < 2:
                await ends.wait()
            ends.set()
            return await super().ensure(lock)

    other = _inspected().model_copy(update={"model_name": "wine"})
    answers = await _answers(memory_broker, clock, resolver, Slow(), _inspected(), other)
    assert [answer.data.model_name for answer in answers] == ["wine", "iris"]


async def test_requirements_that_cannot_be_met_end_the_version_with_the_reason(
    memory_broker: MemoryBroker, clock: Clock, environments: FakeEnvironments
) -> None:
    resolver = FakeResolver(BuildFailed("The requirements cannot be met: a needs b.", "Because a needs b"))
    (failed,) = await _answers(memory_broker, clock, resolver, environments, _inspected())
    assert failed.data == VersionBuildFailed(
        model_name="iris", version=1, reason="The requirements cannot be met: a needs b.", evidence="Because a needs b"
    )


async def test_requirements_that_are_more_than_names_end_the_version(
    memory_broker: MemoryBroker, clock: Clock, resolver: FakeResolver, environments: FakeEnvironments
) -> None:
    (failed,) = await _answers(memory_broker, clock, resolver, environments, _inspected(requirements=("-e .",)))
    assert isinstance(failed.data, VersionBuildFailed)
    assert "is an option" in failed.data.reason
    assert resolver.asked == []


@pytest.mark.parametrize("error", [ImpossibleEnvironmentError("It cannot be installed."), DeadlineExceededError("It took too long.")])
async def test_an_environment_that_cannot_be_installed_ends_the_version(
    memory_broker: MemoryBroker, clock: Clock, resolver: FakeResolver, error: ImpossibleEnvironmentError | DeadlineExceededError
) -> None:
    (failed,) = await _answers(memory_broker, clock, resolver, FakeEnvironments(error), _inspected())
    assert isinstance(failed.data, VersionBuildFailed)
    assert failed.data.reason == error.message


async def test_an_index_that_is_away_is_waited_for(memory_broker: MemoryBroker, clock: Clock, environments: FakeEnvironments) -> None:
    resolver = FakeResolver(EnvironmentUnavailableError("The package index cannot be reached."))
    (built,) = await _answers(memory_broker, clock, resolver, environments, _inspected())
    assert isinstance(built.data, VersionBuilt)
    assert memory_broker.records(DLQ.name) == ()


async def test_a_repeated_event_is_answered_with_the_same_id(clock: Clock, resolver: FakeResolver, environments: FakeEnvironments) -> None:
    (first,) = await _answers(MemoryBroker(), clock, resolver, environments, _inspected())
    (again,) = await _answers(MemoryBroker(), clock, resolver, environments, _inspected())
    assert first.id == again.id
