import asyncio

import pytest

from libs.messaging.memory import MemoryBroker
from libs.messaging.records import Record


@pytest.mark.parametrize("steps", range(8))
async def test_a_reader_that_is_cancelled_ends_also_when_a_record_comes_at_that_moment(steps):
    broker = MemoryBroker()
    reading = asyncio.create_task(broker.read({"t": 0}, 1, 60.0))
    await asyncio.sleep(0)
    await broker.append([Record("t", None, b"x")])
    for _ in range(steps):
        await asyncio.sleep(0)
    was_running = reading.cancel()
    await asyncio.wait({reading})
    assert reading.cancelled() is was_running
