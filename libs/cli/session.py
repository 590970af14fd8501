"""What every command that talks to the platform has: its settings, a client, and a trace of its own.

Imports are inside the functions here and in the commands, so that ``millrace --help`` loads neither httpx nor OpenTelemetry.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from libs.cli.client import Client
    from libs.cli.settings import CliSettings


SPANS_TIMEOUT_S = 10.0
"""A limit, which only a collector that does not answer makes anybody wait for."""


@dataclass(frozen=True)
class Session:
    """One command at work; ``trace_id`` is the trace that everything it causes belongs to."""

    client: "Client"
    settings: "CliSettings"
    trace_id: str


@contextmanager
def open_session(command: str) -> Iterator[Session]:
    """Settings, a connection to the gateway and a root span named after the command (a child span, if ``TRACEPARENT`` is set)."""
    from libs import telemetry
    from libs.cli.settings import CliSettings

    settings = CliSettings()
    provider = trace_provider(settings)
    try:
        with (
            provider.get_tracer("millrace").start_as_current_span(f"millrace {command}", telemetry.extract(settings.traceparent)) as span,
            connect(settings) as client,
        ):
            yield Session(client, settings, format(span.get_span_context().trace_id, "032x"))
    finally:
        send_spans(provider)


def connect(settings: "CliSettings") -> "Client":
    """A client of the gateway that the settings name; its requests join the current trace."""
    from libs import telemetry
    from libs.cli.client import Client

    key = settings.api_key.get_secret_value() if settings.api_key else None
    return Client(settings.gateway_url, api_key=key, traceparent=telemetry.current_traceparent)


def send_spans(provider: "TracerProvider") -> None:
    """Send what is left and end; a collector that does not answer keeps nobody waiting for long."""
    sending = threading.Thread(target=provider.shutdown, name="spans", daemon=True)
    sending.start()
    sending.join(SPANS_TIMEOUT_S)


def trace_provider(settings: "CliSettings") -> "TracerProvider":
    """Traces of this process: to the collector the environment names, else to the one the platform at home uses, else nowhere."""
    from libs import telemetry
    from libs.settings import TelemetrySettings

    environment = TelemetrySettings()
    collector = environment.otel_exporter_otlp_endpoint or settings.collector
    provider = telemetry.configure("cli", environment.model_copy(update={"otel_exporter_otlp_endpoint": collector, "log_level": "WARNING"}))
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    return provider
