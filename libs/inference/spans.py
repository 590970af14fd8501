"""Spans of runners: a runner has no telemetry of its own, so whoever asked it exports its span on its behalf."""

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, SpanKind

from libs import telemetry
from libs.inference.requests import Span
from libs.inference.routing import Route
from libs.settings import TelemetrySettings


class RunnerSpans:
    """Exports runners' spans under ``service.name`` ``millrace-runner``.

    Parameters
    ----------
    processor
        Where ended spans go; None: nowhere.
    """

    def __init__(self, processor: SpanProcessor | None) -> None:
        self._processor = processor
        self._resource = Resource.create({"service.name": "millrace-runner", "service.namespace": "millrace"})

    def export(self, span: Span, parent: SpanContext, route: Route, replica_id: str) -> None:
        """Export one span as the child of the span that asked."""
        if self._processor is None or not parent.is_valid:
            return
        self._processor.on_end(
            ReadableSpan(
                name=f"infer {route.model_name}",
                context=SpanContext(parent.trace_id, int(span.span_id, 16), is_remote=True, trace_flags=parent.trace_flags),
                parent=parent,
                resource=self._resource,
                attributes={
                    "millrace.endpoint": route.endpoint_name,
                    "millrace.model": route.model_name,
                    "millrace.version": route.version,
                    "service.instance.id": replica_id,
                },
                kind=SpanKind.SERVER,
                start_time=span.start_ns,
                end_time=span.end_ns,
            )
        )

    def shutdown(self) -> None:
        """Flush what is left."""
        if self._processor is not None:
            self._processor.shutdown()


def runner_spans(settings: TelemetrySettings) -> RunnerSpans:
    """Exports to the configured collector, if there is one."""
    if not settings.otel_exporter_otlp_endpoint:
        return RunnerSpans(None)
    return RunnerSpans(BatchSpanProcessor(telemetry.span_exporter(settings)))
