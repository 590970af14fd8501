"""A whole gateway in one process: log and store in memory, the real registry, runners that are fakes on real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from libs.artifacts import MemoryStore
from libs.lifecycle import Component
from libs.messaging import cloudevents, consumer, follower
from libs.messaging.memory import MemoryBroker
from schemas.base import Payload
from schemas.environment import EnvironmentLock, VersionBuilt
from schemas.inference import Signature, TensorSpec
from schemas.registry import Artifact, DeploymentSnapshot, EndpointSnapshot, Replica
from schemas.serving import DeploymentChanged, DeploymentReady
from schemas.validation import Measurements, VersionInspected, VersionValidated
from services.gateway.app import Gateway, build
from services.gateway.settings import GrpcSettings, Settings
from services.registry.app import build as build_registry
from services.registry.settings import Settings as RegistrySettings
from tests.unit.runners import KEY, FakeRunner

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SIGNATURE = Signature(
    inputs=(TensorSpec(name="input", datatype="FP64", shape=(-1, 2)),), outputs=(TensorSpec(name="predict", datatype="FP64", shape=(-1,)),)
)
LOCK = EnvironmentLock(environment_id="ab" * 16, python="3.11", platform="x86_64-linux", lock="numpy==2.4.0\n")


@dataclass
class World:
    """The gateway under test and what is around it."""

    gateway: Gateway
    broker: MemoryBroker
    store: MemoryStore
    http: httpx.AsyncClient
    directory: Path
    runners: list[FakeRunner] = field(default_factory=list)

    async def publish(self, *payloads: Payload) -> None:
        """Say something on the log."""
        events = [cloudevents.new_event(payload, "/test", now=NOW) for payload in payloads]
        await self.broker.append([cloudevents.write(event) for event in events])

    async def runner(self, offset: float = 0.0) -> FakeRunner:
        """A running fake runner."""
        number = len(self.runners)
        runner = FakeRunner(f"r{number}", self.directory / f"r{number}.sock", offset)
        await runner.start()
        self.runners.append(runner)
        return runner

    async def upload(self, content: bytes = b"a model") -> dict[str, Any]:
        answer = await self.http.post("/api/v1/artifacts", params={"filename": "m.joblib"}, content=content)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def validated(self, model: str = "cancer", content: bytes = b"a model") -> dict[str, Any]:
        """A version that was taken through all stages."""
        body = {"artifact": await self.upload(content)}
        answer = await self.http.post(f"/api/v1/models/{model}/versions", json=body)
        assert answer.status_code == 201, answer.text
        number = answer.json()["version"]
        await self.publish(
            VersionInspected(model_name=model, version=number, format="sklearn", requirements=(), inferred=False),
            VersionBuilt(model_name=model, version=number, environment=LOCK, reused=False, resolve_s=0, install_s=0),
            VersionValidated(
                model_name=model, version=number, signature=SIGNATURE, measurements=Measurements(load_s=0, peak_memory_bytes=0)
            ),
        )
        return await self.until(f"/api/v1/models/{model}/versions/{number}", lambda view: view["status"] == "validated")

    async def deployed(self, *offsets: float, model: str = "cancer", endpoint: str = "cancer") -> dict[str, Any]:
        """An endpoint with one deployment, one replica for each offset."""
        version = await self.validated(model)
        await self.http.post("/api/v1/endpoints", json={"name": endpoint})
        answer = await self.http.post(
            f"/api/v1/endpoints/{endpoint}/deployments",
            json={"model": model, "version": version["version"], "min_replicas": max(1, len(offsets))},
        )
        assert answer.status_code == 201, answer.text
        replicas = [(await self.runner(offset)).replica for offset in offsets]
        await self.ready(answer.json(), replicas)
        return dict(answer.json())

    async def ready(self, deployment: dict[str, Any], replicas: Sequence[Replica]) -> None:
        """Let serving say that these replicas answer, and wait until the gateway knows."""
        places = {name: deployment[name] for name in ("endpoint_name", "deployment_id", "generation")}
        await self.publish(DeploymentReady(**places, replicas=tuple(replicas)))
        path = f"/api/v1/endpoints/{deployment['endpoint_name']}"
        await self.until(path, lambda view: any(d["replicas"] for d in view["deployments"]) and view["traffic"] != {})

    async def changed(self, deployment: dict[str, Any], replicas: Sequence[Replica]) -> None:
        """Let serving say that other replicas answer now."""
        places = {name: deployment[name] for name in ("endpoint_name", "deployment_id", "generation")}
        await self.publish(DeploymentChanged(**places, replicas=tuple(replicas)))

    async def until(self, path: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Look until the state is as wanted."""
        async with asyncio.timeout(30):
            while True:
                answer = await self.http.get(path)
                if answer.status_code == 200 and condition(answer.json()):
                    return dict(answer.json())
                await asyncio.sleep(0.002)

    async def predict(self, rows: Any, endpoint: str = "cancer", **arguments: Any) -> httpx.Response:
        return await self.http.post(f"/v1/models/{endpoint}:predict", json={"instances": rows}, **arguments)


