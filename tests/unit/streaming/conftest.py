"""Streaming in one process: the log in memory, runners that are fakes on real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from libs.artifacts import MemoryStore
from libs.inference.pool import RunnerPool
from libs.inference.spans import RunnerSpans
from libs.lifecycle import Component
from libs.messaging import cloudevents, follower
from libs.messaging.follower import Follower
from libs.messaging.memory import MemoryBroker
from libs.messaging.records import Record
from libs.messaging.retry import Retry
from libs.metrics import Metrics
from schemas.base import Payload
from schemas.environment import EnvironmentLock
from schemas.inference import Datatype, Signature, TensorSpec
from schemas.registry import Artifact, ArtifactFormat, DeploymentSnapshot, DeploymentStatus, EndpointSnapshot, Replica
from schemas.topics import DLQ, STATE_DEPLOYMENTS, STATE_ENDPOINTS, inference_requests, inference_results
from services.streaming import answering, streams
from services.streaming.answering import AnswerLimits, AnswerParts
from services.streaming.claims import Claims
from services.streaming.memory import MemoryStreamLog
from services.streaming.state import State
from services.streaming.streams import StreamLimits, StreamParts, Streams
from tests.unit.runners import KEY, FakeRunner

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ID = "shop.iris.1"
REQUESTS, RESULTS = inference_requests("shop").name, inference_results("shop").name
GROUP = "millrace-streaming-shop"
SOON = Retry(first_s=0.001, longest_s=0.01)


def signature(columns: int = 2) -> Signature:
    rows = TensorSpec(name="input", datatype=Datatype.FP64, shape=(-1, columns))
    return Signature(inputs=(rows,), outputs=(TensorSpec(name="predict", datatype=Datatype.FP64, shape=(-1,)),))


def deployment(**changes: Any) -> DeploymentSnapshot:
    """A deployment; without replicas nobody answers for it."""
    values: dict[str, Any] = {
        "deployment_id": ID,
        "generation": 1,
        "endpoint_name": "shop",
        "model_name": "iris",
        "version": 1,
        "status": DeploymentStatus.READY if changes.get("replicas") else DeploymentStatus.DEGRADED,
        "artifact": Artifact(sha256="0" * 64, size_bytes=1, filename="m.joblib"),
        "format": ArtifactFormat.SKLEARN,
        "environment": EnvironmentLock(environment_id="0" * 16, python="3.11", platform="x86_64-linux", lock=""),
        "signature": signature(),
        "min_replicas": 1,
        "max_replicas": 1,
        "created_at": NOW,
        "updated_at": NOW,
        **changes,
    }
    return DeploymentSnapshot(**values)


@dataclass
class World:
    """Streaming's parts, and what is around them."""

    directory: Path
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    store: MemoryStore = field(default_factory=MemoryStore)
    runners: list[FakeRunner] = field(default_factory=list)
    limits: StreamLimits = field(default_factory=lambda: StreamLimits(chunk_records=100))
    answer_limits: AnswerLimits = field(default_factory=lambda: AnswerLimits(timeout_s=5.0))
    spans: RunnerSpans | None = None
    metrics: Metrics = field(default_factory=Metrics)
    created: list[str] = field(default_factory=list)
    logs: list[MemoryStreamLog] = field(default_factory=list)
    state: State = field(default_factory=State)

    def streams(self) -> list[Component]:
        """The components of streaming, as after a start of the process."""
        key_file = self.directory / "runner.key"
        key_file.write_bytes(KEY + b"\n")

        async def create(topics: Sequence[Any]) -> None:
            self.broker.check_reachable()
            self.created += [topic.name for topic in topics]

        def stream_log(endpoint_name: str) -> MemoryStreamLog:
            self.logs.append(MemoryStreamLog(self.broker, endpoint_name))
            return self.logs[-1]

        state = self.state = State()
        pool = RunnerPool(key_file, self.spans or RunnerSpans(None))
        parts = AnswerParts(
            state,
            pool,
            Claims(self.store, self.answer_limits.claimed_bytes),
            self.answer_limits,
            SOON,
            lambda: NOW,
            self.metrics,
            is_traced=self.spans is not None,
        )
        return [
            Follower(self.broker, [STATE_ENDPOINTS.name, STATE_DEPLOYMENTS.name], state.apply),
            Streams(StreamParts(state, stream_log, create, parts, self.limits)),
        ]

    async def publish(self, *payloads: Payload) -> None:
        """Say something on the log."""
        events = [cloudevents.new_event(payload, "/test", now=NOW) for payload in payloads]
        await self.broker.append([cloudevents.write(event) for event in events])

    async def forget(self, topic: str, entity: str) -> None:
        await self.broker.append([cloudevents.tombstone(topic, entity)])

    async def endpoint(self, *replicas: Replica, **changes: Any) -> None:
        """The endpoint ``shop`` with one deployment that these replicas answer for."""
        times = {"created_at": NOW, "updated_at": NOW}
        await self.publish(
            EndpointSnapshot(endpoint_name="shop", traffic={ID: 100}, deployment_ids=(ID,), **times),
            deployment(replicas=replicas, **changes),
        )

    async def runner(self, offset: float = 0.0) -> FakeRunner:
        """A running fake runner."""
        number = len(self.runners)
        runner = FakeRunner(f"r{number}", self.directory / f"r{number}.sock", offset)
        await runner.start()
        self.runners.append(runner)
        return runner

    async def ask(self, *bodies: Any, key: str | None = None, **headers: str) -> None:
        """Put requests on the topic; a body that is not bytes is written as JSON."""
        values = [body if isinstance(body, bytes) or body is None else json.dumps(body).encode() for body in bodies]
        heads = tuple((name, value.encode()) for name, value in headers.items())
        await self.broker.append([Record(REQUESTS, None if key is None else key.encode(), value, heads) for value in values])

    async def results(self, count: int) -> list[dict[str, Any]]:
        """The first so many results, once they are there and committed."""
        await self.until(lambda: len(self.broker.records(RESULTS)) >= count <= self.broker.committed(GROUP, REQUESTS))
        return [json.loads(record.value or b"") for record in self.broker.records(RESULTS)]

    def dead_letters(self) -> list[Any]:
        return [cloudevents.read(record).data for record in self.broker.records(DLQ.name)]

    async def until(self, condition: Callable[[], object]) -> None:
        """Let everybody work until something is so."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 (the log in memory is looked at; nobody tells)
                await asyncio.sleep(0.001)


@asynccontextmanager
async def running(components: Sequence[Component]) -> AsyncIterator[None]:
    """Components at work, as ``libs.lifecycle`` runs them; what one raises is raised."""
    tasks: list[asyncio.Task[None]] = []
    async with AsyncExitStack() as stack:
        for component in components:
            await component.start()
            stack.push_async_callback(component.stop)
            tasks.append(asyncio.create_task(component.run()))
        yield
    done, pending = await asyncio.wait(tasks, timeout=2)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in seconds takes milliseconds."""
    for module in (follower, streams):
        monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr(streams, "PATIENCE_S", 0.02)
    monkeypatch.setattr(answering, "_PAUSE_S", 0.005)
    monkeypatch.setattr(answering, "_REFUSED_PAUSE_S", 0.005)
    monkeypatch.setattr(answering, "_SILENT_PAUSE_S", 0.01)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    for runner in made.runners:
        await runner.stop()


@pytest.fixture
def run() -> Any:
    """``running``, for the tests."""
    return running
