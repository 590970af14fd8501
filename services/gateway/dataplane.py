"""The data plane: one core behind all predict doors. Admit → route → parse → queue → batch → runner → answer.

Every accepted request ends exactly once: completed, failed or expired. Everything here runs on one event loop, and nothing waits in a
coroutine on the way of an ordinary request: a request is an object that callbacks pass on.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Protocol as Interface

from libs.errors import DeadlineExceededError, InvalidArgumentError, MillraceError, NotFoundError, NotReadyError, OverloadedError
from libs.inference.batches import UnevenBatchError, batch_key, join, piece, row_count, split
from libs.inference.errors import InvalidInputError, ModelError, RunnerGoneError, RunnerHungError
from libs.inference.pool import RunnerPool
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import NoReplicaError, Route
from schemas.registry import Replica
from services.gateway.batching import Batch, BatchLimits, Cut, Lane, Pending, size_of
from services.gateway.catalog import Catalog
from services.gateway.errors import ClientGoneError, InternalError, RunnersLostError
from services.gateway.exchange import Outgoing
from services.gateway.predictions import Ask, Caller, Done, Outcome, Prediction, Protocol

log = logging.getLogger(__name__)

_PING_TIMEOUT_S = 1.0
_PING_PAUSE_S = 0.1
_MOST_ATTEMPTS = 2
"""A request may run twice, never more often: prediction is pure, and one that loses two runners may be the cause."""

_TIMER_S = 0.001
"""A timer may be so early: the event loop's clock moves in whole milliseconds."""

_REMEMBERED_REQUESTS = 10_000
"""Of so many requests the share that may be tried again is kept; a batch alone may hold a thousand."""

_FEW_QUEUED = 4
"""With fewer waiting nobody is refused: what single batches took says too little."""


class Recorder(Interface):
    """Is told what happens to requests, as it happens; each call takes about a microsecond and never raises."""

    def refusal(self, endpoint_name: str) -> MillraceError | None:
        """Why an endpoint's requests cannot be accepted now, if they cannot: its log must be complete and cannot be written."""
        ...

    def refused(self, endpoint_name: str, protocol: Protocol, reason: str) -> None: ...

    def accepted(self, pending: Pending) -> None: ...

    def ended(self, pending: Pending, outcome: Outcome, error: MillraceError | None) -> None: ...

    def batch_sent(self, batch: Batch) -> None: ...

    def batch_ended(self, batch: Batch, error: MillraceError | None) -> None: ...


@dataclass(frozen=True, slots=True)
class DataPlaneLimits:
    """How long requests may take and wait, how many there may be, and how often they are tried again.

    ``held_bytes`` are the tensors of all accepted requests together. ``look_s`` is how long the event loop looks for the answer to the only
    request there is before it goes to sleep: waking up takes longer than a quick model does.

    ``retries_per_request`` of all requests, and ``retries_at_least`` a second besides, may be tried again on another replica: when
    everything is dying, repeating it all would only double the load.
    """

    timeout_ms: int = 30_000
    replica_wait_s: float = 5.0
    accepted: int = 10_000
    held_bytes: int = 2**30
    look_s: float = 0.0
    retries_per_request: float = 0.2
    retries_at_least: float = 10.0
    batch: BatchLimits = field(default_factory=BatchLimits)


