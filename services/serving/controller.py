"""The loop that makes Ray Serve equal the log and tells the log what became of it."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from opentelemetry.trace import SpanKind

from libs import telemetry
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.loop import Loop
from libs.messaging.publishing import publish_span
from libs.messaging.retry import Retry, keep_trying
from schemas.base import Fact
from schemas.registry import DeploymentSnapshot, DeploymentStatus
from services.serving.reconcile import (
    Action,
    ActualDeployment,
    Apply,
    AppStatus,
    Delete,
    DesiredDeployment,
    Report,
    Scale,
    plan,
)
from services.serving.spec import Places, ReplicaSpec, replica_spec
from services.serving.state import State

log = logging.getLogger(__name__)

SOURCE = "/millrace/serving"


class Cluster(Protocol):
    """Ray Serve, as ``adapters.RayServe`` offers it."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def apply(self, spec: ReplicaSpec, generation: int, replicas: int) -> None: ...

    async def scale(self, deployment_id: str, generation: int, replicas: int) -> None: ...

    async def delete(self, deployment_id: str) -> None: ...

    async def status(self) -> Mapping[str, ActualDeployment]: ...


class Controller:
    """Reconciles, as a component.

    It looks at all deployments whenever the log changed, and every ``poll_settled_s`` seconds because replicas change by themselves.
    Killed at any moment, it begins again with what is.
    """

    def __init__(
        self,
        state: State,
        cluster: Cluster,
        broker: Broker,
        places: Places,
        *,
        threads: int,
        memory_bytes: int | None,
        poll_settled_s: float,
        poll_unsettled_s: float,
        clock: Clock = cloudevents.utc_now,
    ) -> None:
        self._state = state
        self._cluster = cluster
        self._producer = broker.producer()
        self._places = places
        self._threads = threads
        self._memory_bytes = memory_bytes
        self._poll_settled_s = poll_settled_s
        self._poll_unsettled_s = poll_unsettled_s
        self._clock = clock
        self._reported: dict[str, Fact] = {}
        self._stopping = asyncio.Event()
        self._retry = Retry(longest_s=5.0)
        self._loop = Loop("serving", self._step, self._stopping)

    async def start(self) -> None:
        await self._producer.start()
        await keep_trying(self._cluster.start, self._retry, self._stopping)

    async def run(self) -> None:
        await self._loop.run()

    async def stop(self) -> None:
        await self._loop.stop()
        await self._cluster.stop()
        await self._producer.stop()

    async def _step(self) -> None:
        self._state.deployments_changed.clear()
        unsettled = await keep_trying(self.reconcile, self._retry, self._stopping)
        await self._wait(self._poll_unsettled_s if unsettled else self._poll_settled_s)

    async def reconcile(self) -> bool:
        """Do what is due once; returns whether something is still on its way."""
        desired = self._desired()
        actual = await self._cluster.status()
        actions = plan(desired, actual, self._reported)
        for action in actions:
            await self._carry_out(action)
        self._reported = {name: fact for name, fact in self._reported.items() if name in desired}
        pending = any(wanted.snapshot.status in (DeploymentStatus.PENDING, DeploymentStatus.REMOVING) for wanted in desired.values())
        return bool(actions) or pending or any(app.status in (AppStatus.STARTING, AppStatus.DELETING) for app in actual.values())

    def _desired(self) -> dict[str, DesiredDeployment]:
        return {
            name: DesiredDeployment(wanted.snapshot, self._spec(wanted.snapshot).digest) for name, wanted in self._state.deployments.items()
        }

    def _spec(self, snapshot: DeploymentSnapshot) -> ReplicaSpec:
        return replica_spec(snapshot, self._places, threads=self._threads, memory_bytes=self._memory_bytes)

    async def _carry_out(self, action: Action) -> None:
        match action:
            case Apply(snapshot):
                log.info("apply %s generation %d", snapshot.deployment_id, snapshot.generation)
                with self._span("apply", snapshot.deployment_id):
                    await self._cluster.apply(self._spec(snapshot), snapshot.generation, snapshot.min_replicas)
            case Scale(deployment_id, generation, replicas):
                log.info("scale %s to %d", deployment_id, replicas)
                with self._span("scale", deployment_id):
                    await self._cluster.scale(deployment_id, generation, replicas)
            case Delete(deployment_id):
                log.info("delete %s", deployment_id)
                with self._span("delete", deployment_id):
                    await self._cluster.delete(deployment_id)
            case Report(fact):
                await self._report(fact)

    def _span(self, verb: str, deployment_id: str):  # type: ignore[no-untyped-def]  # a context manager of the tracer
        wanted = self._state.deployments.get(deployment_id)
        context = telemetry.extract(wanted.snapshot.traceparent) if wanted else None
        return telemetry.tracer().start_as_current_span(
            f"{verb} deployment", context, SpanKind.INTERNAL, {"millrace.deployment": deployment_id}
        )

    async def _report(self, fact: Fact) -> None:
        deployment_id: str = getattr(fact, "deployment_id")  # noqa: B009 - all of serving's facts have it
        wanted = self._state.deployments[deployment_id]
        with self._span("report", deployment_id), publish_span(fact):
            # Its own id, not one derived from the snapshot: replicas may change several times between two snapshots.
            event = cloudevents.new_event(fact, SOURCE, now=self._clock())
            event = replace(event, correlation_id=wanted.event.correlation_id, causation_id=wanted.event.id)
            await self._producer.send([cloudevents.write(event)])
        log.info("reported %s", event.type, extra={"fields": {"entity": deployment_id}})
        self._reported[deployment_id] = fact

    async def _wait(self, timeout_s: float) -> None:
        changed = asyncio.create_task(self._state.deployments_changed.wait())
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({changed, stopped}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        changed.cancel()
        stopped.cancel()
