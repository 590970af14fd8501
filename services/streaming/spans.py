"""Spans of records: one for each whose trace is sampled, and the runner's beneath it."""

from collections.abc import Iterable

from opentelemetry.semconv._incubating.attributes import messaging_attributes as semconv
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

from libs import telemetry
from services.streaming.batches import Item

_SAMPLED = 1


def begin(item: Item, topic: str) -> None:
    """Begin the span of a record; its result then carries the span's ``traceparent``. Traces that are not sampled are passed on."""
    request = item.request
    if request.traceparent is not None and not _is_sampled(request.traceparent):
        return
    attributes: dict[str, str | int] = {
        semconv.MESSAGING_SYSTEM: "kafka",
        semconv.MESSAGING_DESTINATION_NAME: topic,
        semconv.MESSAGING_DESTINATION_PARTITION_ID: str(request.taken.partition),
        semconv.MESSAGING_OPERATION_TYPE: "process",
        semconv.MESSAGING_OPERATION_NAME: "process",
        semconv.MESSAGING_MESSAGE_ID: request.id,
        semconv.MESSAGING_KAFKA_OFFSET: request.taken.offset,
        "millrace.endpoint": request.endpoint_name,
    }
    span = telemetry.tracer().start_span(
        f"process {topic}", telemetry.extract(request.traceparent), SpanKind.CONSUMER, attributes=attributes
    )
    context = span.get_span_context()
    if context.is_valid:
        request.traceparent = f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-{context.trace_flags:02x}"
    if span.is_recording():
        item.span = span


def sampled(items: Iterable[Item]) -> str | None:
    """The trace context for a runner that is asked these records; None when none of them is sampled."""
    return next((item.request.traceparent for item in items if item.span is not None), None)


def parents(items: Iterable[Item]) -> list[str]:
    """Spans under which the runner's belongs: one for each trace."""
    found: dict[str, str] = {}
    for item in items:
        traceparent = item.request.traceparent
        if item.span is not None and traceparent is not None:
            found.setdefault(traceparent[3:35], traceparent)
    return list(found.values())


def _is_sampled(traceparent: str) -> bool:
    return bool(int(traceparent[-2:], 16) & _SAMPLED)
