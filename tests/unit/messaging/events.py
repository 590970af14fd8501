"""Events that the tests of messaging share."""

from datetime import UTC, datetime

from libs.messaging import cloudevents
from libs.messaging.cloudevents import Event
from libs.messaging.records import Record
from schemas.registry import CreateEndpoint

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def create_endpoint(name: str = "churn", event_id: str = "cause-1", **changes) -> Event[CreateEndpoint]:
    """A command as somebody outside would send it."""
    return Event(
        **{
            "id": event_id, "type": CreateEndpoint.event_type, "source": "/test", "time": NOW, "data": CreateEndpoint(endpoint_name=name),
            "correlation_id": event_id, **changes,
        }
    )  # fmt: skip


def binary(value: bytes = b'{"endpoint_name": "churn"}', **headers: str) -> Record:
    """A record in binary mode; ``headers`` replace or add attributes, an empty one is left out."""
    attributes = {"ce_specversion": "1.0", "ce_id": "1", "ce_type": CreateEndpoint.event_type, "ce_source": "/test", **headers}
    return Record("millrace.commands", b"churn", value, tuple((name, text.encode()) for name, text in attributes.items() if text))


def write(event: Event) -> Record:
    return cloudevents.write(event)
