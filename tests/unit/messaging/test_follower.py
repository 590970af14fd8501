import asyncio

from libs.messaging.follower import Follower
from libs.messaging.memory import MemoryBroker
from libs.messaging.records import Record


def records(*values: str) -> list[Record]:
    return [Record("t", b"k", value.encode()) for value in values]


class View:
    """What was applied."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self._changed = asyncio.Event()

    def apply(self, record: Record) -> None:
        self.values.append(record.value.decode())
        self._changed.set()

    async def has(self, value: str) -> None:
        async with asyncio.timeout(5):
            while value not in self.values:
                self._changed.clear()
                await self._changed.wait()


async def test_start_returns_when_what_was_there_has_been_applied():
    broker, view = MemoryBroker(), View()
    await broker.append(records(*map(str, range(2_500))))
    follower = Follower(broker, ["t", "empty"], view.apply)
    await follower.start()
    assert view.values == [str(number) for number in range(2_500)]
    await follower.stop()


async def test_it_can_begin_some_records_before_the_end():
    broker, view = MemoryBroker(), View()
    await broker.append(records("a", "b", "c"))
    follower = Follower(broker, ["t"], view.apply, last_records=2)
    await follower.start()
    assert view.values == ["b", "c"]


async def test_run_applies_what_comes_also_after_the_broker_was_away():
    broker, view = MemoryBroker(), View()
    follower = Follower(broker, ["t"], view.apply)
    await follower.start()
    running = asyncio.create_task(follower.run())
    await broker.append(records("a"))
    await view.has("a")
    broker.is_away = True
    await asyncio.sleep(0.01)
    broker.is_away = False
    await broker.append(records("b"))
    await view.has("b")
    await follower.stop()
    await running
    assert view.values == ["a", "b"]
