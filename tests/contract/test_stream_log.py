"""What a stream may rely on, of the log in memory, of the embedded broker and of real Kafka."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from libs.messaging.admin import create_topics
from libs.messaging.broker import Broker
from libs.messaging.kafka import KafkaBroker
from libs.messaging.memory import MemoryBroker
from libs.messaging.records import Record
from libs.metrics import Metrics
from libs.settings import KafkaSettings
from schemas.topics import DLQ, inference_requests, inference_results
from services.streaming.adapters import KafkaStreamLog
from services.streaming.log import Chunk, Given, StreamLog
from services.streaming.memory import MemoryStreamLog

PATIENCE_S = 60.0


@dataclass
class Place:
    """An endpoint's topics on one broker, and streams of it."""

    broker: Broker
    endpoint_name: str
    make: Callable[[str], StreamLog]

    @property
    def results(self) -> str:
        return inference_results(self.endpoint_name).name

    async def ask(self, *values: int) -> None:
        producer = self.broker.producer()
        await producer.start()
        await producer.send(self._requests(values))
        await producer.stop()

    async def ask_in_transactions(self, *values: int) -> None:
        """Each in one of its own: behind the last record of a partition stands what only says that it was committed."""
        producer = self.broker.transactional_producer(f"asks-{self.endpoint_name}")
        await producer.start()
        for value in values:
            async with producer.transaction():
                await producer.send(self._requests([value]))
        await producer.stop()

    def _requests(self, values: Sequence[int]) -> list[Record]:
        topic = inference_requests(self.endpoint_name).name
        return [Record(topic, b"key-%d" % value, b"%d" % value, (("ce_id", b"%d" % value),)) for value in values]

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[StreamLog]:
        made = self.make(self.endpoint_name)
        try:
            await made.open()
            yield made
        finally:
            await made.close()

    async def take(self, stream: StreamLog, count: int) -> list[Chunk]:
        """Chunks with so many records together."""
        chunks: list[Chunk] = []
        async with asyncio.timeout(PATIENCE_S):
            while sum(len(chunk.records) for chunk in chunks) < count:
                chunk = await stream.take(100, 10**6, 0.2)
                chunks += [chunk] if chunk.records else []
        return chunks

    async def answer(self, stream: StreamLog, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            results = [Given(self.results, record.key, record.value, [("ce_id", b"r")]) for record in chunk.records]
            assert await stream.commit(chunk.assignment, results, chunk.offsets())

    async def answered(self, count: int) -> list[int]:
        """Results that ``read_committed`` readers see, once there are so many."""
        reader = self.broker.reader([self.results])
        await reader.start()
        values: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(values) < count:
                values += [int(record.value or b"") for record in await reader.get_many(1000, 0.2)]
        await reader.stop()
        return values


@pytest.fixture(params=["memory", "embedded", pytest.param("kafka", marks=pytest.mark.integration)])
async def place(request: pytest.FixtureRequest) -> Place:
    name = f"e{uuid.uuid4().hex[:8]}"
    if request.param == "memory":
        memory = MemoryBroker()
        return Place(memory, name, lambda endpoint: MemoryStreamLog(memory, endpoint))
    settings: KafkaSettings = request.getfixturevalue("embedded_broker" if request.param == "embedded" else "kafka_server").settings
    await create_topics(settings, [inference_requests(name), inference_results(name), DLQ])
    return Place(KafkaBroker(settings), name, lambda endpoint: KafkaStreamLog(settings, endpoint, 2**20, Metrics()))


async def test_what_was_asked_is_taken_in_order_within_each_partition(place):
    await place.ask(*range(50))
    async with place.stream() as stream:
        chunks = await place.take(stream, 50)
    records = [record for chunk in chunks for record in chunk.records]
    assert sorted(int(record.value) for record in records) == list(range(50))
    for partition in {record.partition for record in records}:
        offsets = [record.offset for record in records if record.partition == partition]
        assert offsets == sorted(offsets)
    assert dict(records[0].headers)["ce_id"] == records[0].value


async def test_results_and_dead_letters_with_any_headers_and_keys_are_written(place):
    some_headers = ([], [("ce_id", b"x")], [("empty", b"")], [("null", None)], [("same", b"1"), ("same", b"2")])
    some_keys = (None, b"", b"k" * 100_000)
    written = [Given(place.results, key, b"1", kind(headers)) for key in some_keys for headers in some_headers for kind in (list, tuple)]
    await place.ask(1)
    async with place.stream() as stream:
        (chunk,) = await place.take(stream, 1)
        assert await stream.commit(chunk.assignment, written, chunk.offsets())
    assert await place.answered(len(written)) == [1] * len(written)


async def test_no_more_is_taken_than_was_wanted(place):
    await place.ask(*range(20))
    async with place.stream() as stream:
        first = (await place.take(stream, 1))[0]
        await place.answer(stream, [first])
        rest = await place.take(stream, 20 - len(first.records))
        await place.answer(stream, rest)
        assert len((await stream.take(5, 10**6, 0.05)).records) == 0
    assert sorted(await place.answered(20)) == list(range(20))


async def test_what_was_committed_is_not_taken_again(place):
    await place.ask(*range(10))
    async with place.stream() as stream:
        await place.answer(stream, await place.take(stream, 10))
    await place.ask(10)
    async with place.stream() as stream:
        (chunk,) = await place.take(stream, 1)
        assert [int(record.value or b"") for record in chunk.records] == [10]
        await place.answer(stream, [chunk])
    assert sorted(await place.answered(11)) == list(range(11))


async def test_what_was_not_committed_is_taken_again(place):
    await place.ask(*range(10))
    async with place.stream() as stream:
        await place.take(stream, 10)
    async with place.stream() as stream:
        await place.answer(stream, await place.take(stream, 10))
    assert sorted(await place.answered(10)) == list(range(10))


async def test_nothing_is_taken_while_the_stream_only_stays(place):
    async with place.stream() as stream:
        await place.ask(*range(5))
        for _ in range(3):
            await stream.stay(0.05)
        await place.answer(stream, await place.take(stream, 5))
    assert sorted(await place.answered(5)) == list(range(5))


async def test_what_waits_is_counted(place):
    await place.ask(*range(10))
    async with place.stream() as stream:
        chunks = await place.take(stream, 10)
        assert sum((await stream.lags()).values()) == 10
        await place.answer(stream, chunks)
        assert sum((await stream.lags()).values()) == 0
        await stream.stay(0.01)
        await place.ask(10, 11)
        assert sum((await stream.lags()).values()) == 2


async def test_what_no_record_stands_for_does_not_wait(place):
    await place.ask_in_transactions(*range(5))
    async with place.stream() as stream:
        chunks = await place.take(stream, 5)
        assert sum((await stream.lags()).values()) >= 5
        await place.answer(stream, chunks)
        await nothing_waits(stream)
    async with place.stream() as stream:
        await nothing_waits(stream)


async def nothing_waits(stream: StreamLog) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while sum((await stream.lags()).values()) or not (await stream.lags()):
            assert not (await stream.take(100, 10**6, 0.2)).records


async def test_a_commit_for_an_assignment_that_is_over_writes_nothing(place):
    await place.ask(1)
    async with place.stream() as stream:
        (chunk,) = await place.take(stream, 1)
        assert not await stream.commit(chunk.assignment - 1, [Given(place.results, b"k", b"1", [])], chunk.offsets())
        await place.answer(stream, [chunk])
    assert await place.answered(1) == [1]


async def test_many_results_are_one_transaction(place):
    await place.ask(1)
    async with place.stream() as stream:
        (chunk,) = await place.take(stream, 1)
        results = [Given(place.results, b"%d" % number, b"%d" % number, []) for number in range(3000)]
        assert await stream.commit(chunk.assignment, results, chunk.offsets())
    assert sorted(await place.answered(3000)) == list(range(3000))
