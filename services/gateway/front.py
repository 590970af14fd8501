"""The front: every HTTP request passes here. Route, authorise, answer, and translate errors into HTTP."""

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from opentelemetry import trace
from opentelemetry.trace import Span
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs import telemetry
from libs.errors import MillraceError
from libs.inference.routing import Route
from services.gateway import bodies, routes, tracing
from services.gateway.access import AccessControl, Principal
from services.gateway.asynchronous import AsyncPredictions, prefers_async
from services.gateway.dataplane import DataPlane
from services.gateway.error_bodies import error_answer
from services.gateway.errors import InternalError
from services.gateway.exchange import TOLD, Incoming, Outgoing, read_body
from services.gateway.http import AsgiApp, Exchange
from services.gateway.http.answers import given_request_id
from services.gateway.predictions import Caller, Handler, Read
from services.gateway.refusals import Refused, nobody, refuse
from services.gateway.routes import Door, Found, HttpRoute
from services.gateway.tracing import Tracing, traceparent_of

log = logging.getLogger(__name__)

_MOST_KNOWN_PATHS = 4096
_LONGEST_KNOWN_PATH = 512
_MOST_UNWANTED_BYTES = 65_536
"""A body that a route has no use for is taken up to this size, and not looked at."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What follows from the head of a request alone; equal heads of one connection share it."""

    found: Found
    principal: Principal
    error: MillraceError | None
    read: Read | None
    handler: Handler | None
    request_id: str | None
    prefers_async: bool


@dataclass(slots=True)
class Visit:
    """One request on its way."""

    admission: Admission
    request_id: str
    started_s: float
    span: Span | None


