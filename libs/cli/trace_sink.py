"""A collector in this process: takes spans by OTLP over HTTP and keeps them in memory, for whoever wants to look at a trace without Jaeger.

References
----------
OpenTelemetry Protocol 1.5, "OTLP/HTTP", binary Protobuf encoding.
"""

import gzip
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2

from libs.cli.traces import Span


class TraceSink:
    """Listens on a free port of the loopback interface inside the block; ``url`` is the base URL that spans are sent to."""

    def __init__(self) -> None:
        self._traces: dict[str, list[Span]] = defaultdict(list)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "TraceSink":
        threading.Thread(target=self._server.serve_forever, name="trace sink", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans_so_far(self, trace_id: str) -> list[Span]:
        """The spans of a trace that have arrived."""
        return list(self._traces.get(trace_id, ()))

    def _keep(self, body: bytes) -> None:
        for trace_id, span in _spans(ExportTraceServiceRequest.FromString(body)):
            self._traces[trace_id].append(span)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        keep = self._keep

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                keep(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        return Handler


def _spans(request: ExportTraceServiceRequest) -> Iterator[tuple[str, Span]]:
    for resource_spans in request.resource_spans:
        attributes = {attribute.key: attribute.value.string_value for attribute in resource_spans.resource.attributes}
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield span.trace_id.hex(), _span(span, attributes.get("service.name", ""))


def _span(span: trace_pb2.Span, service: str) -> Span:
    failed = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    return Span(
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        service=service,
        operation=span.name,
        start_s=span.start_time_unix_nano / 1e9,
        duration_s=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        error=(span.status.message or "failed") if failed else None,
        links=tuple(dict.fromkeys(f"trace {link.trace_id.hex()}" for link in span.links if link.trace_id != span.trace_id)),
    )
