"""What passes between the predict doors and the data plane: what is asked, for which deployment, and what came of it.

Nobody changes these values. They are not frozen because making a frozen one takes four times as long, and each request makes six.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from libs.errors import MillraceError
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import Route
from schemas.inference import Signature
from services.gateway.exchange import Incoming, Outgoing

Parse = Callable[[Signature], InferRequest]


class Protocol(StrEnum):
    """The forms that requests come in; the label ``protocol`` of metrics and of the prediction log."""

    V1 = "v1"
    V2 = "v2"
    GRPC = "grpc"
    VERTEX = "vertex"
    INVOCATIONS = "invocations"


class Outcome(StrEnum):
    """How an accepted request ended; every one ends in exactly one of these."""

    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"


@dataclass(slots=True)
class Target:
    """Which deployment a request is for; neither a version nor an alias: whichever the traffic split says."""

    endpoint_name: str
    version: int | None = None
    alias: str | None = None


@dataclass(slots=True)
class Prediction:
    """An answer, the request as it was understood, and who answered."""

    route: Route
    request: InferRequest
    response: InferResponse


@dataclass(slots=True)
class Ask:
    """One predict request, read as far as its protocol goes: all that is left needs the model's signature.

    Attributes
    ----------
    parse
        The body as tensors, once the version, and so the signature, is chosen; raises ``InvalidInputError``.
    write
        The answer in the form that the request came in.
    timeout_ms
        Time the caller gives the request; None: the gateway's default.
    """

    target: Target
    protocol: Protocol
    parse: Parse
    write: Callable[[Prediction], Outgoing]
    timeout_ms: int | None = None


Done = Callable[[Outgoing | MillraceError], None]
"""Told once how an accepted request ended: the answer, or the error to answer with."""

Read = Callable[[Incoming], Ask]
"""A predict door: a pure function from a request to what it asks. Raises ``InvalidArgumentError``."""

Handler = Callable[[Incoming], Awaitable[Outgoing]]
"""Answers a route that predicts nothing."""


@dataclass(slots=True)
class Caller:
    """What is known of a request beside what it asks.

    Attributes
    ----------
    traceparent
        W3C trace context of the gateway's own span when the request is traced (sampled); else None.
    body_bytes
        Size of the request's body as it came.
    """

    request_id: str
    principal: str = "local"
    traceparent: str | None = None
    body_bytes: int = 0
