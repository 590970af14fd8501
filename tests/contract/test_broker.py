"""What every implementation of the broker ports does."""

import asyncio
import contextlib
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from libs.errors import PayloadTooLargeError, TransientError
from libs.messaging.admin import create_topics, delete_topics
from libs.messaging.errors import FencedError
from libs.messaging.records import MAX_RECORD_BYTES, Record, TopicPartition
from schemas.topics import Topic


@contextlib.asynccontextmanager
async def started(*clients):
    try:
        for client in clients:
            await client.start()
        yield clients[0] if len(clients) == 1 else clients
    finally:
        for client in clients:
            await client.stop()


@contextlib.asynccontextmanager
async def aborted(producer):
    """A transaction that fails at its end."""
    with contextlib.suppress(LookupError):
        async with producer.transaction():
            yield
            raise LookupError


async def take(source, count: int) -> list[Record]:
    """The next ``count`` records, however many batches that takes."""
    taken: list[Record] = []
    async with asyncio.timeout(15):
        while len(taken) < count:
            taken += await source.get_many(count - len(taken), 0.5)
    return taken


async def read(log, topic: str, last_records: int | None = None, since: datetime | None = None) -> list[Record]:
    """Everything in a topic, by a reader that was told where the end is."""
    records: list[Record] = []
    async with started(log.broker.reader([topic], last_records, since)) as reader:
        ends = await reader.end_offsets()
        async with asyncio.timeout(15):
            while not await reader.is_at(ends):
                records += await reader.get_many(100, 0.2)
    return records


def numbered(topic: str, count: int, key: bytes = b"k") -> list[Record]:
    return [Record(topic, key, str(number).encode()) for number in range(count)]


def values(records) -> list[str]:
    return [record.value.decode() for record in records]


def unique(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:8]}"


async def test_a_record_comes_back_as_it_was_sent(log):
    (topic,) = await log.topics(1)
    sent = Record(topic, b"key", b"value", (("ce_id", b"1"), ("ce_id", b"2"), ("binary", b"\xff\x00")), timestamp_ms=1_767_225_600_123)
    async with started(log.broker.producer()) as producer:
        await producer.send([sent, Record(topic, b"gone", None), Record(topic, None, b"keyless")])
    first, second, third = await read(log, topic)
    assert (first.topic, first.key, first.value, first.headers, first.partition, first.offset, first.timestamp_ms) == (
        topic, b"key", b"value", sent.headers, 0, 0, 1_767_225_600_123,
    )  # fmt: skip
    assert (second.key, second.value, second.headers, second.offset) == (b"gone", None, (), 1)
    assert (third.key, third.value, third.offset) == (None, b"keyless", 2)


async def test_connecting_writes_nothing(log):
    (topic,) = await log.topics(1)
    async with started(log.broker.producer()) as producer:
        await producer.connect()
        await producer.send(numbered(topic, 1))
        await producer.connect()
    assert values(await read(log, topic)) == ["0"]


async def test_records_of_one_key_stay_in_order(log):
    (topic,) = await log.topics(1)
    async with started(log.broker.producer()) as producer:
        await producer.send(numbered(topic, 500))
        await producer.send(numbered(topic, 500))
    assert values(await read(log, topic)) == values(numbered(topic, 500)) * 2


async def test_what_is_not_committed_is_read_again_by_the_next_member(log):
    (topic,) = await log.topics(1)
    group = unique("group")
    async with started(log.broker.producer()) as producer:
        await producer.send(numbered(topic, 5))
    async with started(log.broker.consumer([topic], group)) as consumer:
        assert values(await take(consumer, 5)) == list("01234")
        await consumer.commit({TopicPartition(topic, 0): 2})
    async with started(log.broker.consumer([topic], group)) as consumer:
        assert values(await take(consumer, 3)) == list("234")
        await consumer.commit({TopicPartition(topic, 0): 5})
    async with started(log.broker.consumer([topic], group)) as consumer:
        assert await consumer.get_many(10, 0.3) == []


