"""Counts predict requests that are turned away before the data plane sees them: not authorised, too large, too slow, not readable."""

from collections.abc import Callable, Mapping

from libs.errors import MillraceError
from services.gateway.predictions import Protocol

Refused = Callable[[str, Protocol, str], None]
"""Is told of a refused request: the endpoint that it named, its protocol, and why."""

_REASONS = {
    400: "invalid",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    408: "too_slow",
    413: "too_large",
    415: "unsupported_media_type",
    429: "overloaded",
    503: "not_ready",
}


def nobody(_endpoint_name: str, _protocol: Protocol, _reason: str) -> None:
    """Told, and does nothing."""


def refuse(refused: Refused, template: str, parameters: Mapping[str, str], error: MillraceError) -> None:
    """Tell of a request to a predict route, by its template and the parameters of its path."""
    endpoint_name = parameters.get("model") or parameters.get("endpoint") or ""
    refused(endpoint_name, protocol_of(template), reason_of(error))


def reason_of(error: MillraceError) -> str:
    """Why a request was refused, in one of a few words."""
    return _REASONS.get(int(error.http_status), "failed")


def protocol_of(template: str) -> Protocol:
    """The protocol that a predict route belongs to.

    >>> protocol_of("/v1/models/{model}:predict").value, protocol_of("/endpoints/{endpoint}/invocations").value
    ('v1', 'invocations')
    """
    if template.startswith("/v1/projects/"):
        return Protocol.VERTEX
    if template.startswith("/v1/"):
        return Protocol.V1
    return Protocol.V2 if template.startswith("/v2/") else Protocol.INVOCATIONS
