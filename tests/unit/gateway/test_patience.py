"""Records that have to wait: nobody is held up by them, and none is lost."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from libs.errors import TransientError
from libs.messaging import cloudevents, consumer
from libs.messaging.memory import MemoryBroker
from libs.messaging.processing import Processor
from libs.messaging.records import Record
from libs.messaging.retry import Retry
from schemas.registry import CreateEndpoint, EndpointCreated
from schemas.topics import COMMANDS, DLQ, EVENTS
from services.gateway.patience import Job, LaterError, PatientRunner, Turns
from tests.unit.gateway.conftest import NOW

SOON = Retry(0.001, longest_s=0.002)


def taken(turns):
    """Lanes of the jobs that may begin now, in their order."""
    jobs = iter(turns.take, None)
    return [job.lane for job in jobs]


def waiting(*lanes, places):
    turns = Turns(places)
    for lane in lanes:
        turns.put(Job(Record("t", None, None), lane))
    return turns


def test_lanes_take_turns():
    assert taken(waiting(*"aaabbc", places=100)) == list("abcaba")


def test_no_lane_holds_more_places_than_are_free():
    turns = waiting(*"a" * 100, places=16)
    assert taken(turns) == ["a"] * 8
    for lane in "b" * 100:
        turns.put(Job(Record("t", None, None), lane))
    assert taken(turns) == ["b"] * 4
    turns.put(Job(Record("t", None, None), "c"))
    assert taken(turns) == ["c"]


def test_of_a_single_place_every_lane_gets_its_turn():
    turns, order = waiting(*"aab", places=1), []
    while (job := turns.take()) is not None:
        order.append(job.lane)
        assert turns.take() is None
        turns.give_back(job)
    assert order == list("aba")


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(consumer, "COMMIT_INTERVAL_S", 0.005)


class World:
    """A runner on a log in memory; commands to create the endpoints named are put off until they are let through."""

    def __init__(self, broker=None, *, places=2):
        self.broker = broker or MemoryBroker()
        self.tried = []
        self.let = set()
        self.places = places

    async def handle(self, event):
        name = event.data.endpoint_name
        self.tried.append(name)
        if name == "bug":
            raise ValueError
        if name.startswith("later") and name not in self.let:
            raise LaterError("not now", lambda: name in self.let)
        return [EndpointCreated(endpoint_name=name)]

    async def ask(self, *names):
        events = [cloudevents.new_event(CreateEndpoint(endpoint_name=name), "/test", now=NOW) for name in names]
        await self.broker.append([cloudevents.write(event) for event in events])

    @asynccontextmanager
    async def running(self):
        processor = Processor("tester", {CreateEndpoint: self.handle}, retry=SOON, clock=lambda: NOW)
        runner = PatientRunner(self.broker, COMMANDS.name, "g", processor, _lane, places=self.places, pauses=SOON)
        await runner.start()
        task = asyncio.create_task(runner.run())
        try:
            yield runner
        finally:
            await runner.stop()
            await asyncio.wait({task})
            self.error = task.exception()

    @property
    def created(self):
        return [cloudevents.read(record).data.endpoint_name for record in self.broker.records(EVENTS.name)]


def _lane(record):
    name = cloudevents.read(record).data.endpoint_name if record.value != b"{" else ""
    return None if name == "nothing" else name.partition("-")[0]


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the fake has no event for it
            await asyncio.sleep(0.001)


async def test_what_is_put_off_gives_its_place_back_and_is_not_tried_in_vain():
    world = World(places=1)
    async with world.running():
        await world.ask("later-1", "later-2", "later-3", "a")
        await until(lambda: world.created == ["a"])
        await asyncio.sleep(0.02)
        assert sorted(world.tried) == ["a", "later-1", "later-2", "later-3"]
        world.let.add("later-2")
        await until(lambda: world.created == ["a", "later-2"])


async def test_an_offset_is_committed_when_everything_before_it_is_done():
    world = World()
    async with world.running():
        await world.ask("a", "nothing", "later-1", "b", "later-2", "c")
        await until(lambda: sorted(world.created) == ["a", "b", "c"] and world.broker.committed("g", COMMANDS.name) == 2)
        world.let.add("later-1")
        await until(lambda: world.broker.committed("g", COMMANDS.name) == 4)
    again = World(world.broker)
    again.let.add("later-2")
    async with again.running():
        await until(lambda: "later-2" in again.created and world.broker.committed("g", COMMANDS.name) == 6)
    assert again.tried[:1] == ["later-2"]


async def test_a_record_that_is_read_again_while_it_waits_is_one():
    world = World()
    async with world.running() as runner:
        await world.ask("later-1")
        await until(lambda: world.tried)
        runner._consumer._positions[COMMANDS.name] = 0
        await world.ask("a")
        await until(lambda: world.created == ["a"])
        world.let.add("later-1")
        await until(lambda: world.broker.committed("g", COMMANDS.name) == 2)
    assert world.created == ["a", "later-1"]


async def test_a_commit_that_fails_is_made_up_for_by_the_next():
    world = World()
    async with world.running() as runner:
        commit, failures = runner._consumer.commit, [TransientError("away")]

        async def flaky(offsets):
            if failures:
                raise failures.pop()
            await commit(offsets)

        runner._consumer.commit = flaky
        await world.ask("a")
        await until(lambda: not failures)
        await world.ask("b")
        await until(lambda: world.broker.committed("g", COMMANDS.name) == 2)


async def test_what_cannot_be_read_is_dead_lettered():
    world = World()
    async with world.running():
        await world.ask("a")
        await world.broker.append([Record(COMMANDS.name, b"b", b"{")])
        await until(lambda: len(world.broker.records(DLQ.name)) == 1 and world.broker.committed("g", COMMANDS.name) == 2)


async def test_a_bug_ends_the_runner_and_its_record_stays():
    world = World()
    async with world.running():
        await world.ask("bug")
        await until(lambda: world.tried)
    assert isinstance(world.error, ValueError)
    assert world.broker.committed("g", COMMANDS.name) == 0