async def test_a_consumer_reads_several_topics_and_no_more_than_it_asks_for(log):
    one, two = await log.topics(2)
    async with started(log.broker.producer(), log.broker.consumer([one, two], unique("group"))) as (producer, consumer):
        await producer.send([*numbered(one, 3), *numbered(two, 3)])
        batch = await take(consumer, 1)
        assert len(batch) == 1
        rest = await take(consumer, 5)
        assert sorted(record.topic for record in [*batch, *rest]) == sorted([one] * 3 + [two] * 3)


async def test_groups_do_not_take_records_from_each_other(log):
    (topic,) = await log.topics(1)
    async with started(log.broker.producer()) as producer:
        await producer.send(numbered(topic, 3))
    for group in (unique("one"), unique("two")):
        async with started(log.broker.consumer([topic], group)) as consumer:
            assert values(await take(consumer, 3)) == list("012")
            await consumer.commit({TopicPartition(topic, 0): 3})


async def test_get_many_returns_empty_when_nothing_comes_in_time(log):
    (topic,) = await log.topics(1)
    async with started(log.broker.consumer([topic], unique("group"))) as consumer:
        assert await consumer.get_many(10, 0.1) == []


async def test_a_reader_can_begin_some_records_before_the_end(log):
    (topic,) = await log.topics(1)
    async with started(log.broker.producer()) as producer:
        await producer.send(numbered(topic, 10))
    assert values(await read(log, topic, last_records=3)) == list("789")
    assert values(await read(log, topic, last_records=30)) == list("0123456789")


async def test_a_reader_can_begin_at_a_time_and_leaves_nothing_out_from_then_on(log):
    (topic,), now = await log.topics(1), datetime.now(UTC).replace(microsecond=0)
    async with started(log.broker.producer()) as producer:
        for number in range(6):
            written_at = now - timedelta(seconds=60 - 10 * number)
            await producer.send([replace(record, timestamp_ms=int(written_at.timestamp() * 1000)) for record in numbered(topic, 1)])
    looks_times_up = log.settings is not None and not log.settings.embedded
    found = await read(log, topic, since=now - timedelta(seconds=35))
    assert len(found) == (3 if looks_times_up else 6)
    assert len(await read(log, topic, since=now)) == (0 if looks_times_up else 6)


async def test_a_reader_of_an_empty_topic_is_caught_up_at_once_and_sees_what_comes(log):
    (topic,) = await log.topics(1)
    async with started(log.broker.producer(), log.broker.reader([topic])) as (producer, reader):
        assert await reader.is_at(await reader.end_offsets())
        await producer.send(numbered(topic, 2))
        assert values(await take(reader, 2)) == list("01")


async def test_a_transaction_becomes_visible_at_once_when_it_ends(log):
    one, two = await log.topics(2)
    async with started(log.broker.transactional_producer(unique("id")), log.broker.reader([one, two])) as (producer, reader):
        async with producer.transaction():
            await producer.send(numbered(one, 2))
            await producer.send(numbered(two, 2))
            assert await reader.get_many(10, 0.3) == []
        assert sorted(values(await take(reader, 4))) == list("0011")


async def test_an_aborted_transaction_is_never_visible_and_the_reader_catches_up_beyond_it(log):
    (topic,) = await log.topics(1)
    async with started(log.broker.transactional_producer(unique("id"))) as producer:
        async with producer.transaction():
            await producer.send(numbered(topic, 1))
        async with aborted(producer):
            await producer.send(numbered(topic, 3))
        assert values(await read(log, topic)) == ["0"]
        async with producer.transaction():
            await producer.send(numbered(topic, 2))
    assert values(await read(log, topic)) == list("001")


async def test_a_reader_is_caught_up_when_a_partition_ends_with_a_transaction(log):
    (topic,) = await log.topics(1)
    async with started(log.broker.transactional_producer(unique("id"))) as producer, producer.transaction():
        await producer.send(numbered(topic, 3))
    assert values(await read(log, topic)) == list("012")


