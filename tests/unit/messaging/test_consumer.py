import asyncio

import pytest

from libs.errors import TransientError
from libs.messaging import consumer
from libs.messaging.consumer import ConsumerRunner, TransactionalRunner
from libs.messaging.errors import FencedError
from libs.messaging.memory import MemoryBroker
from libs.messaging.processing import Processor
from libs.messaging.retry import Retry
from schemas.registry import CreateEndpoint, EndpointCreated
from schemas.topics import COMMANDS, EVENTS
from tests.unit.messaging.events import NOW, create_endpoint, write

FAST = Retry(first_s=0.001, longest_s=0.001)


async def created(event):
    return [EndpointCreated(endpoint_name=event.data.endpoint_name)]


def processor() -> Processor:
    return Processor("tester", {CreateEndpoint: created}, retry=FAST, clock=lambda: NOW)


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the fake has no event for it
            await asyncio.sleep(0.001)


async def test_a_consumer_runner_waits_out_a_broker_that_is_away():
    broker = MemoryBroker()
    runner = ConsumerRunner(broker, [COMMANDS.name], "g", processor())
    await runner.start()
    running = asyncio.create_task(runner.run())
    await broker.append([write(create_endpoint("a", "1"))])
    await until(lambda: broker.committed("g", COMMANDS.name) == 1)
    broker.is_away = True
    await asyncio.sleep(0.01)
    broker.is_away = False
    await broker.append([write(create_endpoint("b", "2"))])
    await until(lambda: broker.committed("g", COMMANDS.name) == 2)
    assert len(broker.records(EVENTS.name)) == 2
    await runner.stop()
    await running


async def test_a_commit_that_fails_is_made_up_for_by_the_next():
    broker = MemoryBroker()
    runner = ConsumerRunner(broker, [COMMANDS.name], "g", processor())
    await runner.start()
    await broker.append([write(create_endpoint("a", "1"))])
    commit, failures = runner._consumer.commit, [TransientError("away")]

    async def flaky(offsets):
        if failures:
            raise failures.pop()
        await commit(offsets)

    runner._consumer.commit = flaky
    running = asyncio.create_task(runner.run())
    await until(lambda: not failures)
    await until(lambda: broker.committed("g", COMMANDS.name) == 1)
    await runner.stop()
    await running


async def test_nothing_more_is_read_while_too_much_waits_behind_a_slow_record(monkeypatch):
    monkeypatch.setattr(consumer, "_IN_HAND_RECORDS", 3)
    monkeypatch.setattr(consumer, "_BATCH_RECORDS", 1)
    broker, release, read = MemoryBroker(), asyncio.Event(), []

    async def slow(event):
        await release.wait()
        return []

    runner = ConsumerRunner(broker, [COMMANDS.name], "g", Processor("tester", {CreateEndpoint: slow}), concurrency=2)
    get_many = runner._consumer.get_many

    async def counted(max_records, timeout_s):
        records = await get_many(max_records, timeout_s)
        read.extend(records)
        return records

    runner._consumer.get_many = counted
    await broker.append([write(create_endpoint("a", str(number))) for number in range(6)])
    await runner.start()
    running = asyncio.create_task(runner.run())
    await until(lambda: len(read) == 3)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(read) == 3
    release.set()
    await until(lambda: broker.committed("g", COMMANDS.name) == 6)
    await runner.stop()
    await running


async def test_a_transactional_runner_restores_after_fencing_and_before_reading():
    broker, order = MemoryBroker(), []
    older = TransactionalRunner(broker, [COMMANDS.name], "g", processor(), lambda: asyncio.sleep(0))
    await older.start()

    async def restore() -> None:
        order.append("restored")

    await broker.append([write(create_endpoint())])
    newer = TransactionalRunner(broker, [COMMANDS.name], "g", processor(), restore)
    await newer.start()
    assert order == ["restored"]
    with pytest.raises(FencedError):
        await older.run()
    assert broker.records(EVENTS.name) == ()
    await older.stop()
    await newer.stop()


async def test_a_failed_transaction_ends_the_transactional_runner_with_nothing_written():
    broker = MemoryBroker()
    runner = TransactionalRunner(broker, [COMMANDS.name], "g", processor(), lambda: asyncio.sleep(0))
    await runner.start()
    await broker.append([write(create_endpoint())])

    async def fails(offsets, group):
        raise TransientError("away")

    runner._producer.send_offsets = fails
    with pytest.raises(TransientError, match="starting again from the log"):
        await runner.run()
    assert (broker.records(EVENTS.name), broker.committed("g", COMMANDS.name)) == ((), 0)


async def test_a_transactional_runner_that_is_started_while_the_broker_is_away_waits_for_it():
    broker, restored = MemoryBroker(), []

    async def restore() -> None:
        if not restored:
            restored.append("in vain")
            raise TransientError("away again")
        restored.append("whole")

    runner = TransactionalRunner(broker, [COMMANDS.name], "g", processor(), restore)
    broker.is_away = True
    starting = asyncio.create_task(runner.start())
    await asyncio.sleep(0.01)
    assert not starting.done()
    broker.is_away = False
    await starting
    running = asyncio.create_task(runner.run())
    await broker.append([write(create_endpoint())])
    await until(lambda: broker.committed("g", COMMANDS.name) == 1)
    assert restored == ["in vain", "whole"]
    await runner.stop()
    await running
