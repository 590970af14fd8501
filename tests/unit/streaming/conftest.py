"""Serving in one process: the log in memory, a cluster that is a fake, runners that are fakes on real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from libs.errors import TransientError
from libs.inference.pool import RunnerPool
from libs.inference.spans import RunnerSpans
from libs.lifecycle import Component
from libs.messaging import cloudevents, consumer, follower
from libs.messaging.follower import Follower
from libs.messaging.memory import MemoryBroker
from libs.messaging.records import Record
from libs.messaging.retry import Retry
from schemas.base import Payload
from schemas.environment import EnvironmentLock
from schemas.inference import Datatype, Signature, TensorSpec
from schemas.registry import Artifact, ArtifactFormat, DeploymentSnapshot, DeploymentStatus, EndpointSnapshot, Replica
from schemas.topics import DLQ, EVENTS, STATE_DEPLOYMENTS, STATE_ENDPOINTS, inference_requests, inference_results
from services.serving import streaming
from services.serving.controller import Controller
from services.serving.errors import ClusterUnavailableError
from services.serving.reconcile import ActualDeployment, AppStatus
from services.serving.spec import Limits, Places, ReplicaSpec
from services.serving.state import State
from services.serving.streaming import StreamLimits, StreamParts, Streams
from tests.unit.runners import KEY, FakeRunner

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ID = "shop.iris.1"
REQUESTS, RESULTS = inference_requests("shop").name, inference_results("shop").name
GROUP = "millrace-serving-shop"
SOON = Retry(first_s=0.001, longest_s=0.01)
PLACES = Places(
    artifacts_url="file:///artifacts",
    artifact_cache_dir=Path("/cache"),
    environments_dir=Path("/environments"),
    runner_key_file=Path("/key"),
)


def signature(columns: int = 2) -> Signature:
    rows = TensorSpec(name="input", datatype=Datatype.FP64, shape=(-1, columns))
    return Signature(inputs=(rows,), outputs=(TensorSpec(name="predict", datatype=Datatype.FP64, shape=(-1,)),))


def deployment(**changes: Any) -> DeploymentSnapshot:
    """A deployment that has just been asked for."""
    values: dict[str, Any] = {
        "deployment_id": ID,
        "generation": 1,
        "endpoint_name": "shop",
        "model_name": "iris",
        "version": 1,
        "status": DeploymentStatus.PENDING,
        "artifact": Artifact(sha256="0" * 64, size_bytes=1, filename="m.joblib"),
        "format": ArtifactFormat.SKLEARN,
        "environment": EnvironmentLock(environment_id="0" * 16, python="3.11", platform="x86_64-linux", lock=""),
        "signature": signature(),
        "min_replicas": 1,
        "max_replicas": 1,
        "pending_traffic_percent": 100,
        "created_at": NOW,
        "updated_at": NOW,
        **changes,
    }
    return DeploymentSnapshot(**values)


class FakeCluster:
    """Ray Serve as a dictionary; the test says what becomes of what was applied.

    ``away`` makes every call fail, ``refuses`` those that are about one deployment. ``calls`` is what was asked for.
    """

    def __init__(self) -> None:
        self.apps: dict[str, ActualDeployment] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.away = False
        self.refuses = ""
        self.becomes: Callable[[str], Any] = lambda _: {"status": AppStatus.STARTING}

    async def start(self) -> None:
        self._check()

    async def stop(self) -> None:
        return None

    async def apply(self, spec: ReplicaSpec, generation: int, replicas: int) -> None:
        self._check(spec.deployment_id)
        self.calls.append(("apply", spec.deployment_id, generation, replicas))
        self.apps[spec.deployment_id] = ActualDeployment(
            generation=generation, digest=spec.digest, target_replicas=replicas, **self.becomes(spec.deployment_id)
        )

    async def scale(self, deployment_id: str, generation: int, replicas: int) -> None:
        self._check(deployment_id)
        self.calls.append(("scale", deployment_id, generation, replicas))
        self.change(deployment_id, generation=generation, target_replicas=replicas)

    async def delete(self, deployment_id: str) -> None:
        self._check(deployment_id)
        self.calls.append(("delete", deployment_id))
        self.change(deployment_id, status=AppStatus.DELETING, replicas=())

    async def status(self) -> dict[str, ActualDeployment]:
        self._check()
        return dict(self.apps)

    def change(self, deployment_id: str = ID, **changes: Any) -> None:
        """Let something become of an application."""
        self.apps[deployment_id] = replace(self.apps[deployment_id], **changes)

    def _check(self, deployment_id: str = "") -> None:
        if self.away or (deployment_id and deployment_id == self.refuses):
            raise ClusterUnavailableError("Ray does not answer: it plays being away")


@dataclass
class World:
    """Serving's parts, and what is around them."""

    directory: Path
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    cluster: FakeCluster = field(default_factory=FakeCluster)
    runners: list[FakeRunner] = field(default_factory=list)
    limits: StreamLimits = field(default_factory=lambda: StreamLimits(batch_records=16, in_flight=4, timeout_s=5.0))
    spans: RunnerSpans = field(default_factory=lambda: RunnerSpans(None))
    created: list[str] = field(default_factory=list)
    state: State = field(default_factory=State)

    def controller(self) -> list[Component]:
        """The reconciling half of serving, as after a start of the process."""
        state = State()
        polls = {"poll_settled_s": 0.01, "poll_unsettled_s": 0.002}
        made = Controller(state, self.cluster, self.broker, PLACES, Limits(), **polls, clock=lambda: NOW)
        made._retry = SOON
        return [self._follower(state), made]

    def streams(self) -> list[Component]:
        """The streaming half of serving."""
        key_file = self.directory / "runner.key"
        key_file.write_bytes(KEY + b"\n")

        async def create(topics: Sequence[Any]) -> None:
            self.broker.check_reachable()
            self.created += [topic.name for topic in topics]

        state = self.state = State()
        pool = RunnerPool(key_file, self.spans)
        return [self._follower(state), Streams(StreamParts(state, self.broker, pool, create, self.limits, SOON, lambda: NOW))]

    def _follower(self, state: State) -> Follower:
        return Follower(self.broker, [STATE_ENDPOINTS.name, STATE_DEPLOYMENTS.name], state.apply)

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
            EndpointSnapshot(endpoint_name="shop", traffic={ID: 100}, deployment_ids=(ID,), **times), self.ready(*replicas, **changes)
        )

    def ready(self, *replicas: Replica, **changes: Any) -> DeploymentSnapshot:
        status = DeploymentStatus.READY if replicas else DeploymentStatus.DEGRADED
        return deployment(status=status, pending_traffic_percent=None, replicas=replicas, **changes)

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

    def facts(self) -> list[Payload]:
        """What serving said."""
        events = [cloudevents.read(record) for record in self.broker.records(EVENTS.name)]
        return [event.data for event in events if event.source == "/millrace/serving"]

    def dead_letters(self) -> list[Any]:
        return [cloudevents.read(record).data for record in self.broker.records(DLQ.name)]

    async def until(self, condition: Callable[[], object]) -> None:
        """Let everybody work until something is so."""
        async with asyncio.timeout(5):
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


class AwayError(TransientError):
    """For producers that a test lets fail."""


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle readers of the log notice a stop sooner."""
    for module in (follower, consumer, streaming):
        monkeypatch.setattr(module, "POLL_S", 0.01)


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
