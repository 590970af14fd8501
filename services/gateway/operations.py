"""What the log says of asynchronous predictions: a fold of the operations topic, the same in every gateway.

An operation is kept until it has expired and nothing is owed any more, neither its end nor the news of it to its webhook. So one that
is not known here, though the log has it, is over.
"""

import heapq
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from libs.errors import MillraceError, OverloadedError
from libs.messaging import cloudevents
from libs.messaging.cloudevents import Clock, Event
from libs.messaging.records import Record
from schemas.base import Payload
from schemas.operations import Content, PredictionAccepted, PredictionEnded, WebhookEnded
from services.gateway.changes import Changes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class End:
    """How an operation ended; the body of its answer is inline, in base64, or in the artifact store. ``event_id`` is that of its event."""

    event_id: str
    at: datetime
    outcome: str
    status: int
    media_type: str
    headers: Mapping[str, str]
    base64: str | None
    sha256: str | None


@dataclass(slots=True)
class Operation:
    """What must be known of one operation to show, answer and cancel it.

    Attributes
    ----------
    ended
        The end that counts: the first one in the log.
    webhook
        How telling its webhook ended; None: not yet, or it has none.
    size_bytes
        Memory for what was asked, or then for the answer, beside what all operations have.
    """

    operation_id: str
    endpoint_name: str
    principal: str
    path: str
    accepted_at: datetime
    expires_at: datetime
    webhook_url: str | None
    size_bytes: int
    ended: End | None = None
    webhook: str | None = None

    @property
    def is_settled(self) -> bool:
        """Whether nothing is owed any more."""
        return self.ended is not None and (self.webhook_url is None or self.webhook is not None)


@dataclass(slots=True)
class Kept:
    """How much is kept."""

    operations: int = 0
    size_bytes: int = 0


class Operations:
    """All operations that are not over.

    Parameters
    ----------
    most
        Operations that are kept; beyond it, or beyond ``most_bytes``, no more shall be accepted.
    most_bytes
        Memory for what was asked and not answered yet, which whoever carries it out has, and for the answers, which every gateway has.
    """

    def __init__(self, clock: Clock, most: int, most_bytes: int) -> None:
        self.changes = Changes()
        self._clock = clock
        self._most = most
        self._most_bytes = most_bytes
        self._operations: dict[str, Operation] = {}
        self._expiries: list[tuple[datetime, str]] = []
        self._kept = Kept()
        self._kept_by_principal: defaultdict[str, Kept] = defaultdict(Kept)

    def check_room(self, principal: str) -> None:
        """Raise ``OverloadedError`` when a principal's next operation could not be kept: there is no room, or half of it is theirs."""
        self._forget_expired()
        mine = self._kept_by_principal.get(principal, Kept())
        if self._kept.operations >= self._most or self._kept.size_bytes >= self._most_bytes:
            raise OverloadedError("as many operations are kept as can be; new ones are accepted again when some have expired")
        if 2 * mine.operations >= self._most or 2 * mine.size_bytes >= self._most_bytes:
            raise OverloadedError("as many operations are kept for you as for one caller can be; more are accepted when some have expired")

    def get(self, operation_id: str) -> Operation | None:
        """The operation of that id, if it has not expired."""
        operation = self._operations.get(operation_id)
        return operation if operation is not None and operation.expires_at > self._clock() else None

    def find(self, operation_id: str) -> Operation | None:
        """The operation of that id, if it is not over: it may have expired, and something still be owed."""
        return self._operations.get(operation_id)

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
            self._accept(data)
            return
        if not isinstance(data, PredictionEnded | WebhookEnded) or (operation := self._operations.get(data.operation_id)) is None:
            return
        if isinstance(data, WebhookEnded):
            operation.webhook = "delivered" if data.delivered else f"given up: {data.reason}"
        elif operation.ended is None:
            body = data.body
            operation.ended = End(event.id, event.time, data.outcome, data.status, data.media_type, data.headers, body.base64, body.sha256)
            size_bytes = _size(operation, data.headers, body)
            self._count(operation.principal, 0, size_bytes - operation.size_bytes)
            operation.size_bytes = size_bytes
        if operation.is_settled and operation.expires_at <= self._clock():
            self._forget(operation)

    def _accept(self, accepted: PredictionAccepted) -> None:
        if accepted.operation_id in self._operations:
            return
        operation = Operation(
            accepted.operation_id,
            accepted.endpoint_name,
            accepted.principal,
            accepted.path,
            accepted.accepted_at,
            accepted.expires_at,
            accepted.webhook_url,
            0,
        )
        operation.size_bytes = _size(operation, accepted.headers, accepted.body) + len(accepted.query)
        self._operations[accepted.operation_id] = operation
        self._count(operation.principal, 1, operation.size_bytes)
        heapq.heappush(self._expiries, (accepted.expires_at, accepted.operation_id))

    def _forget_expired(self) -> None:
        """Forget what has expired; what is owed something then is forgotten once it has got it."""
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            _, operation_id = heapq.heappop(self._expiries)
            operation = self._operations.get(operation_id)
            if operation is not None and operation.is_settled and operation.expires_at <= now:
                self._forget(operation)

    def _forget(self, operation: Operation) -> None:
        del self._operations[operation.operation_id]
        self._count(operation.principal, -1, -operation.size_bytes)

    def _count(self, principal: str, operations: int, size_bytes: int) -> None:
        for kept in (self._kept, self._kept_by_principal[principal]):
            kept.operations += operations
            kept.size_bytes += size_bytes
        if not self._kept_by_principal[principal].operations:
            del self._kept_by_principal[principal]


def _size(operation: Operation, headers: Mapping[str, str], body: Content) -> int:
    """Memory for what is of any length."""
    fixed = len(operation.path) + len(operation.webhook_url or "")
    return fixed + sum(len(name) + len(value) for name, value in headers.items()) + len(body.base64 or "")
