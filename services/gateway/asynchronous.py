"""Asynchronous predictions (``Prefer: respond-async``): accepted onto the log, carried out when there is a replica, kept until they expire.

Nothing of it lives in one gateway only: what was asked and how it ended are records of the operations topic, which every gateway folds.
The gateways share the work as one consumer group; a request whose gateway died is carried out by another one, so it may run twice,
and the first end in the log is the one that counts.

References
----------
RFC 7240, "Prefer Header for HTTP", section 4.1 (``respond-async``)
"""

import asyncio
import base64
import heapq
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from libs.artifacts import ArtifactStore
from libs.errors import InvalidArgumentError, MillraceError, NotFoundError, OverloadedError
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Clock, Event
from libs.messaging.records import Record
from schemas.base import Payload
from schemas.operations import Content, PredictionAccepted, PredictionEnded, WebhookEnded
from services.gateway import routes
from services.gateway.changes import Changes
from services.gateway.commands import SOURCE, Commander
from services.gateway.dataplane import DataPlane
from services.gateway.error_bodies import error_answer
from services.gateway.exchange import Headers, Incoming, Outgoing, json_answer
from services.gateway.predictions import Ask, Caller, Handler, Read
from services.gateway.webhooks import Webhooks

log = logging.getLogger(__name__)

INLINE_BYTES = 16 * 1024
"""A body up to this size travels in the record and is kept in memory; a larger one goes to the artifact store."""

MOST_OPERATIONS = 100_000
MOST_KEPT_BYTES = 256 * 2**20
"""Operations that are kept until they expire, and memory for the answers of those that ended; beyond either no more are accepted."""

WEBHOOK_HEADER = b"x-millrace-webhook"
EXPIRY_HEADER = b"x-millrace-expires-s"

_KEPT_HEADERS = (
    b"accept",
    b"accept-encoding",
    b"content-encoding",
    b"content-type",
    b"inference-header-content-length",
    b"x-amzn-sagemaker-target-variant",
    b"x-request-timeout-ms",
)
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0


def prefers_async(headers: Headers) -> bool:
    """Whether a request asks to be answered later."""
    prefer = headers.get(b"prefer")
    return prefer is not None and any(part.strip().lower() == b"respond-async" for part in prefer.replace(b";", b",").split(b","))


@dataclass(slots=True)
class Operation:
    """What the log says of one operation; ``ended_id`` is the id of the end that counts."""

    accepted: PredictionAccepted
    ended: PredictionEnded | None = None
    ended_id: str | None = None
    ended_at: datetime | None = None
    webhook: WebhookEnded | None = None