async def test_offsets_of_a_transaction_are_committed_with_it_or_not_at_all(log):
    source, target = await log.topics(2)
    group = unique("group")
    async with started(log.broker.producer()) as producer:
        await producer.send(numbered(source, 4))
    async with started(log.broker.transactional_producer(group)) as producer:
        async with producer.transaction():
            await producer.send(numbered(target, 1))
            await producer.send_offsets({TopicPartition(source, 0): 1}, group)
        async with aborted(producer):
            await producer.send(numbered(target, 1))
            await producer.send_offsets({TopicPartition(source, 0): 3}, group)
    async with started(log.broker.consumer([source], group)) as consumer:
        assert values(await take(consumer, 3)) == list("123")


async def test_a_second_producer_with_the_same_transactional_id_fences_the_first(log):
    (topic,) = await log.topics(1)
    transactional_id = unique("id")
    if log.settings and log.settings.embedded:
        pytest.skip("the embedded broker fences nobody")
    async with started(log.broker.transactional_producer(transactional_id)) as first:
        async with first.transaction():
            await first.send(numbered(topic, 1))
        async with started(log.broker.transactional_producer(transactional_id)) as second:
            with pytest.raises(FencedError):
                async with first.transaction():
                    await first.send(numbered(topic, 3))
            async with second.transaction():
                await second.send(numbered(topic, 2))
    assert values(await read(log, topic)) == list("001")


async def test_a_record_that_is_too_large_is_refused_and_nothing_is_written(log):
    (topic,) = await log.topics(1)
    largest = Record(topic, b"k", b"x" * (MAX_RECORD_BYTES - Record(topic, b"k", b"").size_bytes))
    async with started(log.broker.producer()) as producer:
        with pytest.raises(PayloadTooLargeError, match=topic):
            await producer.send([Record(topic, b"k", b"small"), Record(topic, b"k", largest.value + b"x")])
        with pytest.raises(PayloadTooLargeError):
            await producer.send([Record(topic, b"k", b"", (("big", b"x" * MAX_RECORD_BYTES),))])
        await producer.send([largest])
    assert [len(record.value) for record in await read(log, topic)] == [len(largest.value)]


async def test_a_client_that_is_not_started_says_so_as_a_transient_error(wire_log):
    (topic,) = await wire_log.topics(1)
    with pytest.raises(TransientError, match="not started"):
        await wire_log.broker.producer().send(numbered(topic, 1))
    with pytest.raises(TransientError, match="not started"):
        await wire_log.broker.consumer([topic], "group").get_many(1, 0.1)


async def test_stopping_what_never_started_is_harmless(log):
    for client in (
        log.broker.producer(),
        log.broker.consumer(["t"], "g"),
        log.broker.reader(["t"]),
        log.broker.transactional_producer("i"),
    ):
        await client.stop()


async def test_a_deleted_topic_is_gone_and_a_new_one_of_its_name_begins_anew(log):
    (name,) = await log.topics(1)
    group = f"g-{uuid.uuid4().hex[:8]}"
    topic = Topic(name, "any", (), (), ())
    await _consumed(log, name, group, numbered(name, 3))
    if log.settings is None:
        await log.broker.delete_topics([name])
    else:
        await delete_topics(log.settings, [topic, Topic(f"{name}-unknown", "any", (), (), ())])
        if log.settings.embedded:
            return  # it keeps its topics until it ends
        assert await _existing(log.settings, name) == set()
        await create_topics(log.settings, [topic])
    await _consumed(log, name, group, numbered(name, 2))


async def _consumed(log, topic: str, group: str, records: list[Record]) -> None:
    """Write records and find a group to be given exactly them."""
    async with started(log.broker.producer(), log.broker.consumer([topic], group)) as (producer, consumer):
        await producer.send(records)
        taken = await take(consumer, len(records))
        assert values(taken) == values(records)
        assert [record.offset for record in taken] == list(range(len(records)))
        await consumer.commit({TopicPartition(topic, 0): len(records)})


async def _existing(settings, *names: str) -> set[str]:
    client = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await client.start()
    try:
        return set(await client.list_topics()) & set(names)
    finally:
        await client.close()
