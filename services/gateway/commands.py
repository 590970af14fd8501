"""Sends a command to the log and waits until it was answered and the answer can be read back."""

import asyncio
import logging
from dataclasses import dataclass

from libs.errors import (
    ConflictError,
    InvalidArgumentError,
    InvalidMessage,
    MillraceError,
    NotFoundError,
    TransientError,
)
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.publishing import publish_span
from libs.messaging.records import Record
from schemas.base import Command, Payload
from schemas.registry import CommandRefused, RefusalKind
from services.gateway.catalog import Catalog, shows
from services.gateway.errors import DoubtfulWriteError
from services.gateway.journal import Journal, Operation, opened

log = logging.getLogger(__name__)

SOURCE = "/millrace/gateway"

_REFUSALS: dict[RefusalKind, type[MillraceError]] = {
    RefusalKind.INVALID: InvalidArgumentError,
    RefusalKind.NOT_FOUND: NotFoundError,
    RefusalKind.CONFLICT: ConflictError,
}


@dataclass(frozen=True)
class Outcome:
    """A command that is in the log, or may be; ``fact`` None: not answered, or not readable, in time."""

    command_id: str
    fact: Payload | None


class Commander:
    """Publishes commands; a component that owns the producer."""

    def __init__(self, broker: Broker, catalog: Catalog, journal: Journal, clock: Clock, broker_timeout_s: float) -> None:
        self._producer = broker.producer()
        self._catalog = catalog
        self._journal = journal
        self._clock = clock
        self._broker_timeout_s = broker_timeout_s

    async def start(self) -> None:
        await self._producer.start()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        await self._producer.stop()

    async def submit(self, command: Command, wait_s: float) -> Outcome:
        """Publish a command and wait up to ``wait_s`` for its answer, and until the state shows it.

        One that may have been written is not refused: it may be carried out, and whoever sent it again would have it done twice.

        Raises
        ------
        InvalidArgumentError, NotFoundError, ConflictError
            The registry refused it; the message is the registry's reason.
        InvalidMessage
            The registry could not handle it; it is in the dead-letter topic.
        TransientError
            The broker cannot be reached: the command was not written.
        PayloadTooLargeError
            It is larger than one record may be.
        """
        now_s = asyncio.get_running_loop().time
        begun_s = now_s()
        with publish_span(command):
            event = cloudevents.new_event(command, SOURCE, now=self._clock())
            self._journal.expect(event.id, event.type)
            try:
                await self.send(cloudevents.write(event))
                begun_s = now_s()
            except DoubtfulWriteError as error:
                log.warning("the command %s may have been written: %s", event.id, error)
        deadline_s = begun_s + wait_s
        operation = await self._journal.changes.until(lambda: self._decided(event.id), max(0.0, deadline_s - now_s()))
        if operation is None:
            return Outcome(event.id, None)
        fact = answer(operation)
        left_s = max(0.0, deadline_s - now_s())
        shown = await self._catalog.changes.until(lambda: shows(self._catalog, command, event.id, fact) or None, left_s)
        return Outcome(event.id, fact if shown else None)

    async def send(self, record: Record) -> None:
        """Send one record.

        Raises
        ------
        TransientError
            The broker cannot be reached in time; the record was not written.
        DoubtfulWriteError
            It was sent, and the broker did not say in time that it has it.
        PayloadTooLargeError
            It is larger than one record may be; it was not written.
        """
        is_sent = False
        try:
            async with asyncio.timeout(self._broker_timeout_s):
                await self._producer.connect()
                is_sent = True
                await self._producer.send([record])
        except TimeoutError as error:
            if is_sent:
                raise DoubtfulWriteError(
                    f"the broker did not take the record within {self._broker_timeout_s:g} s; it may still be carried out"
                ) from error
            raise TransientError(f"the broker could not be reached within {self._broker_timeout_s:g} s") from error
        except TransientError as error:
            if is_sent:
                raise DoubtfulWriteError(f"the broker may have the record: {error.message}") from error
            raise

    def _decided(self, command_id: str) -> Operation | None:
        operation = self._journal.operation(command_id)
        return operation if operation.is_done else None


def answer(operation: Operation) -> Payload:
    """The fact that answers a decided command; raises what a refusal or a dead letter means."""
    if operation.fact is None:
        cause = operation.letter.cause if operation.letter else "it was not decided"
        raise InvalidMessage(f"the command could not be handled: {cause}")
    fact = opened(operation.fact).data
    if isinstance(fact, CommandRefused):
        raise _REFUSALS[fact.kind](fact.reason)
    return fact