@asynccontextmanager
async def running(components: Sequence[Component]) -> AsyncIterator[None]:
    """Components at work, as ``libs.lifecycle`` runs them."""
    tasks: list[asyncio.Task[None]] = []
    started: list[Component] = []
    try:
        for component in components:
            await component.start()
            started.append(component)
            tasks.append(asyncio.create_task(component.run()))
        yield
    finally:
        for component in reversed(started):
            await component.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def make_settings(directory: Path, **changes: Any) -> Settings:
    key_file = directory / "runner.key"
    key_file.write_bytes(KEY)
    settings = Settings(
        **{
            "command_wait_s": 3.0,
            "replica_wait_ms": 300,
            "http_port": 0,
            "grpc": GrpcSettings(enabled=False),
            "drain_timeout_s": 3.0,
            **changes,
        }
    )
    runner = settings.runner.model_copy(update={"key_file": key_file})
    process = settings.process.model_copy(update={"home": directory})
    return settings.model_copy(update={"runner": runner, "process": process})


@asynccontextmanager
async def make_world(
    directory: Path,
    *,
    registry: bool = True,
    broker: MemoryBroker | None = None,
    store: MemoryStore | None = None,
    spans: Any = None,
    **changes: Any,
) -> AsyncIterator[World]:
    """A world behind a real HTTP server; ``registry=False`` leaves commands unanswered."""
    broker, store = broker or MemoryBroker(), store or MemoryStore()
    gateway = build(make_settings(directory, **changes), broker=broker, store=store, clock=lambda: NOW, spans=spans)
    async with AsyncExitStack() as stack:
        if registry:
            await stack.enter_async_context(running(build_registry(RegistrySettings(), broker=broker, clock=lambda: NOW)))
        await stack.enter_async_context(running(gateway.components))
        http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.server.port}", timeout=10, trust_env=False)
        await stack.enter_async_context(http)
        world = World(gateway, broker, store, http, directory)
        try:
            yield world
        finally:
            for runner in world.runners:
                await runner.stop()


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle readers of the log notice a stop sooner."""
    monkeypatch.setattr(follower, "POLL_S", 0.01)
    monkeypatch.setattr(consumer, "POLL_S", 0.01)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A gateway with a registry behind it."""
    async with make_world(tmp_path) as made:
        yield made


def deployment(
    deployment_id: str, replicas: int = 1, *, version: int = 1, model: str = "m", status: str = "ready", reason: str | None = None
) -> DeploymentSnapshot:
    """A snapshot of a deployment of the endpoint ``e``."""
    return DeploymentSnapshot(
        deployment_id=deployment_id,
        generation=1,
        endpoint_name="e",
        model_name=model,
        version=version,
        status=status,
        artifact=Artifact(sha256="a" * 64, size_bytes=1, filename="m"),
        format="sklearn",
        environment=LOCK,
        signature=SIGNATURE,
        min_replicas=1,
        max_replicas=1,
        replicas=tuple(Replica(replica_id=f"{deployment_id}/{number}", address=f"unix:/{number}") for number in range(replicas)),
        reason=reason,
        created_at=NOW,
        updated_at=NOW,
    )


def endpoint(*deployment_ids: str, **traffic: int) -> EndpointSnapshot:
    """A snapshot of the endpoint ``e``."""
    return EndpointSnapshot(endpoint_name="e", traffic=traffic, deployment_ids=deployment_ids, created_at=NOW, updated_at=NOW)


@pytest.fixture
def make() -> Any:
    """``make_world``, for tests that need another gateway than the usual."""
    return make_world


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Spans of this process that have ended."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from libs import telemetry

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    return exporter
