"""Asynchronous predictions: what was asked, and how it ended. The operation is the entity; its first end is the one that counts."""

from typing import Self

from pydantic import AwareDatetime, Field, model_validator

from schemas.base import Contract, Name, Payload, Sha256


class Content(Contract):
    """Bytes in the record itself, or in the artifact store (a claim check): exactly one of the two."""

    base64: str | None = None
    sha256: Sha256 | None = None
    size_bytes: int = Field(ge=0)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.base64 is None) == (self.sha256 is None):
            raise ValueError("content is in the record or in the store, not both and not neither")
        return self


class OperationPayload(Payload):
    """What is said on the operations topic."""

    topic = "millrace.operations"
    operation_id: str

    @property
    def entity(self) -> str:
        return self.operation_id


class PredictionAccepted(OperationPayload):
    """A predict request that is carried out when there is time: the HTTP request, as it came."""

    event_type = "millrace.gateway.prediction.accepted.v1"
    endpoint_name: Name
    principal: str
    path: str = Field(description="Target of the request line, still percent-encoded, without its query.")
    query: str = ""
    headers: dict[str, str] = Field(default_factory=dict, description="Those that say how to read the body and what answer is wanted.")
    body: Content
    request_id: str = Field(default="", description="What the caller was told as `x-request-id`; an answer may need an id.")
    accepted_at: AwareDatetime
    expires_at: AwareDatetime = Field(description="When nobody wants the answer any more: the operation ends as `expired`.")
    webhook_url: str | None = None


class PredictionEnded(OperationPayload):
    """How an operation ended: the HTTP answer that a synchronous request would have got, or why there is none.

    A cancelled operation may have been carried out at the same time: of several ends the first in the log counts.
    """

    event_type = "millrace.gateway.prediction.ended.v1"
    endpoint_name: Name
    outcome: str = Field(pattern="^(completed|failed|expired|cancelled)$")
    status: int = Field(ge=100, le=599, description="HTTP status of the answer.")
    media_type: str
    headers: dict[str, str] = Field(default_factory=dict)
    body: Content
    expires_at: AwareDatetime | None = Field(default=None, description="Until when the operation can be asked for.")
    webhook_url: str | None = None


class WebhookEnded(OperationPayload):
    """The webhook of an operation took the news, or did not within all attempts."""

    event_type = "millrace.gateway.webhook.ended.v1"
    delivered: bool
    attempts: int = Field(ge=1)
    reason: str = ""
