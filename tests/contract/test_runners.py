"""What every runner does with the records of a topic, on every broker."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest

from libs.errors import ConflictError, TransientError
from libs.messaging import cloudevents
from libs.messaging.consumer import ConsumerRunner, TransactionalRunner
from libs.messaging.faust_app import FaustRunner
from libs.messaging.loop import GRACE_S
from libs.messaging.processing import Processor
from libs.messaging.records import Record
from libs.messaging.retry import Retry
from schemas.registry import CreateEndpoint, EndpointCreated
from schemas.topics import DLQ, EVENTS
from tests.conftest import NOW, Log, open_log

SOON = Retry(first_s=0.01, longest_s=0.05)

CASES = [
    pytest.param((broker, runner), id=f"{runner}-{broker}", marks=[pytest.mark.integration] if broker == "kafka" else [])
    for broker in ("memory", "embedded", "kafka")
    for runner in ("consumer", "transactional", "faust")
    if (broker, runner) != ("memory", "faust")
]


@dataclass
class Case:
    """One kind of runner on one broker, with a topic of its own."""

    log: Log
    kind: str
    topic: str
    group: str = field(default_factory=lambda: f"group-{uuid.uuid4().hex[:8]}")

    def runner(self, handler, *, dead_letter_unknown=(), retry=SOON, grace_s=GRACE_S, **options):
        processor = Processor("tester", {CreateEndpoint: handler}, dead_letter_unknown=dead_letter_unknown, retry=retry, clock=lambda: NOW)
        match self.kind:
            case "consumer":
                return ConsumerRunner(self.log.broker, [self.topic], self.group, processor, grace_s=grace_s, **options)
            case "transactional":
                return TransactionalRunner(self.log.broker, [self.topic], self.group, processor, nothing, grace_s=grace_s)
            case _:
                return FaustRunner(self.log.settings, self.log.broker, [self.topic], self.group, processor, grace_s=grace_s, **options)

    async def send(self, *records: Record) -> None:
        producer = self.log.broker.producer()
        await producer.start()
        await producer.send(records)
        await producer.stop()

    async def send_commands(self, *names: str) -> None:
        await self.send(*[command(self.topic, name) for name in names])

    async def published(self, topic: str) -> list[cloudevents.Event]:
        """Events on a shared topic that this case's records led to.

        Read up to a record of our own: a transaction is visible only some time after it was committed, but before what was written later.
        """
        last = replace(command(self.topic, "last", uuid.uuid4().hex, correlation_id="last"), topic=topic)
        await self.send(last)
        reader = self.log.broker.reader([topic])
        await reader.start()
        records: list[Record] = []
        async with asyncio.timeout(20):
            while all(record.header("ce_id") != last.header("ce_id") for record in records):
                records += await reader.get_many(1000, 0.2)
        await reader.stop()
        events = [cloudevents.read(record) for record in records]
        return [event for event in events if self.topic in (event.correlation_id, getattr(event.data, "origin_topic", None))]


@pytest.fixture(params=CASES)
async def case(request) -> Case:
    broker, kind = request.param
    log = open_log(broker, request)
    (topic,) = await log.topics(1)
    return Case(log, kind, topic)


@pytest.fixture(params=[param for param in CASES if param.values[0][1] != "transactional"])
async def concurrent(request) -> Case:
    """Of the runners only those that can handle several records at once."""
    broker, kind = request.param
    log = open_log(broker, request)
    (topic,) = await log.topics(1)
    return Case(log, kind, topic)


async def nothing() -> None:
    return None


def command(topic: str, name: str, event_id: str | None = None, correlation_id: str | None = None) -> Record:
    event = cloudevents.Event(
        event_id or f"{topic}-{name}",
        CreateEndpoint.event_type,
        "/test",
        NOW,
        CreateEndpoint(endpoint_name=name),
        correlation_id or topic,
    )
    return cloudevents.write(event, topic)


@contextlib.asynccontextmanager
async def running(runner):
    """The runner at work; on leaving the block it has been stopped and its ``run`` has ended."""
    await runner.start()
    task = asyncio.create_task(runner.run())
    try:
        yield task
    finally:
        await runner.stop()
        await asyncio.wait({task}, timeout=5)
        assert task.done()
        task.exception()


class Handler:
    """Records what it is given; does what ``script`` says for a name.

    ``busy`` are the names it is at work on, ``most_busy`` is how many those were at most.
    """

    def __init__(self, script: dict[str, Callable[[], Awaitable[object]]] | None = None) -> None:
        self.names: list[str] = []
        self.busy: set[str] = set()
        self.most_busy = 0
        self._script = script or {}
        self._changed = asyncio.Condition()

    async def __call__(self, event):
        name = event.data.endpoint_name
        async with self._changed:
            self.names.append(name)
            self._changed.notify_all()
        self.busy.add(name)
        self.most_busy = max(self.most_busy, len(self.busy))
        try:
            if name in self._script:
                await self._script[name]()
        finally:
            self.busy.discard(name)
        return [EndpointCreated(endpoint_name=name)]

    async def has(self, name: str, times: int = 1) -> None:
        """Return once it was given a name so often."""
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: self.names.count(name) >= times)


def fails(error: Exception, times: int = 1_000_000):
    left = [times]

    async def act():
        if left[0]:
            left[0] -= 1
            raise error

    return act


async def test_records_are_handled_in_order_and_not_again_after_a_restart(case):
    handler = Handler()
    await case.send_commands("a", "b", "c")
    async with running(case.runner(handler)):
        await handler.has("c")
    await case.send_commands("d")
    async with running(case.runner(handler)):
        await handler.has("d")
    assert handler.names == ["a", "b", "c", "d"]
    assert [event.data.endpoint_name for event in await case.published(EVENTS.name)] == ["a", "b", "c", "d"]


async def test_a_record_whose_handler_crashes_ends_the_runner_and_is_handled_again(case):
    await case.send_commands("a", "b", "c")
    crashing = Handler({"b": fails(RuntimeError("a bug"))})
    async with running(case.runner(crashing)) as task:
        await asyncio.wait({task}, timeout=10)
        with pytest.raises(RuntimeError, match="a bug"):
            task.result()
    handler = Handler()
    async with running(case.runner(handler)):
        await handler.has("c")
    assert handler.names in (["b", "c"], ["a", "b", "c"])
    events = {event.id: event.data.endpoint_name for event in await case.published(EVENTS.name)}
    assert sorted(events.values()) == ["a", "b", "c"], "what a repeat leads to has the same ids again"


async def test_what_cannot_be_handled_is_dead_lettered_with_cause_and_origin_and_the_rest_goes_on(case):
    await case.send_commands("a", "b")
    handler = Handler({"a": fails(ConflictError("a is in the way"))})
    async with running(case.runner(handler)):
        await handler.has("b")
    (letter,) = await case.published(DLQ.name)
    assert (letter.data.cause, letter.data.error, letter.data.consumer) == ("a is in the way", "ConflictError", "tester")
    assert (letter.data.origin_topic, letter.data.origin_partition, letter.data.origin_offset) == (case.topic, 0, 0)
    assert letter.causation_id == f"{case.topic}-a"


async def test_a_transient_error_is_retried_until_it_is_gone_and_order_is_kept(case):
    await case.send_commands("a", "b")
    handler = Handler({"a": fails(TransientError("the store is away"), times=3)})
    async with running(case.runner(handler)):
        await handler.has("b")
    assert handler.names == ["a"] * 4 + ["b"]
    assert await case.published(DLQ.name) == []


async def test_a_repeated_event_is_handled_once(case):
    await case.send(command(case.topic, "a", "same"), command(case.topic, "a", "same"), command(case.topic, "b"))
    handler = Handler()
    async with running(case.runner(handler)):
        await handler.has("b")
    assert handler.names == ["a", "b"]


async def test_records_that_are_no_events_are_dead_lettered_and_others_are_handled(case):
    structured = {
        "specversion": "1.0", "id": "s1", "type": CreateEndpoint.event_type, "source": "/test", "data": {"endpoint_name": "structured"},
    }  # fmt: skip
    await case.send(
        Record(case.topic, None, b"\x80\x04garbage"),
        Record(case.topic, b"k", b""),
        Record(case.topic, b"k", b"[1, 2]"),
        Record(case.topic, b"k", None),
        Record(case.topic, b"k", b"{}", (("ce_specversion", b"1.0"), ("ce_id", b"\xff\xfe"), ("ce_type", b"t"), ("ce_source", b"s"))),
        Record(case.topic, b"k", json.dumps(structured).encode()),
        command(case.topic, "z"),
    )
    handler = Handler()
    async with running(case.runner(handler)):
        await handler.has("z")
    assert handler.names == ["structured", "z"]
    letters = await case.published(DLQ.name)
    assert sorted(letter.data.origin_offset for letter in letters) == [0, 1, 2, 4]


async def test_an_unknown_type_is_skipped_where_facts_are_and_dead_lettered_where_commands_are(case):
    unknown = Record(case.topic, b"k", b"{}", tuple((f"ce_{n}", v) for n, v in _attributes("millrace.registry.endpoint.create.v9").items()))
    await case.send(unknown, command(case.topic, "a"))
    handler = Handler()
    async with running(case.runner(handler)):
        await handler.has("a")
    assert await case.published(DLQ.name) == []
    await case.send(unknown, command(case.topic, "b"))
    async with running(case.runner(handler, dead_letter_unknown={case.topic})):
        await handler.has("b")
    (letter,) = await case.published(DLQ.name)
    assert "millrace.registry.endpoint.create.v1" in letter.data.cause


def _attributes(event_type: str) -> dict[str, bytes]:
    return {"specversion": b"1.0", "id": uuid.uuid4().hex.encode(), "type": event_type.encode(), "source": b"/test"}


async def test_a_stop_lets_the_current_record_finish_and_commits_it(case):
    await case.send_commands("a", "b")
    begun, release = asyncio.Event(), asyncio.Event()

    async def slow():
        begun.set()
        await release.wait()

    runner = case.runner(Handler({"a": slow}))
    await runner.start()
    task = asyncio.create_task(runner.run())
    async with asyncio.timeout(20):
        await begun.wait()
        stopping = asyncio.create_task(runner.stop())
        await asyncio.sleep(0)
        release.set()
        await stopping
        await task
    await case.send_commands("c")
    handler = Handler()
    async with running(case.runner(handler)):
        await handler.has("c")
    assert handler.names == (["c"] if case.kind == "transactional" else ["b", "c"]), "a transaction is finished as a whole"
    assert [event.data.endpoint_name for event in await case.published(EVENTS.name)] == ["a", "b", "c"]


async def test_a_stop_does_not_wait_for_an_error_to_pass(case):
    await case.send_commands("a")
    handler = Handler({"a": fails(TransientError("the store is away"))})
    async with running(case.runner(handler, retry=Retry(first_s=60, longest_s=60))) as task:
        await handler.has("a")
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 5
    assert task.exception() is None
    again = Handler()
    async with running(case.runner(again)):
        await again.has("a")


async def test_a_handler_that_does_not_end_is_cancelled_after_the_grace_and_its_record_handled_again(case):
    await case.send_commands("a")
    handler = Handler({"a": asyncio.Event().wait})
    async with running(case.runner(handler, grace_s=0.2)):
        await handler.has("a")
    again = Handler()
    async with running(case.runner(again)):
        await again.has("a")


async def test_a_runner_that_is_given_nothing_stops_at_once(case):
    async with asyncio.timeout(10), running(case.runner(Handler())) as task:
        pass
    assert task.exception() is None


async def test_a_record_that_takes_long_holds_up_only_those_of_its_key(concurrent):
    release = asyncio.Event()
    handler = Handler({"a": release.wait})
    topic = concurrent.topic
    await concurrent.send(command(topic, "a"), replace(command(topic, "a2"), key=b"a"), command(topic, "b"), command(topic, "c"))
    async with running(concurrent.runner(handler, concurrency=2)):
        await handler.has("c")
        assert handler.names == ["a", "b", "c"]
        release.set()
        await handler.has("a2")
    assert handler.names == ["a", "b", "c", "a2"]


async def test_no_more_records_than_agreed_are_handled_at_once(concurrent):
    release = asyncio.Event()
    handler = Handler(dict.fromkeys("abcd", release.wait))
    await concurrent.send_commands("a", "b", "c", "d", "e")
    async with running(concurrent.runner(handler, concurrency=3)):
        await handler.has("c")
        assert handler.names == ["a", "b", "c"]
        release.set()
        await handler.has("e")
    assert handler.most_busy == 3


async def test_by_default_the_next_record_waits_for_the_one_before_whatever_its_key(concurrent):
    handler = Handler(dict.fromkeys("abc", lambda: asyncio.sleep(0.01)))
    await concurrent.send_commands("a", "b", "c", "d")
    async with running(concurrent.runner(handler)):
        await handler.has("d")
    assert (handler.names, handler.most_busy) == (["a", "b", "c", "d"], 1)


async def test_a_crash_has_everything_handled_again_from_the_first_unfinished_record_on(concurrent):
    await concurrent.send_commands("a", "b")
    first = Handler()
    async with running(concurrent.runner(first, concurrency=2)):
        await first.has("b")
    await concurrent.send_commands("slow", "c", "d", "crash", "e")
    crashing = Handler({"slow": asyncio.Event().wait, "crash": fails(RuntimeError("a bug"))})
    async with running(concurrent.runner(crashing, concurrency=2)) as task:
        await asyncio.wait({task}, timeout=10)
        with pytest.raises(RuntimeError, match="a bug"):
            task.result()
    assert crashing.names == ["slow", "c", "d", "crash"]
    assert crashing.busy == set(), "what was being handled has been given back"
    handler = Handler()
    async with running(concurrent.runner(handler)):
        await handler.has("e")
    assert handler.names == ["slow", "c", "d", "crash", "e"]
    events = {event.id: event.data.endpoint_name for event in await concurrent.published(EVENTS.name)}
    assert sorted(events.values()) == ["a", "b", "c", "crash", "d", "e", "slow"], "what a repeat leads to has the same ids again"


async def test_a_stop_lets_all_records_that_are_being_handled_finish_and_begins_no_other(concurrent):
    release = asyncio.Event()
    handler = Handler(dict.fromkeys("ab", release.wait))
    await concurrent.send_commands("a", "b", "c")
    runner = concurrent.runner(handler, concurrency=2)
    await runner.start()
    task = asyncio.create_task(runner.run())
    async with asyncio.timeout(20):
        await handler.has("b")
        stopping = asyncio.create_task(runner.stop())
        await asyncio.sleep(0)
        release.set()
        await stopping
        await task
    assert handler.names == ["a", "b"]
    again = Handler()
    async with running(concurrent.runner(again)):
        await again.has("c")
    assert again.names == ["c"]


async def test_a_stop_gives_back_what_does_not_finish_and_what_came_after_it(concurrent):
    handler = Handler({"b": asyncio.Event().wait})
    await concurrent.send_commands("a", "b", "c")
    async with running(concurrent.runner(handler, concurrency=2, grace_s=0.2)):
        await handler.has("c")
    assert handler.busy == set()
    again = Handler()
    async with running(concurrent.runner(again)):
        await again.has("c")
    assert again.names == ["b", "c"]


async def test_a_record_that_waits_for_an_error_to_pass_holds_up_no_other_key_and_no_stop(concurrent):
    await concurrent.send_commands("a", "b", "c")
    handler = Handler({"a": fails(TransientError("the store is away"))})
    async with asyncio.timeout(20), running(concurrent.runner(handler, concurrency=2, retry=Retry(first_s=60, longest_s=60))) as task:
        await handler.has("c")
    assert task.exception() is None
    again = Handler()
    async with running(concurrent.runner(again)):
        await again.has("c")
    assert again.names == ["a", "b", "c"]
