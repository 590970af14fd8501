"""What only a real Kafka shows: it stops and comes back, members are killed, transactions leave control records."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from libs.errors import TransientError
from libs.messaging import cloudevents
from libs.messaging.admin import create_topics
from libs.messaging.consumer import ConsumerRunner
from libs.messaging.faust_app import FaustConsumer, FaustRunner
from libs.messaging.kafka import KafkaBroker
from libs.messaging.processing import Processor
from libs.messaging.records import Record, TopicPartition
from libs.messaging.retry import Retry
from libs.settings import KafkaSettings
from schemas.registry import CreateEndpoint
from schemas.topics import TOPICS, Topic
from tests.conftest import NOW, KafkaServer, free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


async def new_topic(settings: KafkaSettings, partitions: int = 1) -> str:
    name = f"topic-{uuid.uuid4().hex[:8]}"
    await create_topics(settings, [*TOPICS, Topic(name, "any", (), (), (), partitions)])
    return name


def command(topic: str, name: str) -> Record:
    return cloudevents.write(cloudevents.new_event(CreateEndpoint(endpoint_name=name), "/test", now=NOW), topic)


@contextlib.asynccontextmanager
async def started(*clients):
    try:
        for client in clients:
            await client.start()
        yield clients
    finally:
        for client in reversed(clients):
            await client.stop()


def runner(kind: str, settings: KafkaSettings, topic: str, group: str, handled: list[str]):
    async def handle(event):
        handled.append(event.data.endpoint_name)
        return []

    processor = Processor("tester", {CreateEndpoint: handle}, retry=Retry(longest_s=1))
    if kind == "faust":
        return FaustRunner(settings, KafkaBroker(settings), [topic], group, processor)
    return ConsumerRunner(KafkaBroker(settings), [topic], group, processor)


async def until(condition, timeout_s: float = 120) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_faust_sees_no_aborted_transaction_and_goes_on_after_control_records(kafka_server):
    settings = kafka_server.settings
    topic, group = await new_topic(settings), "group-" + uuid.uuid4().hex[:8]
    producer = KafkaBroker(settings).transactional_producer(topic)
    async with started(producer):
        for number in range(3):
            async with producer.transaction():
                await producer.send([Record(topic, b"k", f"kept-{number}".encode())])
            with contextlib.suppress(LookupError):
                async with producer.transaction():
                    await producer.send([Record(topic, b"k", b"aborted")])
                    raise LookupError
    values = []
    for _ in range(3):
        consumer = FaustConsumer(settings, [topic], group)
        async with started(consumer), asyncio.timeout(60):
            records = []
            while not records:
                records = await consumer.get_many(1, 1.0)
            values.append(records[0].value)
            await consumer.commit({TopicPartition(topic, 0): records[0].offset + 1})
    assert values == [b"kept-0", b"kept-1", b"kept-2"]


async def test_partitions_are_created_as_the_row_says_and_existing_topics_stay(kafka_server):
    settings = kafka_server.settings
    topic = await new_topic(settings, partitions=4)
    await create_topics(settings, [Topic(topic, "any", (), (), (), 4)])
    broker = KafkaBroker(settings)
    async with started(broker.reader([topic]), broker.producer()) as (reader, producer):
        await producer.send([Record(topic, str(number).encode(), b"x") for number in range(40)])
        ends = await reader.end_offsets()
    assert len(ends) == 4
    assert sum(ends.values()) == 40


async def test_clients_of_a_broker_that_is_not_there_raise_a_transient_error():
    broker = KafkaBroker(KafkaSettings(bootstrap_servers=f"127.0.0.1:{free_port()}", request_timeout_ms=1_000))
    for client in (broker.producer(), broker.consumer(["t"], "g"), broker.reader(["t"]), broker.transactional_producer("i")):
        with pytest.raises(TransientError, match=r"connecting|reading"):
            await client.start()
        await client.stop()


async def test_faust_without_a_broker_raises_a_transient_error_and_stops():
    consumer = FaustConsumer(KafkaSettings(bootstrap_servers=f"127.0.0.1:{free_port()}", request_timeout_ms=2_000), ["t"], "g")
    with pytest.raises(TransientError):
        await consumer.start()
    async with asyncio.timeout(30):
        await consumer.stop()


@pytest.mark.parametrize("kind", ["consumer", "faust"])
async def test_a_runner_goes_on_after_the_broker_was_away(kind, tmp_path):
    server = KafkaServer(tmp_path)
    try:
        await asyncio.to_thread(server.start)
        settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{server.port}", request_timeout_ms=5_000)
        topic, handled = await new_topic(settings), []
        subject = runner(kind, settings, topic, "group", handled)
        async with started(KafkaBroker(settings).producer()) as (producer,):
            await subject.start()
            task = asyncio.create_task(subject.run())
            await producer.send([command(topic, "before")])
            await until(lambda: "before" in handled)
            await asyncio.to_thread(server.stop)
            with pytest.raises(TransientError):
                await producer.send([command(topic, "lost")])
            await asyncio.to_thread(server.start)
            await producer.send([command(topic, "after")])
            waited = await until(lambda: "after" in handled or task.done())
            print(f"{kind}: handled {waited:.1f} s after the broker was back")
            if task.done():
                task.result()
            await subject.stop()
            await task
        assert [name for name in handled if name != "lost"] == ["before", "after"]
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("kind", ["consumer", "faust"])
async def test_stopping_while_the_broker_is_away_takes_a_bounded_time(kind, tmp_path):
    server = KafkaServer(tmp_path)
    try:
        await asyncio.to_thread(server.start)
        settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{server.port}", request_timeout_ms=5_000)
        topic, handled = await new_topic(settings), []
        subject = runner(kind, settings, topic, "group", handled)
        await subject.start()
        task = asyncio.create_task(subject.run())
        await asyncio.to_thread(server.stop)
        began = time.monotonic()
        await subject.stop()
        await asyncio.wait({task}, timeout=1)
        print(f"{kind}: stopped in {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < 30
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("kind", ["consumer", "faust"])
async def test_two_instances_share_the_partitions_and_nothing_is_lost_when_one_joins(kind, kafka_server):
    settings = kafka_server.settings
    topic, group = await new_topic(settings, partitions=4), "group-" + uuid.uuid4().hex[:8]
    both: tuple[list[str], list[str]] = ([], [])
    runners = [
        runner(kind, settings.model_copy(update={"group_instance": str(number)}), topic, group, handled)
        for number, handled in enumerate(both)
    ]
    names = [f"n{number}" for number in range(600)]
    async with started(KafkaBroker(settings).producer()) as (producer,):
        tasks = []
        for number, subject in enumerate(runners):
            await subject.start()
            tasks.append(asyncio.create_task(subject.run()))
            await producer.send([command(topic, name) for name in names[number * 300 : number * 300 + 300]])
        await until(lambda: set(both[0]) | set(both[1]) == set(names))
        await producer.send([command(topic, f"late{number}") for number in range(40)])
        await until(lambda: sum(name.startswith("late") for name in [*both[0], *both[1]]) >= 40)
        print(f"{kind}: {len(both[0])} and {len(both[1])} handled, {len(both[0]) + len(both[1]) - 640} of them again")
        assert any(name.startswith("late") for name in both[0])
        assert any(name.startswith("late") for name in both[1])
        for subject, task in zip(runners, tasks, strict=True):
            await subject.stop()
            await task


async def test_an_open_transaction_of_a_killed_instance_is_aborted_by_the_next_and_holds_up_no_reader(kafka_server):
    settings = kafka_server.settings
    topic, broker = await new_topic(settings), KafkaBroker(settings)
    killed, following = broker.transactional_producer(topic), broker.transactional_producer(topic)
    await killed.start()
    await killed._producer.begin_transaction()
    await killed.send([Record(topic, b"k", b"half done")])
    async with started(following, broker.reader([topic])) as (producer, reader):
        async with producer.transaction():
            await producer.send([Record(topic, b"k", b"done")])
        ends, records = await reader.end_offsets(), []
        while not await reader.is_at(ends):
            records += await reader.get_many(10, 0.5)
    await killed.stop()
    assert [record.value for record in records] == [b"done"]


CONSUMING = """
import asyncio, sys
from tests.integration.test_messaging_kafka import runner
from libs.settings import KafkaSettings

