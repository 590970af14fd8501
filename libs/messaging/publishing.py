"""Publishing an event with its span, so that whoever handles it joins the trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from opentelemetry.semconv._incubating.attributes import messaging_attributes as semconv
from opentelemetry.trace import SpanKind

from libs import telemetry
from libs.messaging import cloudevents
from libs.messaging.broker import Producer
from libs.messaging.cloudevents import Event, P
from schemas.base import Payload


@contextmanager
def publish_span(data: Payload) -> Iterator[None]:
    """The span ``publish <topic>`` of one event; events that are made inside carry it as their trace context."""
    attributes = {
        semconv.MESSAGING_SYSTEM: "kafka",
        semconv.MESSAGING_DESTINATION_NAME: data.topic,
        semconv.MESSAGING_OPERATION_TYPE: "publish",
        semconv.MESSAGING_OPERATION_NAME: "publish",
        "millrace.event.type": data.event_type,
        "millrace.entity": data.entity,
    }
    with telemetry.tracer().start_as_current_span(f"publish {data.topic}", kind=SpanKind.PRODUCER, attributes=attributes):
        yield


async def publish(producer: Producer, data: P, source: str, *, now: datetime, event_id: str | None = None) -> Event[P]:
    """Publish an event that begins a story; returns when the broker has it.

    Raises
    ------
    TransientError, PayloadTooLargeError
        As ``Producer.send`` does.
    """
    with publish_span(data):
        event = cloudevents.new_event(data, source, now=now, event_id=event_id)
        await producer.send([cloudevents.write(event)])
    return event
