"""Spans of HTTP requests: whether a request is traced is decided first, so that one that is not costs next to nothing."""

import random
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from opentelemetry import trace
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

from libs import telemetry
from libs.errors import MillraceError
from libs.settings import TelemetrySettings
from services.gateway.exchange import Headers
from services.gateway.http import Exchange
from services.gateway.routes import METHODS, HttpRoute


class Tracing:
    """Starts and ends the gateway's server spans.

    Parameters
    ----------
    ratio
        Share of requests without a valid ``traceparent`` that are traced; with one, the caller has decided.
    """

    def __init__(self, ratio: float, choose: Callable[[], float] = random.random) -> None:
        self._ratio = ratio
        self._choose = choose

    def start(self, exchange: Exchange, route: HttpRoute | None, request_id: str) -> Span | None:
        """The span of a request; None when it is not traced."""
        traceparent = exchange.headers.get(b"traceparent")
        if not self.wants(traceparent):
            return None
        return self.begin(_name(exchange, route), traceparent, {**_attributes(exchange, route), "millrace.request_id": request_id})

    def wants(self, traceparent: bytes | None) -> bool:
        """Whether a request with this ``traceparent``, or without one, may be traced."""
        return traceparent is not None or self._choose() < self._ratio

    def begin(self, name: str, traceparent: bytes | None, attributes: Mapping[str, str | int]) -> Span | None:
        """A server span of a request that is wanted; None when its caller does not trace, or says nothing that can be read."""
        is_readable = traceparent is not None and b"," not in traceparent  # several are joined by commas
        parent = telemetry.extract(traceparent.decode("latin-1")) if traceparent is not None and is_readable else None
        if traceparent is not None and not trace.get_current_span(parent).get_span_context().is_valid and not self.wants(None):
            return None
        span = telemetry.tracer().start_span(name, parent, SpanKind.SERVER, {**attributes, telemetry.DECIDED: True})
        return span if span.is_recording() else None


def tracing(settings: TelemetrySettings) -> Tracing:
    """Traces the configured share of requests; none that nobody would collect."""
    return Tracing(settings.otel_traces_sampler_arg if settings.otel_exporter_otlp_endpoint else 0.0)


def end(span: Span, status: int, error: MillraceError | None = None) -> None:
    """End a span with the status that was answered; 0 means that the client had gone."""
    if status:
        span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, status)
    if status >= 500:
        span.set_attribute(error_attributes.ERROR_TYPE, type(error).__name__ if error else str(status))
        span.set_status(Status(StatusCode.ERROR, error.message if error else None))
    span.end()


def traceparent_of(span: Span) -> str:
    """W3C form of a span's context."""
    context = span.get_span_context()
    return f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}-{context.trace_flags:02x}"


def _name(exchange: Exchange, route: HttpRoute | None) -> str:
    method = exchange.method if exchange.method in METHODS else "HTTP"
    return f"{method} {route.template}" if route else method


def _attributes(exchange: Exchange, route: HttpRoute | None) -> Mapping[str, str | int]:
    headers: Headers = exchange.headers
    attributes: MutableMapping[str, Any] = {
        http_attributes.HTTP_REQUEST_METHOD: exchange.method if exchange.method in METHODS else "_OTHER",
        url_attributes.URL_PATH: exchange.raw_path.decode("latin-1")[:1024],
        url_attributes.URL_SCHEME: exchange.scheme,
        network_attributes.NETWORK_PROTOCOL_VERSION: exchange.http_version,
    }
    if route is not None:
        attributes[http_attributes.HTTP_ROUTE] = route.template
    if exchange.client:
        attributes[client_attributes.CLIENT_ADDRESS] = exchange.client[0]
    if exchange.server:
        attributes[server_attributes.SERVER_ADDRESS], attributes[server_attributes.SERVER_PORT] = exchange.server
    if b"user-agent" in headers:
        attributes[user_agent_attributes.USER_AGENT_ORIGINAL] = headers[b"user-agent"].decode("latin-1")[:256]
    return attributes