class Front:
    """Answers every request of the HTTP server.

    Parameters
    ----------
    reads
        Predict doors, by method and route template.
    handlers
        Handlers of the other plain routes.
    refused
        Is told of predict requests that never reach the data plane.
    api
        The management API.
    """

    def __init__(
        self,
        access: AccessControl,
        reads: Mapping[tuple[str, str], Read],
        handlers: Mapping[tuple[str, str], Handler],
        api: ASGIApp,
        dataplane: DataPlane,
        asynchronous: AsyncPredictions,
        spans: Tracing,
        *,
        refused: Refused = nobody,
        predict_max_bytes: int,
        management_max_bytes: int,
    ) -> None:
        self._access = access
        self._reads = reads
        self._handlers = handlers
        self._api = api
        self._dataplane = dataplane
        self._asynchronous = asynchronous
        self._spans = spans
        self._refused = refused
        self._predict_max_bytes = predict_max_bytes
        self._management_max_bytes = management_max_bytes
        self._known: dict[tuple[str, bytes], Found] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def admit(self, exchange: Exchange) -> int | AsgiApp | None:
        """Look at the head of a request: how much body it may have, or who answers it."""
        head = exchange.head
        admission: Admission | None = head.memo
        if admission is None:
            admission = head.memo = self._admission(exchange)
        request_id = admission.request_id or f"{random.getrandbits(128):032x}"
        route = admission.found.route
        span = self._spans.start(exchange, route, request_id)
        visit = exchange.context = Visit(admission, request_id, time.perf_counter(), span)
        if admission.error is not None:
            self._turn_away(exchange, admission.error)
            return None
        if route is None or route.door is Door.PLAIN:
            exchange.on_refused = partial(self._refuse, exchange)
            if span is not None:
                exchange.on_gone = partial(self._end, exchange, 0, None)
            return self._predict_max_bytes if exchange.method == "POST" else _MOST_UNWANTED_BYTES
        return partial(self._run_api, exchange, visit)

    def handle(self, exchange: Exchange) -> None:
        """Answer a plain request, now or later."""
        visit: Visit = exchange.context
        admission, span = visit.admission, visit.span
        incoming = Incoming(
            admission.found.parameters, exchange.headers, exchange.body, exchange.query, visit.request_id, admission.principal.name
        )
        if admission.handler is not None:
            self._later(self._run_handler(exchange, visit, admission.handler, incoming))
            return
        assert admission.read is not None  # noqa: S101 - a plain route is one or the other
        try:
            try:
                ask = admission.read(incoming)
            except MillraceError as error:
                self._turn_away(exchange, error)
                return
            if admission.prefers_async:
                self._later(self._run_handler(exchange, visit, partial(self._asynchronous.accept, ask, exchange.raw_path), incoming))
                return
            caller = Caller(visit.request_id, admission.principal.name, None if span is None else traceparent_of(span), len(exchange.body))
            pending = self._dataplane.submit(ask, caller, partial(self._answer, exchange))
        except MillraceError as error:
            self._fail(exchange, error)
        except Exception:
            log.exception("a bug: %s was not handled", exchange.raw_path[:200])
            self._bug(exchange)
        else:
            if not pending.is_over:
                exchange.on_gone = partial(self._gone, exchange, pending)
            if span is not None and pending.route is not None:
                _describe(span, pending.route)

    def _admission(self, exchange: Exchange) -> Admission:
        found = self._find(exchange.method, exchange.raw_path)
        principal, error = _NOBODY, found.error
        try:
            principal = self._access.admit(found.route, exchange.headers)
        except MillraceError as refusal:
            error = refusal
        key = (found.route.method, found.route.template) if found.route else ("", "")
        prefers = prefers_async(exchange.headers)
        request_id = given_request_id(exchange.headers)
        return Admission(found, principal, error, self._reads.get(key), self._handlers.get(key), request_id, prefers)

    def _find(self, method: str, raw_path: bytes) -> Found:
        """Look a request line up; what leads somewhere is remembered, since heads differ in little but their lengths and ids."""
        found = self._known.get((method, raw_path))
        if found is None:
            found = routes.find(method, raw_path.decode("latin-1"))
            if found.route is not None and found.error is None and len(raw_path) <= _LONGEST_KNOWN_PATH:
                if len(self._known) >= _MOST_KNOWN_PATHS:
                    self._known.clear()
                self._known[method, raw_path] = found
        return found

    def _refuse(self, exchange: Exchange, status: int, sentence: str) -> None:
        """Answer for the server, whose reasons lie in the body, in the form that the path's clients know."""
        self._turn_away(exchange, _BodyError(status, sentence))

    def _turn_away(self, exchange: Exchange, error: MillraceError) -> None:
        """Answer a request that never reaches the data plane."""
        visit: Visit = exchange.context
        found = visit.admission.found
        if visit.admission.read is not None and found.route is not None:
            refuse(self._refused, found.route.template, found.parameters, error)
        self._fail(exchange, error)

    def _answer(self, exchange: Exchange, result: Outgoing | MillraceError) -> None:
        """Send what the data plane says."""
        exchange.on_gone = None
        try:
            if isinstance(result, MillraceError):
                self._fail(exchange, result)
            else:
                self._send(exchange, result)
        except Exception:
            log.exception("a bug: the answer to %s could not be sent", exchange.raw_path[:200])
            self._bug(exchange)

    def _fail(self, exchange: Exchange, error: MillraceError) -> None:
        self._send(exchange, error_answer(error, exchange.raw_path), error)

    def _bug(self, exchange: Exchange) -> None:
        self._fail(exchange, InternalError("something went wrong in the gateway; its log tells more under this request's x-request-id"))

    def _send(self, exchange: Exchange, outgoing: Outgoing, error: MillraceError | None = None) -> None:
        visit: Visit = exchange.context
        if not exchange.is_gone:
            headers = ((b"content-type", outgoing.media_type), (b"x-request-id", visit.request_id.encode()), *outgoing.headers)
            exchange.respond(outgoing.status, headers, outgoing.body)
        self._end(exchange, outgoing.status, error)

    def _gone(self, exchange: Exchange, pending: object) -> None:
        self._dataplane.cancel(pending)  # type: ignore[arg-type]
        self._end(exchange, 0, None)

    def _end(self, exchange: Exchange, status: int, error: MillraceError | None) -> None:
        visit: Visit = exchange.context
        if visit.span is not None:
            tracing.end(visit.span, status, error)
            visit.span = None
        _log_request(exchange, visit, status, error)

    async def _run_handler(self, exchange: Exchange, visit: Visit, handler: Handler, incoming: Incoming) -> None:
        with telemetry.log_context(request_id=visit.request_id), _current(visit.span):
            try:
                self._send(exchange, await handler(incoming))
            except MillraceError as error:
                self._fail(exchange, error)
            except Exception:
                log.exception("a bug: %s was not handled", exchange.raw_path[:200])
                self._bug(exchange)

    async def _run_api(self, exchange: Exchange, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the management API on a request; it reads the body itself."""
        answered = _Answered(send, visit.request_id)
        error: MillraceError | None = None
        with telemetry.log_context(request_id=visit.request_id), _current(visit.span):
            try:
                error = await self._ask_api(visit, scope, receive, answered)
            except ClientDisconnect:
                pass
            except MillraceError as told:
                error = told
            except Exception:
                log.exception("a bug: %s %s failed", scope["method"], scope["path"])
                error = InternalError("something went wrong in the gateway; its log tells more under this request's x-request-id")
            if error is not None and answered.status == 0:
                await error_answer(error, exchange.raw_path).send(answered)
            self._end(exchange, answered.status, error)

    async def _ask_api(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> MillraceError | None:
        route = visit.admission.found.route
        assert route is not None  # noqa: S101 - or it would have been turned away
        scope = {**scope, "method": route.method}  # of HEAD: GET
        if route.door is Door.API:
            body = await read_body(receive, dict(scope["headers"]), self._management_max_bytes)
            scope["headers"] = _as_json(scope["headers"])
            receive = _replayed(bodies.portable(bytes(body)) if body else b"", receive)
        await self._api(scope, receive, send)
        told: MillraceError | None = scope.get(TOLD)
        return told

    def _later(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_NOBODY = Principal("nobody", frozenset())


class _Answered:
    """The sending end of an ASGI request: names the request in the answer's head, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id.encode()
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self._request_id)]}
        await self._send(message)


