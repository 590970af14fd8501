"""A view of whole topics: read from the beginning until caught up, then kept up to date."""

import asyncio
from collections.abc import Callable, Sequence

from libs.messaging.broker import Broker
from libs.messaging.consumer import POLL_S
from libs.messaging.loop import Loop
from libs.messaging.records import Record
from libs.messaging.retry import Retry, keep_trying


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
        self._stopping = asyncio.Event()
        self._loop = Loop(f"follower of {', '.join(topics)}", self._step, self._stopping)

    async def start(self) -> None:
        await self._reader.start()
        ends = await self._reader.end_offsets()
        while not await self._reader.is_at(ends):
            await self._step()

    async def run(self) -> None:
        await self._loop.run()

    async def stop(self) -> None:
        await self._loop.stop()
        await self._reader.stop()

    async def _step(self) -> None:
        for record in await keep_trying(lambda: self._reader.get_many(1_000, POLL_S), Retry().for_broker, self._stopping):
            self._apply(record)
