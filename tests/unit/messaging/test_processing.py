import asyncio
import logging

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from libs import telemetry
from libs.errors import InvalidMessage, TransientError
from libs.messaging import cloudevents
from libs.messaging.dead_letter import original
from libs.messaging.errors import StoppingError
from libs.messaging.memory import MemoryBroker
from libs.messaging.processing import Processor, Seen
from libs.messaging.publishing import publish
from libs.messaging.records import MAX_RECORD_BYTES, Record
from libs.messaging.retry import Retry
from libs.metrics import Metrics
from schemas.registry import CreateEndpoint, EndpointCreated, VersionRegistered
from schemas.topics import COMMANDS, DLQ, EVENTS
from tests.unit.messaging.events import NOW, TRACEPARENT, binary, create_endpoint, write

FAST = Retry(first_s=0.001, longest_s=0.001)


@pytest.fixture
def spans(monkeypatch):
    """Every span that ends."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    yield exporter.get_finished_spans
    provider.shutdown()


def processor(handler, **options) -> Processor:
    return Processor("registry", {CreateEndpoint: handler}, retry=FAST, clock=lambda: NOW, **options)


async def created(event):
    return [EndpointCreated(endpoint_name=event.data.endpoint_name)]


def letter(records: list[Record]):
    (record,) = records
    return cloudevents.read(record).data


async def test_payloads_become_events_caused_by_the_one_handled_and_records_pass_as_they_are():
    tombstone = cloudevents.tombstone("millrace.state.endpoints", "churn")

    async def handler(event):
        return [*await created(event), tombstone]

    event, passed = await processor(handler).process(write(create_endpoint(correlation_id="story")))
    fact = cloudevents.read(event)
    assert (fact.source, fact.causation_id, fact.correlation_id, fact.time) == ("/millrace/registry", "cause-1", "story", NOW)
    assert passed == tombstone


async def test_two_facts_of_one_type_about_one_entity_have_two_ids():
    async def handler(event):
        return [*await created(event), *await created(event)]

    first, second = await processor(handler).process(write(create_endpoint()))
    assert cloudevents.read(first).id != cloudevents.read(second).id


async def test_tombstones_are_skipped_where_facts_are():
    assert await processor(created).process(cloudevents.tombstone(EVENTS.name, "churn")) == []


async def test_a_command_without_a_value_is_dead_lettered():
    record = cloudevents.tombstone(COMMANDS.name, "churn")
    dead = await processor(created, dead_letter_unknown={COMMANDS.name}).process(record)
    assert (letter(dead).error, letter(dead).cause) == ("InvalidMessage", f"a record without a value means nothing on {COMMANDS.name}")
    assert (dead[0].topic, original(letter(dead))) == (DLQ.name, record)


async def test_a_repeat_leads_to_nothing_and_the_same_id_from_another_source_is_no_repeat():
    subject = processor(created)
    assert len(await subject.process(write(create_endpoint()))) == 1
    assert await subject.process(write(create_endpoint())) == []
    assert len(await subject.process(write(create_endpoint(source="/other")))) == 1


async def test_a_dead_lettered_event_is_handled_when_it_is_replayed():
    fails = [True]

    async def handler(event):
        if fails.pop():
            raise InvalidMessage("no")
        return await created(event)

    subject = processor(handler)
    assert letter(await subject.process(write(create_endpoint()))).cause == "no"
    fails.append(False)
    assert cloudevents.read((await subject.process(write(create_endpoint())))[0]).type == EndpointCreated.event_type


async def test_facts_of_a_type_without_handler_are_skipped_without_a_look_at_their_data():
    assert await processor(created).process(binary(b"not json", ce_type=VersionRegistered.event_type)) == []


async def test_commands_nobody_handles_are_dead_lettered():
    subject = processor(created, dead_letter_unknown={COMMANDS.name})
    assert "no contract has" in letter(await subject.process(binary(ce_type="x"))).cause


async def test_an_event_on_a_topic_where_it_does_not_belong_is_not_believed():
    fact = write(create_endpoint())
    moved = Record(EVENTS.name, fact.key, fact.value, fact.headers)
    assert letter(await processor(created).process(moved)).cause.endswith("belongs on millrace.commands, not on millrace.events")


async def test_a_bug_goes_up():
    async def handler(event):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        await processor(handler).process(write(create_endpoint()))


async def test_what_follows_but_is_too_large_dead_letters_the_cause():
    async def handler(event):
        return [Record("t", b"k", b"x" * MAX_RECORD_BYTES)]

    dead = letter(await processor(handler).process(write(create_endpoint())))
    assert dead.error == "PayloadTooLargeError"


async def test_a_stop_ends_the_retries_and_leaves_the_record_alone():
    async def handler(event):
        raise TransientError("away")

    subject = Processor("registry", {CreateEndpoint: handler}, retry=Retry(first_s=60))
    work = asyncio.create_task(subject.process(write(create_endpoint())))
    await asyncio.sleep(0)
    subject.stopping.set()
    with pytest.raises(StoppingError, match="away"):
        await work


async def test_every_handled_event_is_one_line_with_outcome_and_duration(caplog):
    with caplog.at_level(logging.INFO, "libs.messaging.processing"):
        await processor(created).process(write(create_endpoint()))
    (line,) = caplog.records
    assert line.getMessage() == "handled millrace.registry.endpoint.create.v1"
    assert line.fields["outcome"] == "ok"
    assert line.fields["duration_s"] >= 0


async def test_the_publishing_span_is_the_parent_of_the_processing_span_and_so_on(spans):
    broker = MemoryBroker()
    await publish(broker.producer(), CreateEndpoint(endpoint_name="churn"), "/test", now=NOW)
    (command,) = broker.records(COMMANDS.name)
    (fact,) = await processor(created).process(command)
    by_name = {span.name: span for span in spans()}
    asked, handled, said = (by_name[name] for name in ("publish millrace.commands", "process millrace.commands", "publish millrace.events"))
    assert (asked.kind, handled.kind, said.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.PRODUCER)
    assert asked.parent is None
    assert handled.parent.span_id == asked.context.span_id
    assert said.parent.span_id == handled.context.span_id
    assert {span.context.trace_id for span in spans()} == {asked.context.trace_id}
    assert cloudevents.read(fact).traceparent == f"00-{said.context.trace_id:032x}-{said.context.span_id:016x}-03"
    assert handled.attributes["messaging.destination.name"] == "millrace.commands"
    assert handled.attributes["messaging.message.id"] == cloudevents.read(command).id


async def test_a_dead_lettered_event_marks_its_span_as_failed_and_the_letter_joins_the_trace(spans):
    async def handler(event):
        raise InvalidMessage("no")

    (dead,) = await processor(handler).process(write(create_endpoint(traceparent=TRACEPARENT)))
    (span,) = spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "no")
    assert cloudevents.read(dead).traceparent == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"


async def test_without_telemetry_the_trace_context_of_the_cause_is_passed_on():
    assert not trace.get_current_span().get_span_context().is_valid
    (fact,) = await processor(created).process(write(create_endpoint(traceparent=TRACEPARENT)))
    assert cloudevents.read(fact).traceparent == TRACEPARENT
    (fact,) = await processor(created).process(write(create_endpoint(event_id="other")))
    assert cloudevents.read(fact).traceparent is None


def test_seen_remembers_the_newest():
    seen = Seen(capacity=2)
    first, second, third = (create_endpoint(event_id=str(number)) for number in range(3))
    for event in (first, second, third):
        seen.add(event)
    assert first not in seen
    assert second in seen
    assert third in seen


async def test_events_and_dead_letters_are_counted():
    async def handler(event):
        if event.id == "bad":
            raise InvalidMessage("no")
        return []

    metrics = Metrics()
    counting = processor(handler, metrics=metrics)
    for event_id in ("good", "bad", "better"):
        await counting.process(write(create_endpoint(event_id=event_id)))
    counted = {(sample.metric.name, *sample.labels): sample.value for sample in metrics.samples()}
    assert counted["millrace_events_handled_total", "registry", CreateEndpoint.event_type, "ok"] == 2
    assert counted["millrace_events_handled_total", "registry", CreateEndpoint.event_type, "dead_lettered"] == 1
    assert counted["millrace_dead_letters_total", "registry", COMMANDS.name] == 1
    assert counted["millrace_event_seconds", "registry", CreateEndpoint.event_type] > 0
