"""Asynchronous predictions (``Prefer: respond-async``): accepted onto the log, carried out when there is a replica, kept until they expire.

Nothing of it lives in one gateway only: what was asked and how it ended are records of the operations topic, which every gateway folds.
The gateways share the work as one consumer group, and telling webhooks as another; what a gateway had not ended when it died is carried
out by whoever reads its partitions next, so a request may run twice, and the first end in the log is the one that counts.

References
----------
RFC 7240, "Prefer Header for HTTP", section 4.1 (``respond-async``)
"""

import asyncio
import base64
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from opentelemetry import trace

from libs.artifacts import ArtifactStore
from libs.errors import DeadlineExceededError, InvalidArgumentError, InvalidMessage, MillraceError, NotFoundError
from libs.inference.routing import RoutingTable
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Clock, Event
from libs.messaging.records import Record
from libs.messaging.retry import Retry
from schemas.base import Payload
from schemas.operations import Content, PredictionAccepted, PredictionEnded, WebhookEnded
from services.gateway import routes
from services.gateway.commands import SOURCE, Commander
from services.gateway.dataplane import DataPlane
from services.gateway.error_bodies import error_answer
from services.gateway.errors import InternalError
from services.gateway.exchange import Headers, Incoming, Outgoing, json_answer
from services.gateway.operations import Operation, Operations
from services.gateway.patience import LaterError
from services.gateway.predictions import Ask, Caller, Handler, Read, Target
from services.gateway.refusals import Refused, nobody, reason_of
from services.gateway.tracing import traceparent_of
from services.gateway.webhooks import Webhooks, has_result, host_of

log = logging.getLogger(__name__)

INLINE_BYTES = 16 * 1024
"""A body up to this size travels in the record and is kept in memory; a larger one goes to the artifact store."""

PAUSES = Retry(first_s=0.5, longest_s=15.0)
"""How long an operation waits before it is tried again."""

_UNREADABLE = ""
"""In whose turn a record is handled that will be dead-lettered."""

_READ_WITHIN = timedelta(minutes=1)
"""How long an operation may be in the log before it is known here."""

WEBHOOK_HEADER = b"x-millrace-webhook"
EXPIRY_HEADER = b"x-millrace-expires-s"

_KEPT_HEADERS = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"content-encoding",
        b"content-type",
        b"inference-header-content-length",
        b"x-amzn-sagemaker-target-variant",
        b"x-request-timeout-ms",
    }
)
_KEPT_PREFIX = b"ce-"
"""Attributes of a CloudEvent in binary mode."""


def prefers_async(headers: Headers) -> bool:
    """Whether a request asks to be answered later."""
    prefer = headers.get(b"prefer")
    return prefer is not None and any(part.strip().lower() == b"respond-async" for part in prefer.replace(b";", b",").split(b","))


@dataclass(frozen=True, slots=True)
class AsyncLimits:
    """How long operations are kept, in seconds, and the largest body."""

    default_expiry_s: int = 86_400
    longest_expiry_s: int = 7 * 86_400
    max_bytes: int = 64 * 2**20