def _current(span: Span | None) -> AbstractContextManager[Span]:
    return trace.use_span(span if span is not None else trace.INVALID_SPAN)


class _BodyError(MillraceError):
    """What the HTTP server says of a body; carries its own status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.http_status = HTTPStatus(status)  # type: ignore[misc]


def _describe(span: Span, route: Route) -> None:
    span.set_attributes({"millrace.endpoint": route.endpoint_name, "millrace.model": route.model_name, "millrace.version": route.version})


def _as_json(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A management body is JSON, whatever the client (``curl -d``) calls it."""
    return [(name, value) for name, value in headers if name != b"content-type"] + [(b"content-type", b"application/json")]


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What is received once a body has been read: that body, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _log_request(exchange: Exchange, visit: Visit, status: int, error: MillraceError | None) -> None:
    """Log a request: all of the management API, of the others what went wrong here."""
    route: HttpRoute | None = visit.admission.found.route
    level = logging.DEBUG if route is not None and route.door is Door.PLAIN and status < 500 else logging.INFO
    if not log.isEnabledFor(level):
        return
    duration_s = time.perf_counter() - visit.started_s
    fields: dict[str, object] = {
        "status": status or "client gone",
        "duration_s": round(duration_s, 4),
        "request_id": visit.request_id,
    }
    if error is not None:
        fields["error"] = error.message
    log.log(
        level,
        "%s %s",
        exchange.method,
        route.template if route else exchange.raw_path.decode("latin-1")[:200],
        extra={"fields": fields},
    )
