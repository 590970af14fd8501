"""Spans of calls, in the words of OpenTelemetry's conventions for remote procedure calls."""

from opentelemetry.semconv._incubating.attributes.rpc_attributes import RPC_METHOD, RPC_RESPONSE_STATUS_CODE, RPC_SYSTEM_NAME
from opentelemetry.semconv.attributes import client_attributes, error_attributes
from opentelemetry.trace import Span, StatusCode
from opentelemetry.trace import Status as SpanStatus

from libs.errors import MillraceError
from services.gateway.rpc.statuses import Status, status_of
from services.gateway.tracing import Tracing

_OURS = frozenset((Status.UNKNOWN, Status.DEADLINE_EXCEEDED, Status.UNIMPLEMENTED, Status.INTERNAL, Status.UNAVAILABLE, Status.DATA_LOSS))
"""Statuses that make a server's span an error; the others are the caller's doing."""


def start(tracing: Tracing, path: str, traceparent: bytes | None, peer: str, request_id: str) -> Span | None:
    """The span of a call; None when it is not traced."""
    if not tracing.wants(traceparent):
        return None
    method = path.removeprefix("/")
    attributes: dict[str, str | int] = {RPC_SYSTEM_NAME: "grpc", RPC_METHOD: method, "millrace.request_id": request_id}
    host, _, port = peer.rpartition(":")
    if port.isdigit():
        attributes |= {client_attributes.CLIENT_ADDRESS: host, client_attributes.CLIENT_PORT: int(port)}
    return tracing.begin(method, traceparent, attributes)


def end(span: Span, error: MillraceError | None) -> None:
    """End a span with how the call ended."""
    status = Status.OK if error is None else status_of(error)
    span.set_attribute(RPC_RESPONSE_STATUS_CODE, status.name)
    if error is not None and status in _OURS:
        span.set_attribute(error_attributes.ERROR_TYPE, status.name)
        span.set_status(SpanStatus(StatusCode.ERROR, error.message))
    span.end()