class AsyncPredictions:
    """Accepts requests, tells how they are doing, and carries them out."""

    def __init__(
        self,
        operations: Operations,
        commander: Commander,
        store: ArtifactStore,
        dataplane: DataPlane,
        routing: RoutingTable,
        reads: Mapping[tuple[str, str], Read],
        webhooks: Webhooks,
        clock: Clock,
        limits: AsyncLimits,
        refused: Refused = nobody,
    ) -> None:
        self._operations = operations
        self._commander = commander
        self._store = store
        self._dataplane = dataplane
        self._routing = routing
        self._reads = reads
        self._webhooks = webhooks
        self._clock = clock
        self._limits = limits
        self._refused = refused
        self._tries: Counter[str] = Counter()

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """The routes of an operation."""
        return {
            ("GET", "/api/v1/predictions/{operation_id}"): self.show,
            ("GET", "/api/v1/predictions/{operation_id}/result"): self.result,
            ("POST", "/api/v1/predictions/{operation_id}:cancel"): self.cancel,
        }

    async def accept(self, ask: Ask, path: bytes, incoming: Incoming) -> Outgoing:
        """Put a request onto the log; returns when the broker has it.

        Raises
        ------
        InvalidArgumentError, NotFoundError
            The request can never be answered: nothing was accepted.
        OverloadedError
            So many are kept that this one could not be until it expires.
        TransientError
            The broker does not take it.
        """
        try:
            return await self._accept(ask, path, incoming)
        except MillraceError as error:
            endpoint_name = "" if isinstance(error, NotFoundError) else ask.target.endpoint_name
            self._refused(endpoint_name, ask.protocol, reason_of(error))
            raise

    async def _accept(self, ask: Ask, path: bytes, incoming: Incoming) -> Outgoing:
        self._dataplane.check(ask)
        self._operations.check_room(incoming.principal)
        now = self._clock()
        expires_at = now + timedelta(seconds=self._expiry_s(incoming))
        webhook_url = self._webhooks.checked(incoming.header(WEBHOOK_HEADER))
        accepted = PredictionAccepted(
            operation_id=uuid.uuid4().hex,
            endpoint_name=ask.target.endpoint_name,
            principal=incoming.principal,
            path=path.decode("latin-1"),
            query=incoming.query.decode("latin-1"),
            headers=_kept(incoming.headers),
            body=await self._keep(bytes(incoming.body)),
            request_id=incoming.request_id,
            accepted_at=now,
            expires_at=expires_at,
            webhook_url=webhook_url,
        )
        event = cloudevents.new_event(accepted, SOURCE, now=now, event_id=accepted.operation_id)
        await self._commander.send(cloudevents.write(event))
        url = f"/api/v1/predictions/{accepted.operation_id}"
        body = {
            "operation_id": accepted.operation_id,
            "operation_url": url,
            "result_url": f"{url}/result",
            "status": "pending",
            "expires_at": accepted.expires_at.isoformat(),
        }
        headers = ((b"location", url.encode()), (b"preference-applied", b"respond-async"), (b"retry-after", b"1"))
        return json_answer(body, 202, headers)

    async def show(self, incoming: Incoming) -> Outgoing:
        """How an operation is doing."""
        operation = await self._find(incoming)
        ended = operation.ended
        shown: dict[str, object] = {
            "operation_id": operation.operation_id,
            "endpoint_name": operation.endpoint_name,
            "status": ended.outcome if ended else "pending",
            "done": ended is not None,
            "accepted_at": operation.accepted_at.isoformat(),
            "expires_at": operation.expires_at.isoformat(),
        }
        if ended is not None:
            shown |= {"ended_at": ended.at.isoformat(), "http_status": ended.status}
            shown["result_url"] = f"/api/v1/predictions/{operation.operation_id}/result"
        if operation.webhook_url is not None:
            shown["webhook"] = operation.webhook or "pending"
        return json_answer(shown)

    async def result(self, incoming: Incoming) -> Outgoing:
        """The answer that the request would have got if it had waited; 202 while there is none."""
        operation = await self._find(incoming)
        ended = operation.ended
        if ended is None:
            return json_answer({"operation_id": operation.operation_id, "status": "pending"}, 202, ((b"retry-after", b"1"),))
        body = await self._content(ended.base64, ended.sha256)
        headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in ended.headers.items())
        return Outgoing(body, ended.status, ended.media_type.encode("latin-1"), headers)

    async def cancel(self, incoming: Incoming) -> Outgoing:
        """End an operation that has not ended; what ended already stays as it is."""
        operation = await self._find(incoming)
        if operation.ended is None:
            gone = error_answer(_CancelledError("the operation was cancelled"), operation.path)
            ended = await self._ended(operation, "cancelled", gone)
            event = cloudevents.new_event(ended, SOURCE, now=self._clock())
            await self._commander.send(cloudevents.write(event))
            await self._operations.changes.until(lambda: operation.ended, 5.0)
        return await self.show(incoming)

    def endpoint_of(self, record: Record) -> str | None:
        """The endpoint that a record is a request to; None when it is none, or has ended."""
        if record.header("ce_type") not in (PredictionAccepted.event_type, None):
            return None
        try:
            data = cloudevents.read(record).data
        except InvalidMessage:
            return _UNREADABLE
        return data.endpoint_name if isinstance(data, PredictionAccepted) and not self._has_ended(data) else None

    async def carry_out(self, event: Event[PredictionAccepted]) -> Sequence[Payload]:
        """Handle an accepted request: how it ended, unless it is cancelled in the meantime.

        Raises
        ------
        LaterError
            It cannot be answered now.
        """
        accepted = event.data
        if self._has_ended(accepted):
            return []
        work = asyncio.create_task(self._end_of(accepted))
        cancelled = asyncio.create_task(self._until_ended(accepted.operation_id))
        try:
            await asyncio.wait({work, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            return [work.result()] if work.done() else []
        finally:
            work.cancel()
            cancelled.cancel()
            await asyncio.gather(work, cancelled, return_exceptions=True)

    def host_to_tell(self, record: Record) -> str | None:
        """The host that waits for the news of a record; None when nobody does."""
        if record.header("ce_type") != PredictionEnded.event_type:
            return None
        try:
            event = cloudevents.read(record)
        except InvalidMessage:
            return _UNREADABLE
        ended = event.data
        return host_of(ended.webhook_url or "") if isinstance(ended, PredictionEnded) and self._is_owed(event.id, ended) else None

    async def notify(self, event: Event[PredictionEnded]) -> Sequence[Payload]:
        """Handle an end: tell the webhook, if it waits for it.

        Raises
        ------
        LaterError
            It did not take the news, and is tried again.
        """
        if not self._is_owed(event.id, event.data):
            return []
        operation_id = event.data.operation_id
        reason = await self._tell(event.data)
        self._tries[operation_id] += 1
        if reason is not None and self._tries[operation_id] < self._webhooks.attempts:
            raise LaterError(reason)
        return [
            WebhookEnded(operation_id=operation_id, delivered=reason is None, attempts=self._tries.pop(operation_id), reason=reason or "")
        ]

    async def _tell(self, ended: PredictionEnded) -> str | None:
        """Tell a webhook once; why it did not take the news, if it did not."""
        try:
            body = await self._content(ended.body.base64, ended.body.sha256) if has_result(ended) else b""
            return await self._webhooks.post(ended, body)
        except MillraceError as error:
            if error.retryable:
                raise LaterError(error.message) from error
            return error.message
        except Exception:
            log.exception("a bug: the webhook of operation %s could not be told", ended.operation_id)
            return "something went wrong in the gateway"

    def _is_owed(self, event_id: str, ended: PredictionEnded) -> bool:
        """Whether a webhook waits for the news of an end: it has not got it, and the end is the one that counts."""
        if ended.webhook_url is None:
            return False
        operation = self._operations.find(ended.operation_id)
        if operation is None:
            return ended.expires_at is not None and not self._is_over(ended.expires_at)
        return operation.webhook is None and (operation.ended is None or operation.ended.event_id == event_id)

    async def _end_of(self, accepted: PredictionAccepted) -> PredictionEnded:
        """How a request ends that is tried now; whatever goes wrong is the end of it, never of the process."""
        target: Target | None = None
        try:
            if accepted.expires_at <= self._clock():
                late = DeadlineExceededError(f"endpoint {accepted.endpoint_name!r} did not answer before the operation expired")
                return await self._ended(accepted, "expired", error_answer(late, accepted.path))
            ask = self._ask(accepted, await self._content(accepted.body.base64, accepted.body.sha256))
            target = ask.target
            self._routing.check(target.endpoint_name, target.version, target.alias)
            return await self._ended(accepted, "completed", await self._dataplane.infer(ask, _caller(accepted)))
        except MillraceError as error:
            if error.retryable:
                raise LaterError(error.message, partial(self._is_due, accepted.operation_id, accepted.expires_at, target)) from error
            failure = error
        except Exception:
            log.exception("a bug: operation %s could not be carried out", accepted.operation_id)
            failure = InternalError("something went wrong in the gateway; its log tells more under this operation's id")
        return await self._ended(accepted, "failed", error_answer(failure, accepted.path))

    def _is_due(self, operation_id: str, expires_at: datetime, target: Target | None) -> bool:
        """Whether an operation that was put off shall be looked at again: it is over, or somebody may answer."""
        operation = self._operations.find(operation_id)
        if target is None or expires_at <= self._clock() or (operation is not None and operation.ended is not None):
            return True
        try:
            self._routing.check(target.endpoint_name, target.version, target.alias)
        except MillraceError as error:
            return not error.retryable
        return True

    def _ask(self, accepted: PredictionAccepted, body: bytes) -> Ask:
        found = routes.find("POST", accepted.path)
        if found.route is None or found.error is not None or (found.route.method, found.route.template) not in self._reads:
            raise NotFoundError(f"there is no predict route at {accepted.path[:200]}")
        headers = {name.encode("latin-1"): value.encode("latin-1") for name, value in accepted.headers.items()}
        incoming = Incoming(found.parameters, headers, body, accepted.query.encode("latin-1"), _request_id(accepted), accepted.principal)
        return self._reads[found.route.method, found.route.template](incoming)

    async def _ended(self, operation: PredictionAccepted | Operation, outcome: str, answer: Outgoing) -> PredictionEnded:
        return PredictionEnded(
            operation_id=operation.operation_id,
            endpoint_name=operation.endpoint_name,
            outcome=outcome,
            status=answer.status,
            media_type=answer.media_type.decode("latin-1"),
            headers={name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers},
            body=await self._keep(bytes(answer.body)),
            expires_at=operation.expires_at,
            webhook_url=operation.webhook_url,
        )

    async def _until_ended(self, operation_id: str) -> None:
        while (operation := self._operations.find(operation_id)) is None or operation.ended is None:
            await self._operations.changes.next(60.0)

    def _has_ended(self, accepted: PredictionAccepted) -> bool:
        operation = self._operations.find(accepted.operation_id)
        return self._is_over(accepted.expires_at) if operation is None else operation.ended is not None

    def _is_over(self, expires_at: datetime) -> bool:
        """Whether an operation that is not known is over, and not just unread."""
        return expires_at <= self._clock() - _READ_WITHIN

    async def _find(self, incoming: Incoming) -> Operation:
        """The operation that a route names, once this gateway has read of it; another principal's does not exist."""
        operation_id = incoming.parameters["operation_id"]
        operation = await self._operations.changes.until(lambda: self._operations.get(operation_id), 1.0)
        if operation is None or operation.principal != incoming.principal:
            raise NotFoundError(f"there is no operation {operation_id!r}, or it has expired")
        return operation

    def _expiry_s(self, incoming: Incoming) -> int:
        value = incoming.header(EXPIRY_HEADER)
        if value is None:
            return self._limits.default_expiry_s
        if not (value.isascii() and value.isdigit() and len(value) <= 9 and 1 <= int(value) <= self._limits.longest_expiry_s):
            raise InvalidArgumentError(
                f"{EXPIRY_HEADER.decode()} must be a whole number of seconds from 1 to {self._limits.longest_expiry_s}, not {value[:40]!r}"
            )
        return int(value)

    async def _keep(self, body: bytes) -> Content:
        if len(body) <= INLINE_BYTES:
            return Content(base64=base64.b64encode(body).decode(), size_bytes=len(body))
        stored = await self._store.put(_once(body), max_bytes=max(len(body), self._limits.max_bytes))
        return Content(sha256=stored.sha256, size_bytes=len(body))

    async def _content(self, inline: str | None, sha256: str | None) -> bytes:
        if sha256 is None:
            return base64.b64decode(inline or "")
        return b"".join([block async for block in self._store.open(sha256)])


class _CancelledError(NotFoundError):
    """What the result of a cancelled operation is."""


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _kept(headers: Headers) -> dict[str, str]:
    """The headers of a request that its answer depends on."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in headers.items()
        if name in _KEPT_HEADERS or name.startswith(_KEPT_PREFIX)
    }


def _request_id(accepted: PredictionAccepted) -> str:
    return accepted.request_id or accepted.operation_id


def _caller(accepted: PredictionAccepted) -> Caller:
    """Who asks; what is traced goes on in the span that is current."""
    span = trace.get_current_span()
    traceparent = traceparent_of(span) if span.is_recording() else None
    return Caller(_request_id(accepted), accepted.principal, traceparent, accepted.body.size_bytes)