class Operations:
    """All operations that have not expired: a fold of the operations topic."""

    def __init__(self, clock: Clock) -> None:
        self.changes = Changes()
        self._clock = clock
        self._operations: dict[str, Operation] = {}
        self._expiries: list[tuple[datetime, str]] = []
        self._kept_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether so much is kept that nothing more shall be accepted before something has expired."""
        self._forget_expired()
        return len(self._operations) >= MOST_OPERATIONS or self._kept_bytes >= MOST_KEPT_BYTES

    def apply(self, record: Record) -> None:
        """Fold one record in; one that cannot be read is logged and passed over."""
        if record.value is None:
            return
        try:
            event = cloudevents.read(record)
        except MillraceError as error:
            log.warning("passed over %s offset %d: %s", record.topic, record.offset, error)
            return
        self._put(event)
        self._forget_expired()
        self.changes.notify()

    def _put(self, event: Event[Payload]) -> None:
        data = event.data
        if isinstance(data, PredictionAccepted):
            if data.operation_id not in self._operations and data.expires_at > self._clock():
                self._operations[data.operation_id] = Operation(data.model_copy(update={"body": _FORGOTTEN}))
                heapq.heappush(self._expiries, (data.expires_at, data.operation_id))
        elif isinstance(data, PredictionEnded):
            operation = self._operations.get(data.operation_id)
            if operation is not None and operation.ended is None:
                operation.ended, operation.ended_id, operation.ended_at = data, event.id, event.time
                self._kept_bytes += _kept_bytes(operation)
        elif isinstance(data, WebhookEnded) and data.operation_id in self._operations:
            self._operations[data.operation_id].webhook = data

    def get(self, operation_id: str) -> Operation | None:
        """The operation of that id, if it has not expired."""
        operation = self._operations.get(operation_id)
        return operation if operation is not None and operation.accepted.expires_at > self._clock() else None

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            _, operation_id = heapq.heappop(self._expiries)
            self._kept_bytes -= _kept_bytes(self._operations.pop(operation_id))


def _kept_bytes(operation: Operation) -> int:
    return 0 if operation.ended is None else len(operation.ended.body.base64 or "")


_FORGOTTEN = Content(base64="", size_bytes=0)


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
        reads: Mapping[tuple[str, str], Read],
        webhooks: Webhooks,
        clock: Clock,
        limits: AsyncLimits,
    ) -> None:
        self._operations = operations
        self._commander = commander
        self._store = store
        self._dataplane = dataplane
        self._reads = reads
        self._webhooks = webhooks
        self._clock = clock
        self._limits = limits

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
        self._dataplane.check(ask)
        if self._operations.is_full:
            raise OverloadedError("as many operations are kept as can be; new ones are accepted again when some have expired")
        now = self._clock()
        expires_at = now + timedelta(seconds=self._expiry_s(incoming))
        webhook_url = self._webhooks.checked(incoming.header(WEBHOOK_HEADER))
        accepted = PredictionAccepted(
            operation_id=uuid.uuid4().hex,
            endpoint_name=ask.target.endpoint_name,
            principal=incoming.principal,
            path=path.decode("latin-1"),
            query=incoming.query.decode("latin-1"),
            headers={name.decode(): incoming.headers[name].decode("latin-1") for name in _KEPT_HEADERS if name in incoming.headers},
            body=await self._keep(bytes(incoming.body)),
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
            "operation_id": operation.accepted.operation_id,
            "endpoint_name": operation.accepted.endpoint_name,
            "status": ended.outcome if ended else "pending",
            "done": ended is not None,
            "accepted_at": operation.accepted.accepted_at.isoformat(),
            "expires_at": operation.accepted.expires_at.isoformat(),
        }
        if ended is not None and operation.ended_at is not None:
            shown |= {"ended_at": operation.ended_at.isoformat(), "http_status": ended.status}
            shown["result_url"] = f"/api/v1/predictions/{ended.operation_id}/result"
        if operation.accepted.webhook_url is not None:
            delivered = operation.webhook
            shown["webhook"] = "pending" if delivered is None else "delivered" if delivered.delivered else f"given up: {delivered.reason}"
        return json_answer(shown)

    async def result(self, incoming: Incoming) -> Outgoing:
        """The answer that the request would have got if it had waited; 202 while there is none."""
        operation = await self._find(incoming)
        ended = operation.ended
        if ended is None:
            return json_answer({"operation_id": operation.accepted.operation_id, "status": "pending"}, 202, ((b"retry-after", b"1"),))
        body = await self._content(ended.body)
        headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in ended.headers.items())
        return Outgoing(body, ended.status, ended.media_type.encode("latin-1"), headers)

    async def cancel(self, incoming: Incoming) -> Outgoing:
        """End an operation that has not ended; what ended already stays as it is."""
        operation = await self._find(incoming)
        if operation.ended is None:
            accepted = operation.accepted
            gone = error_answer(_CancelledError("the operation was cancelled"), accepted.path)
            ended = await self._ended(accepted, "cancelled", gone)
            event = cloudevents.new_event(ended, SOURCE, now=self._clock())
            await self._commander.send(cloudevents.write(event))
            await self._operations.changes.until(lambda: operation.ended, 5.0)
        return await self.show(incoming)

    async def carry_out(self, event: Event[PredictionAccepted]) -> Sequence[Payload]:
        """Handle an accepted request: ask until there is an answer, or it is cancelled, or it expires."""
        accepted = event.data
        if self._has_ended(accepted):
            return []
        body = await self._content(accepted.body)
        work = asyncio.create_task(self._answer(accepted, body))
        cancelled = asyncio.create_task(self._until_ended(accepted))
        try:
            await asyncio.wait({work, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            return [] if not work.done() else [await self._ended(accepted, *work.result())]
        finally:
            work.cancel()
            cancelled.cancel()
            await asyncio.gather(work, cancelled, return_exceptions=True)

    async def notify(self, event: Event[PredictionEnded]) -> Sequence[Payload]:
        """Handle an end: tell the webhook, if there is one and the end counts."""
        ended = event.data
        operation = self._operations.get(ended.operation_id)
        counts = operation is None or operation.ended_id in (None, event.id)
        if ended.webhook_url is None or not counts:
            return []
        attempts, reason = await self._webhooks.deliver(ended, await self._content(ended.body))
        return [WebhookEnded(operation_id=ended.operation_id, delivered=reason is None, attempts=attempts, reason=reason or "")]

    async def _answer(self, accepted: PredictionAccepted, body: bytes) -> tuple[str, Outgoing]:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                caller = Caller(accepted.operation_id, accepted.principal)
                return "completed", await self._dataplane.infer(self._ask(accepted, body), caller)
            except MillraceError as error:
                left_s = (accepted.expires_at - self._clock()).total_seconds()
                if left_s <= 0:
                    return "expired", error_answer(error, accepted.path)
                if not error.retryable:
                    return "failed", error_answer(error, accepted.path)
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _ask(self, accepted: PredictionAccepted, body: bytes) -> Ask:
        found = routes.find("POST", accepted.path)
        if found.route is None or found.error is not None or (found.route.method, found.route.template) not in self._reads:
            raise NotFoundError(f"there is no predict route at {accepted.path[:200]}")
        headers = {name.encode("latin-1"): value.encode("latin-1") for name, value in accepted.headers.items()}
        incoming = Incoming(found.parameters, headers, body, accepted.query.encode("latin-1"), accepted.operation_id, accepted.principal)
        return self._reads[found.route.method, found.route.template](incoming)

    async def _ended(self, accepted: PredictionAccepted, outcome: str, answer: Outgoing) -> PredictionEnded:
        return PredictionEnded(
            operation_id=accepted.operation_id,
            endpoint_name=accepted.endpoint_name,
            outcome=outcome,
            status=answer.status,
            media_type=answer.media_type.decode("latin-1"),
            headers={name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers},
            body=await self._keep(bytes(answer.body)),
            webhook_url=accepted.webhook_url,
        )

    async def _until_ended(self, accepted: PredictionAccepted) -> None:
        while not self._has_ended(accepted):
            await self._operations.changes.next(60.0)

    def _has_ended(self, accepted: PredictionAccepted) -> bool:
        operation = self._operations.get(accepted.operation_id)
        return operation is not None and operation.ended is not None

    async def _find(self, incoming: Incoming) -> Operation:
        """The operation that a route names, once this gateway has read of it; another principal's does not exist."""
        operation_id = incoming.parameters["operation_id"]
        operation = await self._operations.changes.until(lambda: self._operations.get(operation_id), 1.0)
        if operation is None or operation.accepted.principal != incoming.principal:
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

    async def _content(self, content: Content) -> bytes:
        if content.sha256 is None:
            return base64.b64decode(content.base64 or "")
        return b"".join([block async for block in self._store.open(content.sha256)])


class _CancelledError(NotFoundError):
    """What the result of a cancelled operation is."""


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
