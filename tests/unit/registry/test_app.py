"""The registry as a whole, on the log in memory."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

from libs.messaging import cloudevents
from libs.messaging.memory import MemoryBroker
from libs.messaging.records import Record
from schemas.registry import (
    Artifact,
    CommandRefused,
    CreateEndpoint,
    DeleteEndpoint,
    RegisterVersion,
    SetAlias,
    VersionRegistered,
    VersionSpec,
)
from schemas.topics import COMMANDS, DLQ, EVENTS, STATE, STATE_ENDPOINTS, STATE_MODELS, STATE_VERSIONS
from services.registry.app import GROUP, build
from services.registry.handlers import HandledCommands
from services.registry.restore import restore
from services.registry.settings import Settings
from services.registry.state import State

NOW = datetime(2026, 1, 1, tzinfo=UTC)
REGISTER = RegisterVersion(model_name="iris", spec=VersionSpec(artifact=Artifact(sha256="a" * 64, size_bytes=1, filename="m.joblib")))


@asynccontextmanager
async def registry(broker: MemoryBroker):
    """A running registry; on leaving the block it has handled every command."""
    (runner,) = build(Settings(), broker=broker, clock=lambda: NOW)
    await runner.start()
    running = asyncio.create_task(runner.run())
    try:
        yield
        async with asyncio.timeout(5):
            while broker.committed(GROUP, COMMANDS.name) < len(broker.records(COMMANDS.name)):
                await asyncio.sleep(0.001)
                if running.done():
                    running.result()
    finally:
        await runner.stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def command(data, command_id: str, source: str = "/test") -> Record:
    return cloudevents.write(cloudevents.new_event(data, source, now=NOW, event_id=command_id))


async def said(broker: MemoryBroker) -> list:
    return [cloudevents.read(record) for record in broker.records(EVENTS.name)]


async def test_a_command_becomes_a_fact_caused_by_it_and_a_snapshot():
    broker = MemoryBroker()
    async with registry(broker):
        await broker.append([command(REGISTER, "c1")])
    (fact,) = await said(broker)
    assert isinstance(fact.data, VersionRegistered)
    assert (fact.causation_id, fact.correlation_id, fact.source) == ("c1", "c1", "/millrace/registry")
    (snapshot,) = [cloudevents.read(record) for record in broker.records(STATE_VERSIONS.name)]
    assert (snapshot.data.entity, snapshot.causation_id) == ("iris@1", "c1")


async def test_the_same_command_twice_acts_once_even_across_a_restart():
    broker = MemoryBroker()
    async with registry(broker):
        await broker.append([command(REGISTER, "c1"), command(REGISTER, "c1")])
    async with registry(broker):
        await broker.append([command(REGISTER, "c1")])
    assert len(await said(broker)) == 1


async def test_two_sources_may_use_the_same_id_and_both_are_answered_once():
    broker = MemoryBroker()
    one, other = (CreateEndpoint(endpoint_name="shop"), REGISTER)
    async with registry(broker):
        await broker.append([command(one, "1", "/one"), command(other, "1", "/other")])
    async with registry(broker):
        await broker.append([command(one, "1", "/one"), command(other, "1", "/other"), command(REGISTER, "1", "/third")])
    facts = await said(broker)
    assert [(type(fact.data).__name__, fact.causation_source) for fact in facts] == [
        ("EndpointCreated", "/one"),
        ("VersionRegistered", "/other"),
        ("VersionAlreadyRegistered", "/third"),
    ]


async def test_a_command_answered_by_an_older_registry_is_not_repeated():
    broker = MemoryBroker()
    async with registry(broker):
        await broker.append([command(REGISTER, "c1")])
    older = MemoryBroker()
    for topic in (*STATE, EVENTS):
        for record in broker.records(topic.name):
            headers = tuple(header for header in record.headers if header[0] != "ce_causationsource")
            await older.append([replace(record, headers=headers)])
    async with registry(older):
        await older.append([command(REGISTER, "c1")])
    assert len(await said(older)) == 1


async def test_a_refusal_is_a_fact_with_its_reason():
    broker = MemoryBroker()
    async with registry(broker):
        await broker.append([command(DeleteEndpoint(endpoint_name="nowhere"), "c1")])
    (event,) = await said(broker)
    assert event.data == CommandRefused(
        command_type=DeleteEndpoint.event_type, command_entity="nowhere", kind="not_found", reason="there is no endpoint 'nowhere'"
    )


async def test_a_command_whose_snapshot_no_record_can_hold_is_refused_and_changes_nothing():
    broker = MemoryBroker()
    async with registry(broker):
        await broker.append([command(REGISTER, "c1")])
    (model,) = [cloudevents.read(record).data for record in broker.records(STATE_MODELS.name)]
    crowded = model.model_copy(update={"aliases": {f"a{number:0127}": 1 for number in range(7_800)}})
    await broker.append([command(crowded, "by hand")])
    async with registry(broker):
        await broker.append([command(SetAlias(model_name="iris", alias="one-more", version=1), "c2")])
    *_, refusal = await said(broker)
    assert refusal.data.kind == "invalid"
    assert refusal.data.reason.startswith("'iris' would take 10")
    assert len(broker.records(STATE_MODELS.name)) == 2
    assert not broker.records(DLQ.name)


async def test_the_state_is_the_same_after_a_restart():
    broker = MemoryBroker()
    async with registry(broker):
        await broker.append(
            [
                command(REGISTER, "c1"),
                command(CreateEndpoint(endpoint_name="gone"), "c2"),
                command(DeleteEndpoint(endpoint_name="gone"), "c3"),
                command(CreateEndpoint(endpoint_name="stays"), "c4"),
                command(SetAlias(model_name="iris", alias="prod", version=1), "c5"),
            ]
        )
    state = State()
    await restore(broker, state, HandledCommands())
    assert (list(state.models), list(state.versions), list(state.endpoints)) == (["iris"], ["iris@1"], ["stays"])
    assert state.models["iris"].aliases == {"prod": 1}


async def test_what_a_stranger_wrote_to_the_state_topics_is_passed_over():
    broker = MemoryBroker()
    async with registry(broker):
        await broker.append([command(REGISTER, "c1")])
    (genuine,) = broker.records(STATE_VERSIONS.name)
    await broker.append(
        [
            Record(STATE_VERSIONS.name, b"iris@1", b"not json"),
            Record(STATE_VERSIONS.name, b"iris@1", b"{}", genuine.headers),
            Record(STATE_VERSIONS.name, b"iris@2", genuine.value, genuine.headers),
            Record(STATE_VERSIONS.name, None, genuine.value, genuine.headers),
            Record(STATE_VERSIONS.name, b"\xff", None),
            Record(STATE_ENDPOINTS.name, b"iris@1", genuine.value, genuine.headers),
        ]
    )
    async with registry(broker):
        await broker.append([command(CreateEndpoint(endpoint_name="flowers"), "c2")])
    state = State()
    await restore(broker, state, HandledCommands())
    assert (list(state.models), list(state.versions), list(state.endpoints)) == (["iris"], ["iris@1"], ["flowers"])


async def test_bad_commands_are_dead_letters_and_the_next_one_is_handled():
    broker = MemoryBroker()
    good = command(CreateEndpoint(endpoint_name="flowers"), "good")
    async with registry(broker):
        await broker.append(
            [
                Record(COMMANDS.name, b"k", b"not json"),
                Record(
                    COMMANDS.name, b"k", b"{}", (("ce_specversion", b"1.0"), ("ce_id", b"1"), ("ce_type", b"x.y.v1"), ("ce_source", b"/t"))
                ),
                Record(COMMANDS.name, good.key, b"{}", good.headers),
                Record(
                    COMMANDS.name,
                    good.key,
                    good.value,
                    tuple((n, v.replace(b".v1", b".v9") if n == "ce_type" else v) for n, v in good.headers),
                ),
                good,
            ]
        )
    causes = [cloudevents.read(record).data.cause for record in broker.records(DLQ.name)]
    assert causes == [
        "the record has no ce_ headers and its value is not JSON: invalid literal, expected 'null': line 1 column 1 (char 0)",
        "no contract has the event type 'x.y.v1'",
        "millrace.registry.endpoint.create.v1 does not fit its contract: endpoint_name: Field required",
        "millrace.registry.endpoint.create.v9 is not a known version of this event; known: millrace.registry.endpoint.create.v1",
    ]
    assert [type(event.data).__name__ for event in await said(broker)] == ["EndpointCreated"]


async def test_a_fact_on_the_command_topic_is_not_believed():
    broker = MemoryBroker()
    fake = cloudevents.write(
        cloudevents.new_event(VersionRegistered(model_name="iris", version=1, spec=REGISTER.spec), "/test", now=NOW), COMMANDS.name
    )
    async with registry(broker):
        await broker.append([fake])
    (letter,) = [cloudevents.read(record).data for record in broker.records(DLQ.name)]
    assert letter.cause.endswith("belongs on millrace.events, not on millrace.commands")
    assert not any(broker.records(topic.name) for topic in STATE)
