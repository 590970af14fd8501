"""What an OpenTelemetry SDK sends is what is kept."""

import pytest
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags

from libs.cli.trace_sink import TraceSink
from libs.cli.traces import tree


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip])
def test_spans_that_were_sent_are_a_trace(compression: Compression) -> None:
    elsewhere = SpanContext(0xF, 0xE, is_remote=True, trace_flags=TraceFlags(1))
    with TraceSink() as sink:
        provider = TracerProvider(resource=Resource({"service.name": "millrace-gateway"}))
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"{sink.url}/v1/traces", compression=compression)))
        tracer = provider.get_tracer("test")
        with tracer.start_as_current_span("POST", links=[Link(elsewhere)]) as parent:
            tracer.start_span("infer", start_time=1_000_000_000).end(3_000_000_000)
            parent.set_status(Status(StatusCode.ERROR, "no row"))
        provider.shutdown()
        trace_id = format(parent.get_span_context().trace_id, "032x")
        infer, post = sink.spans_so_far(trace_id)
        assert sink.spans_so_far("0" * 32) == []
    assert (infer.service, infer.operation, infer.start_s, infer.duration_s, infer.error) == ("millrace-gateway", "infer", 1.0, 2.0, None)
    assert (infer.parent_id, post.parent_id, post.error, post.links) == (post.span_id, None, "no row", (f"trace {15:032x}",))
    assert len(list(tree([infer, post]))) == 2
