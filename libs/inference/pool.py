"""The runners that a process asks: one connection to each, shared by everybody in it."""

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path

from opentelemetry import trace

from libs import telemetry
from libs.errors import ConfigurationError, MillraceError, NotReadyError, UnauthenticatedError
from libs.inference.client import Asked, Done, RunnerClient
from libs.inference.requests import InferRequest, InferResponse, Span
from libs.inference.routing import Route
from libs.inference.spans import RunnerSpans
from libs.inference.tokens import runner_token
from libs.runner.wire import Rows
from schemas.registry import Replica


class RunnerPool:
    """Asks runners and exports their spans; connections are made when they are first needed.

    Parameters
    ----------
    key_file
        File with the platform's runner key; read by ``open``.
    """

    def __init__(self, key_file: Path, spans: RunnerSpans) -> None:
        self._key_file = key_file
        self._spans = spans
        self._key = b""
        self._clients: dict[Replica, RunnerClient] = {}

    def open(self) -> None:
        """Read the platform's key; raises ``ConfigurationError`` when there is none."""
        try:
            self._key = self._key_file.read_bytes().strip()
        except OSError as error:
            raise ConfigurationError(f"the runner key {self._key_file} cannot be read: {error.strerror}") from error
        if not self._key:
            raise ConfigurationError(f"the runner key {self._key_file} is empty")

    def send(
        self,
        route: Route,
        replica: Replica,
        inputs: Mapping[str, Rows],
        outputs: tuple[str, ...] | None,
        traceparent: str | None,
        done: Done,
        *,
        timeout_s: float | None = None,
    ) -> Asked:
        """Ask one replica of a route and return at once; nothing is raised, and ``done`` is not called before this returns.

        When there is a connection the request has been written on return. No span is exported: that is for whoever knows the callers
        (:meth:`export_span`).

        Parameters
        ----------
        traceparent
            W3C trace context when the runner shall time its part as a span (``InferResponse.span``); else None.
        done
            Given the answer, or one of ``InvalidInputError``, ``ModelError``, ``RunnerGoneError``, ``DeadlineExceededError`` (the runner
            did not begin in time) and ``NotReadyError`` (it does not accept the platform's key). Must not raise.
        timeout_s
            Seconds after which the runner does not begin on it any more. A model that is slow or hangs is not interrupted: the caller has a
            clock of its own, and calls ``cancel()`` on what this returns when nobody waits any longer.
        """
        client = self._clients.get(replica) or self._client(replica)
        if not client.is_connected:
            done = _with_refusal(done, route, replica)
        return client.send(inputs, outputs=outputs, timeout_s=timeout_s, traceparent=traceparent, done=done)

    def export_span(self, span: Span, parent_traceparent: str, route: Route, replica: Replica) -> None:
        """Export a runner's span as the child of one of its callers' spans; a malformed parent exports nothing."""
        parent = trace.get_current_span(telemetry.extract(parent_traceparent)).get_span_context()
        self._spans.export(span, parent, route, replica.replica_id)

    async def infer(self, route: Route, replica: Replica, request: InferRequest) -> InferResponse:
        """Ask one replica of a route; its span becomes a child of the current one, if that is sampled.

        Raises
        ------
        NotReadyError
            The runner does not accept the platform's key.
        InvalidInputError, ModelError, RunnerGoneError
            As ``RunnerClient.infer``.
        """
        parent = trace.get_current_span().get_span_context()
        traceparent = telemetry.current_traceparent() if parent.trace_flags.sampled else None
        try:
            response = await self._client(replica).infer(request.inputs, outputs=request.outputs, traceparent=traceparent)
        except UnauthenticatedError as error:
            raise _refused(route, replica) from error
        if response.span is not None:
            self._spans.export(response.span, parent, route, replica.replica_id)
        return response

    async def ping(self, replica: Replica, *, timeout_s: float) -> float:
        """Return when the runner answers; the value is for how many seconds it has been busy with one request.

        Raises
        ------
        NotReadyError
            The runner does not accept the platform's key.
        RunnerGoneError, DeadlineExceededError
            As ``RunnerClient.ping``.
        """
        try:
            return await self._client(replica).ping(timeout_s=timeout_s)
        except UnauthenticatedError as error:
            raise _refused(None, replica) from error

    def keep(self, live: Collection[Replica]) -> None:
        """Forget all other runners; requests that they still answer end as they would."""
        for replica in self._clients.keys() - set(live):
            self._clients.pop(replica).retire()

    async def close(self) -> None:
        """Close all connections and flush the spans."""
        clients, self._clients = self._clients, {}
        await asyncio.gather(*(client.close() for client in clients.values()))
        await asyncio.to_thread(self._spans.shutdown)

    def _client(self, replica: Replica) -> RunnerClient:
        client = self._clients.get(replica)
        if client is None:
            client = self._clients[replica] = RunnerClient(replica.address, runner_token(self._key, replica.replica_id))
        return client


def _with_refusal(done: Done, route: Route, replica: Replica) -> Done:
    def translated(value: InferResponse | MillraceError) -> None:
        done(_refused(route, replica) if isinstance(value, UnauthenticatedError) else value)

    return translated


def _refused(route: Route | None, replica: Replica) -> NotReadyError:
    whose = f" of {route.deployment_id}" if route is not None else ""
    return NotReadyError(f"the runner {replica.replica_id}{whose} does not accept the platform's key")
