"""Serving in one process: the log in memory, and a cluster that is a fake."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from libs.lifecycle import Component
from libs.messaging import cloudevents, consumer, follower
from libs.messaging.follower import Follower
from libs.messaging.memory import MemoryBroker
from libs.messaging.retry import Retry
from schemas.base import Payload
from schemas.environment import EnvironmentLock
from schemas.inference import Datatype, Signature, TensorSpec
from schemas.registry import Artifact, ArtifactFormat, DeploymentSnapshot, DeploymentStatus, Replica
from schemas.topics import EVENTS, STATE_DEPLOYMENTS
from services.serving.controller import Controller
from services.serving.errors import ClusterUnavailableError
from services.serving.reconcile import ActualDeployment, AppStatus
from services.serving.spec import Limits, Places, ReplicaSpec
from services.serving.state import State

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ID = "shop.iris.1"
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

    broker: MemoryBroker = field(default_factory=MemoryBroker)
    cluster: FakeCluster = field(default_factory=FakeCluster)

    def controller(self) -> list[Component]:
        """The components of serving, as after a start of the process."""
        state = State()
        polls = {"poll_settled_s": 0.01, "poll_unsettled_s": 0.002}
        made = Controller(state, self.cluster, self.broker, PLACES, Limits(), **polls, clock=lambda: NOW)
        made._retry = made._start_retry = SOON
        return [Follower(self.broker, [STATE_DEPLOYMENTS.name], state.apply), made]

    async def publish(self, *payloads: Payload) -> None:
        """Say something on the log."""
        events = [cloudevents.new_event(payload, "/test", now=NOW) for payload in payloads]
        await self.broker.append([cloudevents.write(event) for event in events])

    async def forget(self, topic: str, entity: str) -> None:
        await self.broker.append([cloudevents.tombstone(topic, entity)])

    def ready(self, *replicas: Replica, **changes: Any) -> DeploymentSnapshot:
        """The deployment as the registry describes it once its replicas answer."""
        status = DeploymentStatus.READY if replicas else DeploymentStatus.DEGRADED
        return deployment(status=status, pending_traffic_percent=None, replicas=replicas, **changes)

    def facts(self) -> list[Payload]:
        """What serving said."""
        events = [cloudevents.read(record) for record in self.broker.records(EVENTS.name)]
        return [event.data for event in events if event.source == "/millrace/serving"]

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


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle readers of the log notice a stop sooner."""
    for module in (follower, consumer):
        monkeypatch.setattr(module, "POLL_S", 0.01)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def run() -> Any:
    """``running``, for the tests."""
    return running
