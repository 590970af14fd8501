"""Topics of deleted endpoints: they stay for a while, in which the endpoint can be created again with what they hold, and then go.

What is to be deleted is folded from the registry's events, as a member of a group that commits up to the oldest deletion that is not done.
So a restart, or a broker that is away, puts a deletion off and never forgets it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from libs.errors import InvalidMessage, MillraceError, TransientError
from libs.messaging import cloudevents
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.consumer import POLL_S
from libs.messaging.loop import Loop
from libs.messaging.records import Record, TopicPartition
from libs.messaging.retry import Retry, keep_trying
from schemas.registry import EndpointCreated, EndpointDeleted
from schemas.topics import EVENTS, Topic, inference_requests, inference_results

log = logging.getLogger(__name__)

GROUP = "millrace-streaming-topics"

DeleteTopics = Callable[[Sequence[Topic]], Awaitable[None]]

_TYPES = frozenset({EndpointCreated.event_type.encode(), EndpointDeleted.event_type.encode()})


@dataclass(frozen=True)
class _Deletion:
    """Topics that go at ``due``; the event that says so."""

    due: datetime
    place: TopicPartition
    offset: int


class Retirement:
    """Deletes the inference topics of endpoints that are gone, as a component.

    Parameters
    ----------
    is_used
        Whether an endpoint's topics are needed: it exists, or its stream has not ended yet.
    kept_s
        How long topics stay after their endpoint's end, in seconds.
    """

    def __init__(
        self,
        broker: Broker,
        delete_topics: DeleteTopics,
        is_used: Callable[[str], bool],
        kept_s: float,
        clock: Clock = cloudevents.utc_now,
        retry: Retry | None = None,
    ) -> None:
        self._consumer = broker.consumer([EVENTS.name], GROUP)
        self._delete_topics = delete_topics
        self._is_used = is_used
        self._kept = timedelta(seconds=kept_s)
        self._clock = clock
        self._retry = retry or Retry()
        self._stopping = asyncio.Event()
        self._loop = Loop(GROUP, self._step, self._stopping)
        self._pending: dict[str, _Deletion] = {}
        self._read_to: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}

    async def start(self) -> None:
        await self._consumer.start()

    async def run(self) -> None:
        await self._loop.run()

    async def stop(self) -> None:
        await self._loop.stop()
        await self._consumer.stop()

    async def _step(self) -> None:
        records = await keep_trying(lambda: self._consumer.get_many(1_000, POLL_S), self._retry.for_broker, self._stopping)
        for record in records:
            self._fold(record)
        if not records:
            # Only with everything read: a later event may say that the topics stay.
            await self._delete([name for name, deletion in self._pending.items() if deletion.due <= self._clock()])
            await self._commit()

    def _fold(self, record: Record) -> None:
        self._read_to[record.place] = record.offset + 1
        if dict(record.headers).get("ce_type") not in _TYPES:
            return
        try:
            event = cloudevents.read(record)
        except InvalidMessage as error:
            log.error("passed over %s offset %d: %s", record.topic, record.offset, error)
            return
        self._pending.pop(event.data.entity, None)
        if isinstance(event.data, EndpointDeleted) and not event.data.keep_topics:
            self._pending[event.data.entity] = _Deletion(event.time + self._kept, record.place, record.offset)

    async def _delete(self, names: Collection[str]) -> None:
        for name in names:
            if self._is_used(name):
                continue  # created again, of which the event will tell, or about to end
            topics = (inference_requests(name), inference_results(name))
            try:
                await self._delete_topics(topics)
            except TransientError as error:
                log.warning("the topics of the deleted endpoint %s are still there: %s", name, error)
                return
            except MillraceError as error:
                log.error("the topics of the deleted endpoint %s stay: %s", name, error)
            else:
                log.info("deleted %s", ", ".join(topic.name for topic in topics))
            del self._pending[name]

    async def _commit(self) -> None:
        offsets = dict(self._read_to)
        for deletion in self._pending.values():
            offsets[deletion.place] = min(offsets[deletion.place], deletion.offset)
        if offsets == self._committed:
            return
        try:
            await self._consumer.commit(offsets)
        except TransientError as error:
            log.warning("what became of deleted endpoints' topics is not committed yet: %s", error)
        else:
            self._committed = offsets