class Printed(list):
    def append(self, name):
        print(name, flush=True)

async def main(kind, servers, topic, group):
    subject = runner(kind, KafkaSettings(bootstrap_servers=servers, session_timeout_ms=60_000), topic, group, Printed())
    await subject.start()
    print("started", flush=True)
    await subject.run()

print("imported", flush=True)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["consumer", "faust"])
async def test_a_member_that_was_killed_consumes_again_as_soon_as_it_is_back(kind, kafka_server):
    settings = kafka_server.settings
    topic, group = await new_topic(settings), "group-" + uuid.uuid4().hex[:8]
    async with started(KafkaBroker(settings).producer()) as (producer,):
        for attempt in range(2):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CONSUMING, kind, settings.bootstrap_servers, topic, group, stdout=subprocess.PIPE
            )
            try:
                async with asyncio.timeout(90):
                    assert await process.stdout.readline() == b"imported\n"
                    began = time.monotonic()
                    assert await process.stdout.readline() == b"started\n"
                    joined_s = time.monotonic() - began
                    await producer.send([command(topic, f"n{attempt}")])
                    while (await process.stdout.readline()).decode().strip() != f"n{attempt}":
                        pass
                    print(f"{kind}: imported to assigned {joined_s:.1f} s, to the first record {time.monotonic() - began:.1f} s")
                    assert joined_s < 30, "shorter than the session timeout of 60 s that it would otherwise wait for"
            finally:
                os.kill(process.pid, signal.SIGKILL)
                await process.wait()
                process._transport.close()
