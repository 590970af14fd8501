"""A Jaeger for the traces of one machine, if there is one on PATH: in memory, on loopback."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
OTLP_PORT = 4318
QUERY_PORT = 16686
_MAX_TRACES = 5_000


@dataclass(frozen=True)
class Jaeger:
    """How to start the one that was found."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


def find(configuration: Path) -> Jaeger | None:
    """``jaeger`` (version 2) or ``jaeger-all-in-one`` (version 1); None when neither is on PATH.

    Parameters
    ----------
    configuration
        Where to write version 2's configuration; its built-in one opens every port that Jaeger knows.
    """
    if binary := shutil.which("jaeger"):
        configuration.write_text(_CONFIGURATION)
        return Jaeger((binary, "--config", f"file:{configuration}"), {"OTEL_TRACES_SAMPLER": "always_off"})
    if binary := shutil.which("jaeger-all-in-one"):
        return Jaeger((binary, *_VERSION_1_OPTIONS), {"COLLECTOR_OTLP_ENABLED": "true"})
    return None


_VERSION_1_OPTIONS = (
    f"--collector.otlp.http.host-port={LOOPBACK}:{OTLP_PORT}",
    f"--query.http-server.host-port={LOOPBACK}:{QUERY_PORT}",
    f"--query.grpc-server.host-port={LOOPBACK}:0",
    f"--collector.otlp.grpc.host-port={LOOPBACK}:0",
    f"--collector.grpc-server.host-port={LOOPBACK}:0",
    f"--collector.http-server.host-port={LOOPBACK}:0",
    f"--admin.http.host-port={LOOPBACK}:0",
    f"--memory.max-traces={_MAX_TRACES}",
)

_CONFIGURATION = f"""\
service:
  extensions: [jaeger_storage, jaeger_query]
  pipelines:
    traces:
      receivers: [otlp]
      processors: [batch]
      exporters: [jaeger_storage_exporter]
  telemetry:
    logs:
      level: warn
    metrics:
      level: none
extensions:
  jaeger_storage:
    backends:
      memory:
        memory:
          max_traces: {_MAX_TRACES}
  jaeger_query:
    storage:
      traces: memory
    http:
      endpoint: "{LOOPBACK}:{QUERY_PORT}"
    grpc:
      endpoint: "{LOOPBACK}:0"
receivers:
  otlp:
    protocols:
      http:
        endpoint: "{LOOPBACK}:{OTLP_PORT}"
processors:
  batch:
    timeout: 200ms
exporters:
  jaeger_storage_exporter:
    trace_storage: memory
"""
