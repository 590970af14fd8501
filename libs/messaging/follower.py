"""A view of whole topics: read from the beginning until caught up, then kept up to date."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from libs.errors import TransientError
from libs.messaging.broker import Broker
from libs.messaging.processing import Retry
from libs.messaging.records import Record

log = logging.getLogger(__name__)


class Follower:
    """Applies every committed record of some topics, in order within a topic, from the beginning on.

    ``start`` returns when everything that was there at the time has been applied; ``run`` goes on applying. After an error of the
    broker it goes on from where it was.

    Parameters
    ----------
    apply
        Called for each record, in the event loop; it must not block and decides itself about records it cannot read.
    last_records
        Begin so many records before the end of each partition instead of at the beginning.
    """

    def __init__(self, broker: Broker, topics: Sequence[str], apply: Callable[[Record], None], last_records: int | None = None) -> None:
        self._reader = broker.reader(topics, last_records)
        self._apply = apply
        self._stopping = False

    async def start(self) -> None:
        await self._reader.start()
        ends = await self._reader.end_offsets()
        while not await self._reader.is_at(ends):
            await self._step(0.1)

    async def run(self) -> None:
        attempt = 0
        while not self._stopping:
            try:
                await self._step(1.0)
                attempt = 0
            except TransientError as error:
                attempt += 1
                log.warning("following the log failed, trying again: %s", error)
                await asyncio.sleep(Retry().delay_s(attempt))

    async def stop(self) -> None:
        self._stopping = True
        await self._reader.stop()

    async def _step(self, timeout_s: float) -> None:
        for record in await self._reader.get_many(1_000, timeout_s):
            self._apply(record)
