"""The loop that makes Ray Serve equal the log and tells the log what became of it."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from opentelemetry.trace import Span, SpanKind

from libs import telemetry
from libs.errors import TransientError
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.loop import Loop
from libs.messaging.publishing import publish_span
from libs.messaging.retry import Retry, keep_trying
from libs.metrics import PROCESS, Metrics
from libs.metrics.definitions import RECONCILE_FAILURES
from schemas.base import Fact
from schemas.registry import DeploymentSnapshot, DeploymentStatus
from services.serving.errors import ClusterUnavailableError
from services.serving.metrics import DamageMetrics
from services.serving.reconcile import (
    Action,
    ActualDeployment,
    Apply,
    AppStatus,
    Delete,
    DesiredDeployment,
    Report,
    Scale,
    away,
    plan,
)
from services.serving.spec import Limits, Places, ReplicaSpec, replica_spec
from services.serving.state import State, Wanted

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
        limits: Limits,
        *,
        poll_settled_s: float,
        poll_unsettled_s: float,
        clock: Clock = cloudevents.utc_now,
        metrics: Metrics = PROCESS,
    ) -> None:
        self._failures = metrics.counter(RECONCILE_FAILURES)
        self._damage = DamageMetrics(metrics)
        self._state = state
        self._cluster = cluster
        self._producer = broker.producer()
        self._places = places
        self._limits = limits
        self._poll_settled_s = poll_settled_s
        self._poll_unsettled_s = poll_unsettled_s
        self._clock = clock
        self._reported: dict[str, tuple[Wanted, Fact]] = {}
        self._stopping = asyncio.Event()
        self._retry = Retry(longest_s=5.0)
        self._start_retry = Retry(longest_s=0.5)
        self._loop = Loop("serving", self._step, self._stopping)

    async def start(self) -> None:
        await self._producer.start()
        await keep_trying(self._connect, self._start_retry, self._stopping)

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

    async def _connect(self) -> None:
        try:
            await self._cluster.start()
        except ClusterUnavailableError as error:
            await self._report_away(error.message)
            raise

    async def reconcile(self) -> bool:
        """Do what is due once; returns whether something is still on its way.

        A deployment that Ray refuses holds no other one up.

        Raises
        ------
        TransientError
            Ray or the broker did not do something of it; all the rest has been done.
        """
        wanted = dict(self._state.deployments)
        desired = {name: DesiredDeployment(each.snapshot, self._spec(each.snapshot).digest) for name, each in wanted.items()}
        try:
            actual = await self._cluster.status()
        except ClusterUnavailableError as error:
            await self._report_away(error.message)
            raise
        self._damage.look(actual.values())
        known = {name: app for name, app in actual.items() if name in wanted or name not in self._state.unreadable}
        # A fact is repeated when the log has moved on and still does not reflect it.
        self._reported = {name: said for name, said in self._reported.items() if said[0] is wanted.get(name)}
        actions = plan(desired, known, {name: fact for name, (_, fact) in self._reported.items()})
        failures = [failure for action in actions if (failure := await self._attempt(action, wanted)) is not None]
        if failures:
            raise failures[0]
        pending = any(each.snapshot.status in (DeploymentStatus.PENDING, DeploymentStatus.REMOVING) for each in wanted.values())
        return bool(actions) or pending or any(app.status in (AppStatus.STARTING, AppStatus.DELETING) for app in known.values())

    def _spec(self, snapshot: DeploymentSnapshot) -> ReplicaSpec:
        return replica_spec(snapshot, self._places, self._limits)

    async def _attempt(self, action: Action, wanted: Mapping[str, Wanted]) -> TransientError | None:
        """Carry out an action; what failed for a reason that passes is returned."""
        try:
            await self._carry_out(action, wanted)
        except TransientError as error:
            self._failures.value += 1
            return error
        return None

    async def _carry_out(self, action: Action, wanted: Mapping[str, Wanted]) -> None:
        match action:
            case Apply(snapshot):
                log.info("apply %s generation %d", snapshot.deployment_id, snapshot.generation)
                with _span("apply", snapshot.deployment_id, wanted):
                    await self._cluster.apply(self._spec(snapshot), snapshot.generation, snapshot.min_replicas)
            case Scale(deployment_id, generation, replicas):
                log.info("scale %s to %d", deployment_id, replicas)
                with _span("scale", deployment_id, wanted):
                    await self._cluster.scale(deployment_id, generation, replicas)
            case Delete(deployment_id):
                log.info("delete %s", deployment_id)
                with _span("delete", deployment_id, wanted):
                    await self._cluster.delete(deployment_id)
            case Report(deployment_id, fact):
                await self._report(deployment_id, fact, wanted)

    async def _report_away(self, reason: str) -> None:
        """Tell the log, once, of each deployment that has run that nobody will replace its replicas at the moment."""
        wanted = dict(self._state.deployments)
        for deployment_id, each in wanted.items():
            fact = away(each.snapshot, reason)
            if fact is not None and self._reported.get(deployment_id, (None, None))[0] is not each:
                await self._report(deployment_id, fact, wanted)

    async def _report(self, deployment_id: str, fact: Fact, wanted: Mapping[str, Wanted]) -> None:
        cause = wanted[deployment_id].event
        with _span("report", deployment_id, wanted), publish_span(fact):
            # Its own id, not one derived from the snapshot: replicas may change several times between two snapshots.
            event = cloudevents.new_event(fact, SOURCE, now=self._clock())
            event = replace(event, correlation_id=cause.correlation_id, causation_id=cause.id)
            await self._producer.send([cloudevents.write(event)])
        log.info("reported %s", event.type, extra={"fields": {"entity": deployment_id}})
        self._reported[deployment_id] = (wanted[deployment_id], fact)

    async def _wait(self, timeout_s: float) -> None:
        changed = asyncio.create_task(self._state.deployments_changed.wait())
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({changed, stopped}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        changed.cancel()
        stopped.cancel()


def _span(verb: str, deployment_id: str, wanted: Mapping[str, Wanted]) -> AbstractContextManager[Span]:
    """A span in the trace of the command that asked for the deployment."""
    each = wanted.get(deployment_id)
    context = telemetry.extract(each.snapshot.traceparent) if each else None
    attributes = {"millrace.deployment": deployment_id}
    return telemetry.tracer().start_as_current_span(f"{verb} deployment", context, SpanKind.INTERNAL, attributes)
