"""The ASGI front: every request passes here. Route, admit, trace, answer, and translate errors into HTTP."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping, MutableMapping
from typing import Any

from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
    user_agent_attributes,
)
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs import telemetry
from libs.errors import MillraceError
from services.gateway import routes
from services.gateway.access import AccessControl
from services.gateway.errors import InternalError
from services.gateway.exchange import TOLD, Headers, Incoming, error_answer, read_body
from services.gateway.predict import Handler
from services.gateway.routes import Door, Found, HttpRoute

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})

LINGER_S = 2.0
LINGER_BYTES = 64 * 2**20
"""What a client still sends after its request was refused is read for a while, or it would see a broken connection, not the reason."""


class Front:
    """The whole gateway as one ASGI application.

    Parameters
    ----------
    plain
        Handlers of the plain routes, by method and template.
    api
        The management API.
    """

    def __init__(
        self,
        access: AccessControl,
        plain: Mapping[tuple[str, str], Handler],
        api: ASGIApp,
        *,
        predict_max_bytes: int,
        management_max_bytes: int,
    ) -> None:
        self._access = access
        self._plain = plain
        self._api = api
        self._predict_max_bytes = predict_max_bytes
        self._management_max_bytes = management_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        headers: Headers = dict(scope["headers"])
        request_id = _request_id(headers)
        found = routes.find(scope["method"], _raw_path(scope))
        exchange = _Exchange(receive, send, headers, request_id)
        with (
            telemetry.log_context(request_id=request_id),
            telemetry.tracer().start_as_current_span(
                _span_name(scope, found.route),
                telemetry.extract(headers.get(b"traceparent", b"").decode("latin-1")),
                SpanKind.SERVER,
                {**_span_attributes(scope, headers, found.route), "millrace.request_id": request_id},
            ) as span,
        ):
            error = await self._answer(scope, headers, found, exchange)
            _end_span(span, exchange.status, error)
            _log_request(scope, found.route, exchange.status, time.perf_counter() - started, error)

    async def _answer(self, scope: Scope, headers: Headers, found: Found, exchange: "_Exchange") -> MillraceError | None:
        """Answer a request; the value is the error that the answer tells, if it tells one."""
        try:
            self._access.admit(found.route, headers)
            if found.error is not None:
                raise found.error
            if found.route is None:
                return None
            return await self._dispatch(found.route, found.parameters, scope, headers, exchange)
        except ClientDisconnect:
            return None
        except MillraceError as error:
            told = error
        except Exception:
            log.exception("a bug: %s %s failed", scope["method"], found.route.template if found.route else scope["path"])
            told = InternalError("something went wrong in the gateway; its log tells more under this request's x-request-id")
        if exchange.status == 0:
            await error_answer(told).send(exchange.send)
        return told

    async def _dispatch(
        self, route: HttpRoute, parameters: Mapping[str, str], scope: Scope, headers: Headers, exchange: "_Exchange"
    ) -> MillraceError | None:
        if route.door is Door.PLAIN:
            body = await read_body(exchange.receive, headers, self._predict_max_bytes) if route.method == "POST" else b""
            answer = await self._plain[route.method, route.template](Incoming(parameters, headers, body))
            await answer.send(exchange.send)
            return None
        receive: Receive = exchange.receive
        scope = {**scope}
        if route.door is Door.API:
            body = await read_body(receive, headers, self._management_max_bytes)
            scope["headers"] = _as_json(scope["headers"])
            receive = _replayed(bytes(body), receive)
        await self._api(scope, receive, exchange.send)
        told: MillraceError | None = scope.get(TOLD)
        return told


class _Exchange:
    """The two ends of a request, watched: what was answered, and whether more of the body is to come.

    When a request is refused before all of it was read, the rest is read and thrown away for a while, and the connection closed.
    """

    def __init__(self, receive: Receive, send: Send, headers: Headers, request_id: str) -> None:
        self._receive = receive
        self._send = send
        self._request_id = request_id.encode()
        self._has_more = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._has_more = False
        return message

    async def send(self, message: Message) -> None:
        refusing = self.status >= 400 and self._has_more
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], (b"x-request-id", self._request_id)]
            if self.status >= 400 and self._has_more:
                headers.append((b"connection", b"close"))
            await self._send({**message, "headers": headers})
        elif refusing and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._discard()
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self._send(message)

    async def _discard(self) -> None:
        read_bytes = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while self._has_more and read_bytes < LINGER_BYTES:
                    read_bytes += len((await self.receive()).get("body", b""))
        except TimeoutError:
            return


def _request_id(headers: Headers) -> str:
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _raw_path(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.decode("latin-1")


def _as_json(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A management body is JSON, whatever the client (``curl -d``) calls it."""
    return [(name, value) for name, value in headers if name != b"content-type"] + [(b"content-type", b"application/json")]


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What is received once a body has been read: that body, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _span_name(scope: Scope, route: HttpRoute | None) -> str:
    method = scope["method"] if scope["method"] in _METHODS else "HTTP"
    return f"{method} {route.template}" if route else method


def _span_attributes(scope: Scope, headers: Headers, route: HttpRoute | None) -> Mapping[str, str | int]:
    attributes: MutableMapping[str, Any] = {
        http_attributes.HTTP_REQUEST_METHOD: scope["method"] if scope["method"] in _METHODS else "_OTHER",
        url_attributes.URL_PATH: scope["path"][:1024],
        url_attributes.URL_SCHEME: scope.get("scheme", "http"),
        network_attributes.NETWORK_PROTOCOL_VERSION: scope.get("http_version", "1.1"),
    }
    if route is not None:
        attributes[http_attributes.HTTP_ROUTE] = route.template
    if scope.get("client"):
        attributes[client_attributes.CLIENT_ADDRESS] = scope["client"][0]
    if scope.get("server"):
        attributes[server_attributes.SERVER_ADDRESS] = scope["server"][0]
        if scope["server"][1] is not None:
            attributes[server_attributes.SERVER_PORT] = scope["server"][1]
    if b"user-agent" in headers:
        attributes[user_agent_attributes.USER_AGENT_ORIGINAL] = headers[b"user-agent"].decode("latin-1")[:256]
    return attributes


def _end_span(span: Span, status: int, error: MillraceError | None) -> None:
    if status:
        span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, status)
    if status >= 500:
        span.set_attribute(error_attributes.ERROR_TYPE, type(error).__name__ if error else str(status))
        span.set_status(Status(StatusCode.ERROR, error.message if error else None))


def _log_request(scope: Scope, route: HttpRoute | None, status: int, duration_s: float, error: MillraceError | None) -> None:
    level = logging.DEBUG if route is not None and route.door is Door.PLAIN and status < 400 else logging.INFO
    if not log.isEnabledFor(level):
        return
    fields = {"status": status or "client gone", "duration_s": round(duration_s, 4)}
    if error is not None:
        fields["error"] = error.message
    log.log(level, "%s %s", scope["method"], route.template if route else scope["path"][:200], extra={"fields": fields})
