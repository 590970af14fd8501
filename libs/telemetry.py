"""Traces and logs, the same way in every process."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Tracer

from libs.settings import TelemetrySettings

# The last is where faust logs the life-cycle of the services that we derive from its own.
_NOISY_LOGGERS = ("faust", "mode", "httpx", "opentelemetry", "asyncio", "kafka", "libs.messaging.faust_app")

# It repeats several errors ten times a second while the broker is away; what fails because of it is told by us, as a TransientError.
_SILENT_LOGGER = "aiokafka"

DECIDED = "millrace.sampled"
"""Attribute of a new root span whose caller has decided already that it is sampled."""

_log_context: ContextVar[Mapping[str, str]] = ContextVar("log_context", default={})  # noqa: B039 - never mutated

_TRACEPARENT_CHARS = 55
"""Of version 00; later ones may be longer."""


def configure(service_name: str, settings: TelemetrySettings) -> TracerProvider:
    """Set up logging and the process's tracer provider; spans are exported only if a collector is configured.

    Returns the provider so that the caller can ``shutdown()`` it, which flushes what is left.
    """
    _configure_logs(service_name, settings)
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"millrace-{service_name}", "service.namespace": "millrace"}),
        sampler=ParentBased(_RootSampler(settings.otel_traces_sampler_arg)),
    )
    if settings.otel_exporter_otlp_endpoint:
        provider.add_span_processor(BatchSpanProcessor(span_exporter(settings)))
    trace.set_tracer_provider(provider)
    return provider


class _RootSampler(TraceIdRatioBased):
    """Samples a share of the roots, and those that were sampled before they were made."""

    def should_sample(self, parent_context: Context | None, trace_id: int, name: str, *arguments: Any, **named: Any) -> SamplingResult:
        attributes = arguments[1] if len(arguments) > 1 else named.get("attributes")
        if attributes and DECIDED in attributes:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, {key: value for key, value in attributes.items() if key != DECIDED})
        return super().should_sample(parent_context, trace_id, name, *arguments, **named)


def span_exporter(settings: TelemetrySettings) -> OTLPSpanExporter:
    """OTLP/HTTP exporter to the configured collector."""
    return OTLPSpanExporter(endpoint=f"{settings.otel_exporter_otlp_endpoint.rstrip('/')}/v1/traces", timeout=5)


def tracer() -> Tracer:
    """The tracer of this code base."""
    return trace.get_tracer("millrace")


def extract(traceparent: str | None) -> Context | None:
    """Trace context of a W3C ``traceparent``; None when there is none (a malformed one counts as none)."""
    return propagate.extract({"traceparent": traceparent}, context=Context()) if traceparent else None


def checked_traceparent(traceparent: str | None) -> str | None:
    """The ``traceparent`` if it is a valid one, else None: what strangers wrote is not passed on.

    One of a later version is passed on as the version that we know, without what follows the flags, as W3C Trace Context demands.
    """
    if not traceparent or not trace.get_current_span(extract(traceparent)).get_span_context().is_valid:
        return None
    return f"00{traceparent.strip()[2:_TRACEPARENT_CHARS]}"


def current_traceparent() -> str | None:
    """W3C ``traceparent`` of the current span, or None outside of one."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def log_context(**values: str | None) -> Iterator[None]:
    """Add fields to every line logged inside the block."""
    token = _log_context.set({**_log_context.get(), **{name: value for name, value in values.items() if value}})
    try:
        yield
    finally:
        _log_context.reset(token)


class _Formatter(logging.Formatter):
    def __init__(self, service_name: str, as_json: bool) -> None:
        super().__init__()
        self._service_name = service_name
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {**_log_context.get(), **getattr(record, "fields", {})}
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            fields["trace_id"] = format(span.trace_id, "032x")
        error = self.formatException(record.exc_info) if record.exc_info else None
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        if self._as_json:
            line = {"time": time, "level": record.levelname, "service": self._service_name, "message": record.getMessage(), **fields}
            if error:
                line["exception"] = error
            return orjson.dumps(line, default=str).decode()
        pairs = "".join(f" {name}={value}" for name, value in fields.items())
        return f"{time} {record.levelname:7} {self._service_name}: {record.getMessage()}{pairs}" + (f"\n{error}" if error else "")


def _configure_logs(service_name: str, settings: TelemetrySettings) -> None:
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(service_name, as_json))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    for noisy in _NOISY_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger(_SILENT_LOGGER).setLevel(logging.CRITICAL)