class DataPlane:
    """Takes requests from the doors and answers them; a component that owns the connections to runners."""

    def __init__(
        self,
        catalog: Catalog,
        pool: RunnerPool,
        recorder: Recorder,
        limits: DataPlaneLimits | None = None,
        choose: Callable[[], float] = random.random,
    ) -> None:
        self._catalog = catalog
        self._pool = pool
        self._recorder = recorder
        self._limits = limits or DataPlaneLimits()
        self._choose = choose
        self._lanes: dict[str, Lane] = {}
        self._open: dict[Pending, None] = {}
        self._held_bytes = 0
        self._expiring: asyncio.TimerHandle | None = None
        self._look_until_s = 0.0
        self._is_looking = False
        self._retries = _RetryBudget(self._limits.retries_per_request, self._limits.retries_at_least)
        self._probes: dict[Replica, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop

    @property
    def in_flight(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._open)

    @property
    def lanes(self) -> dict[str, Lane]:
        """The queue of each deployment, by deployment id."""
        return self._lanes

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool.open()

    async def run(self) -> None:
        """Follow which replicas there are."""
        while True:
            await self._catalog.changes.next(60.0)
            self._adapt()

    async def stop(self) -> None:
        for probe in self._probes.values():
            probe.cancel()
        if self._expiring is not None:
            self._expiring.cancel()
        for pending in list(self._open):
            self._end(pending, Outcome.FAILED, NotReadyError("the gateway is stopping"))
        self._lanes.clear()
        await self._pool.close()

    async def infer(self, ask: Ask, caller: Caller) -> Outgoing:
        """Answer one request; cancelling the call frees its place.

        Raises
        ------
        MillraceError
            As ``submit`` raises, or the error it ended with.
        """
        answer: asyncio.Future[Outgoing | MillraceError] = self._loop.create_future()

        def done(result: Outgoing | MillraceError) -> None:
            if not answer.done():
                answer.set_result(result)

        pending = self.submit(ask, caller, done)
        try:
            result = await answer
        except asyncio.CancelledError:
            self.cancel(pending)
            raise
        if isinstance(result, MillraceError):
            raise result
        return result

    def submit(self, ask: Ask, caller: Caller, done: Done) -> Pending:
        """Accept a request; ``done`` is told how it ended, once, maybe before this returns.

        Raises
        ------
        NotFoundError
            The endpoint does not exist, or the version or alias is not deployed to it.
        NotReadyError
            Nothing is deployed that could answer, or the endpoint's log must be complete and cannot be written.
        OverloadedError
            Too many wait already, or those that wait would keep this one beyond its deadline.
        """
        target, limits = ask.target, self._limits
        timeout_ms = ask.timeout_ms or limits.timeout_ms
        try:
            route = self._admit(ask, timeout_ms / 1000)
        except MillraceError as error:
            self._recorder.refused(target.endpoint_name if not isinstance(error, NotFoundError) else "", ask.protocol, _reason(error))
            raise
        now = monotonic()
        pending = Pending(ask, caller, done, now, now + timeout_ms / 1000)
        self._open[pending] = None
        self._retries.earn()
        self._recorder.accepted(pending)
        if ask.timeout_ms is not None:
            pending.timer = self._loop.call_at(pending.deadline_s, self._expire, pending)
        elif self._expiring is None:
            self._expiring = self._loop.call_at(pending.deadline_s, self._expire_oldest)
        if route is None:
            self._wait_for_replica(pending)
        else:
            self._place(pending, route)
        return pending

    def check(self, ask: Ask) -> None:
        """Raise what a request would be refused or fail with whenever it were asked: nobody to ask, or nothing that can be read."""
        target = ask.target
        try:
            route = self._catalog.routing.choose(target.endpoint_name, target.version, target.alias, random=self._choose())
        except NotReadyError:
            return
        ask.parse(route.signature)

    def cancel(self, pending: Pending) -> None:
        """The client went away: free the place of its request. Nobody is told."""
        if not pending.is_over:
            pending.done = _nobody
            self._end(pending, Outcome.FAILED, ClientGoneError("the client went away before it was answered"))

    def _admit(self, ask: Ask, timeout_s: float) -> Route | None:
        """The route of a request if it can be accepted; None when its replicas are away at the moment."""
        target = ask.target
        if len(self._open) >= self._limits.accepted:
            raise OverloadedError(f"{len(self._open)} requests are being answered; no more are taken")
        try:
            route = self._catalog.routing.choose(target.endpoint_name, target.version, target.alias, random=self._choose())
        except NoReplicaError:
            route = None
        refusal = self._recorder.refusal(target.endpoint_name)
        if refusal is not None:
            raise refusal
        if route is not None:
            _check_room(self._lane(route), timeout_s)
        return route

    def _lane(self, route: Route) -> Lane:
        lane = self._lanes.get(route.deployment_id)
        if lane is None:
            lane = self._lanes[route.deployment_id] = Lane(route, self._limits.batch)
        elif lane.route is not route:
            lane.update(route)
        return lane

    def _place(self, pending: Pending, route: Route) -> None:
        """Parse a request for the version that was chosen, and have it wait for its batch."""
        try:
            if pending.request is None or pending.route is None or pending.route.signature is not route.signature:
                self._parse(pending, route)
        except MillraceError as error:
            pending.route = route
            self._end(pending, Outcome.FAILED, error)
            return
        except Exception:
            log.exception("a bug: a request of %s could not be read", route.endpoint_name)
            pending.route = route
            self._end(pending, Outcome.FAILED, InternalError("something went wrong in the gateway while it read the request"))
            return
        pending.route = route
        lane = pending.lane = self._lane(route)
        pending.queued_s = monotonic()
        lane.put(pending)
        if lane.is_away:
            self._wait_for_replica(pending)
        if not lane.flush_is_due:
            # What else this turn of the event loop brings leaves in the same batch.
            lane.flush_is_due = True
            self._loop.call_soon(self._flush, lane, "idle")

    def _parse(self, pending: Pending, route: Route) -> None:
        held_bytes = self._held_bytes - pending.size_bytes
        request = pending.ask.parse(route.signature)
        rows = row_count(request)
        pending.request = request
        pending.rows = rows or 1
        pending.is_alone = pending.is_alone or rows is None
        pending.key = batch_key(request)
        pending.size_bytes = size_of(request.inputs)
        self._held_bytes = held_bytes = held_bytes + pending.size_bytes
        if held_bytes > self._limits.held_bytes:
            raise OverloadedError("the requests that are being answered hold as much memory as they may; send it again later")

    def _flush(self, lane: Lane, reason: str) -> None:
        """Give batches to all replicas that may have one."""
        lane.flush_is_due = False
        while lane.queued:
            replica = lane.idle_replica()
            if replica is None:
                return
            taken = lane.next_batch(replica, monotonic())
            if taken is None:
                return
            members, own_reason = taken
            try:
                self._send(lane, replica, members, own_reason or reason)
            except Exception:
                log.exception("a bug: a batch for %s could not be sent", lane.route.deployment_id)
                lane.release(replica)
                self._abandon(members)

    def _send(self, lane: Lane, replica: Replica, members: list[Pending], reason: str) -> None:
        now = monotonic()
        requests: list[InferRequest] = []
        rows = 0
        traceparent = None
        for pending in members:
            if pending.cut is None or not pending.cut.rows:
                pending.sent_s = now
            pending.attempts += 1
            requests.append(pending.request)  # type: ignore[arg-type]
            rows += pending.rows
            traceparent = traceparent or pending.caller.traceparent
            if pending.patience is not None:
                pending.patience.cancel()
                pending.patience = None
        cut = members[0].cut
        if cut is None:
            batch = Batch(lane.route, replica, members, rows, reason, now, join(requests))
        else:
            batch = Batch(lane.route, replica, members, cut.size, reason, now, dict(piece(requests[0].inputs, cut.rows, cut.size)), cut=cut)
        self._recorder.batch_sent(batch)
        timeout_s = max(pending.deadline_s for pending in members) - now
        self._pool.send(
            lane.route,
            replica,
            batch.inputs,
            requests[0].outputs,
            traceparent,
            lambda answer: self._answered(lane, batch, answer),
            timeout_s=timeout_s,
        )
        if len(self._open) == 1 and self._limits.look_s:
            self._look_until_s = now + self._limits.look_s
            if not self._is_looking:
                self._is_looking = True
                self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Keep the event loop from sleeping while the only request there is may be answered any moment; it does what else comes, too."""
        if len(self._open) == 1 and monotonic() < self._look_until_s:
            self._loop.call_soon(self._look)
        else:
            self._is_looking = False

    def _answered(self, lane: Lane, batch: Batch, answer: InferResponse | MillraceError) -> None:
        try:
            self._take(lane, batch, answer)
        except Exception:
            log.exception("a bug: what %s answered could not be handled", batch.route.deployment_id)
            self._abandon(batch.members)

    def _abandon(self, members: list[Pending]) -> None:
        """End requests whose batch a bug has stopped: nobody shall wait for an answer that will not come."""
        for pending in members:
            self._end(pending, Outcome.FAILED, InternalError("something went wrong in the gateway between the request and its answer"))

    def _take(self, lane: Lane, batch: Batch, answer: InferResponse | MillraceError) -> None:
        batch.answered_s = monotonic()
        if isinstance(answer, InferResponse):
            batch.outputs, batch.model_s = answer.outputs, answer.model_s
        if isinstance(answer, RunnerGoneError | NotReadyError | DeadlineExceededError):
            lane.release(batch.replica)  # says nothing of how long batches take
        else:
            lane.returned(batch)
        if isinstance(answer, RunnerGoneError | NotReadyError | RunnerHungError):
            lane.lose(batch.replica)
            self._probe(batch.replica)
        if batch.cut is not None and isinstance(answer, InferResponse):
            self._take_piece(lane, batch, batch.cut, answer)
            return
        if lane.queued:
            # Before the answers are written: the replica works on while they are.
            self._flush(lane, "returned")
        if isinstance(answer, MillraceError):
            self._recorder.batch_ended(batch, answer)
            self._failed(lane, batch, answer)
            return
        try:
            parts = [answer.outputs] if len(batch.members) == 1 else split(answer.outputs, [pending.rows for pending in batch.members])
        except UnevenBatchError as error:
            self._found_uneven(lane, batch, error)
            return
        for pending, outputs in zip(batch.members, parts, strict=True):
            if not pending.is_over:
                pending.model_s = batch.model_s
                self._complete(pending, batch.route, InferResponse(outputs))
        self._recorder.batch_ended(batch, None)
        self._export_span(batch, answer)

    def _take_piece(self, lane: Lane, batch: Batch, cut: Cut, answer: InferResponse) -> None:
        """Have a request that is cut wait for its next piece, behind all others, or answer it if this was the last."""
        (pending,) = batch.members
        if not lane.is_batchable:
            # Found out in the meantime, by another batch.
            pending.cut = None
            self._recorder.batch_ended(batch, None)
            self._ask_alone(lane, batch)
            return
        try:
            cut.add(answer, pending.rows)
        except UnevenBatchError as error:
            pending.cut = None
            self._found_uneven(lane, batch, error)
            return
        pending.model_s = cut.model_s
        if cut.outputs is None and not pending.is_over:
            pending.attempts -= 1  # what counts are the runners that were lost over it
            self._queue_next_piece(lane, pending)
        if lane.queued:
            self._flush(lane, "returned")
        if cut.outputs is not None and not pending.is_over:
            self._complete(pending, batch.route, InferResponse(cut.outputs))
        self._recorder.batch_ended(batch, None)
        self._export_span(batch, answer)

    def _queue_next_piece(self, lane: Lane, pending: Pending) -> None:
        if not lane.route.replicas:
            self._route_again(pending)
            return
        lane.put(pending)
        if lane.is_away:
            self._wait_for_replica(pending)

    def _found_uneven(self, lane: Lane, batch: Batch, error: UnevenBatchError) -> None:
        log.warning("%s answers %s: its requests are asked one at a time from now on", batch.route.deployment_id, error)
        lane.ask_alone()
        self._recorder.batch_ended(batch, ModelError(str(error)))
        self._ask_alone(lane, batch)

    def _export_span(self, batch: Batch, answer: InferResponse) -> None:
        if answer.span is not None:
            for pending in batch.members:
                if pending.caller.traceparent is not None:
                    self._pool.export_span(answer.span, pending.caller.traceparent, batch.route, batch.replica)

    def _complete(self, pending: Pending, route: Route, response: InferResponse) -> None:
        assert pending.request is not None  # noqa: S101 - it was parsed before it was sent
        try:
            outgoing = pending.ask.write(Prediction(route, pending.request, response))
        except MillraceError as error:
            self._end(pending, Outcome.FAILED, error)
        except Exception:
            log.exception("a bug: an answer of %s could not be written", route.endpoint_name)
            self._end(pending, Outcome.FAILED, InternalError("something went wrong in the gateway while it wrote the answer"))
        else:
            self._end(pending, Outcome.COMPLETED, None, outgoing)

    def _failed(self, lane: Lane, batch: Batch, error: MillraceError) -> None:
        hung_together = isinstance(error, RunnerHungError) and len(batch.members) > 1
        if hung_together or isinstance(error, RunnerGoneError | NotReadyError):
            self._try_again(lane, batch, error)
        elif len(batch.members) > 1 and isinstance(error, InvalidInputError | ModelError):
            # One of them is to blame; half by half it is found, and fails alone.
            self._ask_by_halves(lane, batch)
        else:
            outcome = Outcome.EXPIRED if isinstance(error, DeadlineExceededError) else Outcome.FAILED
            for pending in batch.members:
                self._end(pending, outcome, error)

    def _ask_alone(self, lane: Lane, batch: Batch) -> None:
        waiting = [pending for pending in batch.members if not pending.is_over]
        for pending in waiting:
            pending.is_alone = True
            pending.attempts -= 1
        self._queue_again(lane, waiting)
        self._flush(lane, "alone")

    def _ask_by_halves(self, lane: Lane, batch: Batch) -> None:
        """Ask each half again by itself: one bad request costs its neighbours a few batches, not one for each of them."""
        waiting = [pending for pending in batch.members if not pending.is_over]
        middle = (len(waiting) + 1) // 2
        for half in (waiting[:middle], waiting[middle:]):
            key = object()
            for pending in half:
                pending.is_alone, pending.key = len(half) == 1, key
                pending.attempts -= 1
        self._queue_again(lane, waiting)
        self._flush(lane, "returned")

    def _try_again(self, lane: Lane, batch: Batch, error: MillraceError) -> None:
        again: list[Pending] = []
        for pending in batch.members:
            if pending.is_over:
                continue
            endpoint_name = batch.route.endpoint_name
            if pending.attempts >= _MOST_ATTEMPTS:
                lost = RunnersLostError(f"endpoint {endpoint_name!r} lost two runners over this request: {error}")
                self._end(pending, Outcome.FAILED, lost)
            elif not self._retries.take(monotonic()):
                self._end(pending, Outcome.FAILED, NotReadyError(f"endpoint {endpoint_name!r} lost the runner: {error}"))
            else:
                # If one of them killed the runner, it kills the next one alone.
                pending.is_alone = pending.is_alone or len(batch.members) > 1
                again.append(pending)
        self._queue_again(lane, again)
        self._limit_waiting(lane)
        self._flush(lane, "returned")

    def _queue_again(self, lane: Lane, members: list[Pending]) -> None:
        """Have requests wait again, before all others; elsewhere, if the lane's deployment is gone in the meantime."""
        if lane.route.replicas:
            lane.put_back(members)
            return
        for pending in members:
            self._route_again(pending)

    def _limit_waiting(self, lane: Lane) -> None:
        """Let what waits in a lane without a replica that answers wait only so long."""
        if lane.is_away:
            for pending in lane.waiting():
                self._wait_for_replica(pending)

    def _wait_for_replica(self, pending: Pending) -> None:
        if pending.patience is None:
            in_vain = pending.lane is not None and pending.lane.route.is_cluster_away
            pending.patience = self._loop.call_later(0 if in_vain else self._limits.replica_wait_s, self._give_up, pending)

    def _give_up(self, pending: Pending) -> None:
        pending.patience = None
        if pending.lane is not None and not pending.lane.is_away:
            return  # a replica answers again and is busy: now only the deadline counts
        target = pending.ask.target
        try:
            self._catalog.routing.check(target.endpoint_name, target.version, target.alias)
            in_vain = pending.lane is not None and pending.lane.route.is_cluster_away
            when = "and none will be started before Ray is back" if in_vain else "at the moment"
            error: MillraceError = NotReadyError(f"no runner of endpoint {target.endpoint_name!r} answers {when}")
        except MillraceError as reason:
            error = reason
        self._end(pending, Outcome.FAILED, error)

    def _expire_oldest(self) -> None:
        """End the requests without a deadline of their own whose time is over: theirs end in the order in which they came.

        One timer does for all of them; making one for each took 3 µs of a request's 65.
        """
        self._expiring = None
        due_s = monotonic() + _TIMER_S
        for pending in [pending for pending in self._open if pending.timer is None]:
            if pending.deadline_s > due_s:
                self._expiring = self._loop.call_at(pending.deadline_s, self._expire_oldest)
                return
            self._expire(pending)

    def _expire(self, pending: Pending) -> None:
        timeout_ms = pending.ask.timeout_ms or self._limits.timeout_ms
        endpoint_name = pending.ask.target.endpoint_name
        self._end(pending, Outcome.EXPIRED, DeadlineExceededError(f"endpoint {endpoint_name!r} did not answer within {timeout_ms} ms"))

    def _end(self, pending: Pending, outcome: Outcome, error: MillraceError | None, outgoing: Outgoing | None = None) -> None:
        """End a request, unless it has ended."""
        if pending.is_over:
            return
        pending.is_over = True
        pending.ended_s = monotonic()
        self._open.pop(pending, None)
        self._held_bytes -= pending.size_bytes
        if pending.timer is not None:
            pending.timer.cancel()
        if pending.patience is not None:
            pending.patience.cancel()
        if pending.lane is not None:
            pending.lane.remove(pending)
        if outgoing is not None:
            pending.answer_bytes = len(outgoing.body)
        self._recorder.ended(pending, outcome, error)
        done, pending.done = pending.done, _nobody
        pending.timer = pending.patience = None
        try:
            done(outgoing if outgoing is not None else error)  # type: ignore[arg-type]
        except Exception:
            log.exception("a bug: nobody could be told how a request of %s ended", pending.ask.target.endpoint_name)

    def _adapt(self) -> None:
        """Follow a change of the catalog: forget runners that are gone, find those that wait a new way."""
        deployments = self._catalog.deployments
        self._pool.keep({replica for deployment in deployments.values() for replica in deployment.replicas})
        for deployment_id, lane in list(self._lanes.items()):
            deployment = deployments.get(deployment_id)
            replicas = () if deployment is None else deployment.replicas
            if deployment is None:
                del self._lanes[deployment_id]
            if replicas != lane.route.replicas:
                lane.update(replace(lane.route, replicas=replicas))
            if not replicas:
                for pending in lane.clear():
                    self._route_again(pending)
            self._limit_waiting(lane)
            self._flush(lane, "idle")
        for pending in [pending for pending in self._open if pending.route is None]:
            self._route_again(pending)

    def _route_again(self, pending: Pending) -> None:
        target = pending.ask.target
        pending.cut = None  # another version may answer now: from its first row
        try:
            route = self._catalog.routing.choose(target.endpoint_name, target.version, target.alias, random=self._choose())
        except NoReplicaError:
            pending.route, pending.lane = None, None
            self._wait_for_replica(pending)
        except MillraceError as error:
            self._end(pending, Outcome.FAILED, error)
        else:
            self._place(pending, route)

    def _probe(self, replica: Replica) -> None:
        """Ask a lost replica until it answers again or is known no more."""
        if replica not in self._probes:
            self._probes[replica] = self._loop.create_task(self._until_found(replica))

    async def _until_found(self, replica: Replica) -> None:
        try:
            while self._lanes_without(replica):
                try:
                    await self._pool.ping(replica, timeout_s=_PING_TIMEOUT_S)
                    break
                except MillraceError:
                    await asyncio.sleep(_PING_PAUSE_S)
        finally:
            # Before it is given anything: if it is lost over that, the next probe can begin.
            del self._probes[replica]
        for lane in self._lanes_without(replica):
            lane.find(replica)
            self._flush(lane, "idle")

    def _lanes_without(self, replica: Replica) -> list[Lane]:
        return [lane for lane in self._lanes.values() if replica in lane.lost]


class _RetryBudget:
    """How many requests may be tried again: a share of the last ones, and a few a second besides.

    References
    ----------
    Finagle, "Retry budgets"
    """

    def __init__(self, per_request: float, per_second: float) -> None:
        self._per_request = per_request
        self._per_second = per_second
        self._most = 10 * per_second
        self._left = self._most
        self._updated_s = 0.0

    def earn(self) -> None:
        """Count a request."""
        self._left += self._per_request

    def take(self, now_s: float) -> bool:
        """Use one retry, if there is one."""
        earned = (now_s - self._updated_s) * self._per_second if self._updated_s else 0.0
        self._left = min(self._left + earned, max(self._most, _REMEMBERED_REQUESTS * self._per_request))
        self._updated_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _check_room(lane: Lane, timeout_s: float) -> None:
    if not lane.has_room:
        raise OverloadedError(f"{lane.queued} requests wait for {lane.route.model_name}@{lane.route.version} already")
    if lane.queued >= _FEW_QUEUED and lane.wait_s() > min(timeout_s, lane.limits.wait_s):
        raise OverloadedError(f"a request to {lane.route.model_name}@{lane.route.version} would take {lane.wait_s():.1f} s now")


def _reason(error: MillraceError) -> str:
    names = {NotFoundError: "not_found", OverloadedError: "overloaded", NotReadyError: "not_ready", InvalidArgumentError: "invalid"}
    return next((name for kind, name in names.items() if isinstance(error, kind)), "failed")


def _nobody(_: Outgoing | MillraceError) -> None:
    """Told to nobody."""
