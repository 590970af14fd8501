import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from tests.integration.servers import JaegerServer, jaeger_server  # noqa: F401 (a fixture)

pytestmark = pytest.mark.integration


def test_jaeger_keeps_the_spans_it_is_sent(jaeger_server: JaegerServer) -> None:  # noqa: F811
    provider = TracerProvider(resource=Resource({"service.name": "mill"}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{jaeger_server.otlp_http}/v1/traces")))
    tracer = provider.get_tracer(__name__)
    with tracer.start_as_current_span("grind") as parent, tracer.start_as_current_span("sieve"):
        trace_id = f"{parent.get_span_context().trace_id:032x}"
    provider.shutdown()
    trace = jaeger_server.trace(trace_id, spans=2)
    assert {span["operationName"] for span in trace["spans"]} == {"grind", "sieve"}
    assert "mill" in jaeger_server.services()
