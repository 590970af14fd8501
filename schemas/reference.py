"""The page ``docs/events.md``: topics, event types and the envelope, made from the same source as everything else."""

from collections.abc import Iterable, Iterator

from schemas import asyncapi, catalogue
from schemas.base import Payload
from schemas.topics import TOPICS, Topic, inference_requests, inference_results

_HEAD = """# Events

*Generated from `schemas/` by `make schemas`; do not edit.*

Everything that happens is said on Kafka as a [CloudEvent](https://cloudevents.io) 1.0. Commands ask for something, facts say what has
happened, snapshots hold the latest state of one thing. Any Kafka client can read all of it, and can ask for things by publishing commands.

The same as an AsyncAPI 3.0 document: [asyncapi.json](../schemas/asyncapi.json). Each event type has its JSON Schema in
[schemas/snapshots](../schemas/snapshots) and examples in [schemas/examples](../schemas/examples).
"""

_ENVELOPE = """## The envelope

Events are written in binary mode: attributes in headers, data as JSON in the value, the entity as the key. Structured mode is read as
well, whatever its content type. Unknown fields and headers are ignored.

| header | |
|---|---|
"""

_EXAMPLE = """
A command from the command line, and the facts that follow:

```sh
kcat -b 127.0.0.1:9092 -P -t millrace.commands -k churn \\
  -H content-type=application/json -H ce_specversion=1.0 -H ce_id=$(uuidgen) -H ce_source=/my/laptop \\
  -H ce_type=millrace.registry.endpoint.create.v1 <<< '{"endpoint_name": "churn"}'

kcat -b 127.0.0.1:9092 -C -t millrace.events -o -5 -e -f '%h\\n%k %s\\n\\n'
```

A fact as it stands in the log:

```
key      churn
headers  content-type: application/json
         ce_specversion: 1.0
         ce_id: 6e0d4a0c-6c1b-5a39-9b0e-0d8f5e9f6d3e
         ce_type: millrace.registry.endpoint.created.v1
         ce_source: /millrace/registry
         ce_time: 2026-11-20T18:21:23.311493Z
         ce_subject: churn
         ce_correlationid: 3f1c1a52-0d0e-4c5b-8a54-0d1f3f0b7c11
         ce_causationid: 3f1c1a52-0d0e-4c5b-8a54-0d1f3f0b7c11
         ce_causationsource: /my/laptop
         traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01
value    {"endpoint_name": "churn", "labels": {"team": "growth"}, "description": "Will the customer leave?"}
```
"""

_RULES = """## What a consumer may rely on

- Records of one entity are in order: they share a key. The control topics have one partition, so there the order is total.
- At least once: a record may come again, with the same `ce_id`. Recognise repeats by (`ce_source`, `ce_id`).
- The registry writes facts and snapshots in one Kafka transaction: read with `isolation.level=read_committed`.
- Within a major version (`.v1`) only optional fields are added. A change of meaning is a new type, published beside the old one.
- What cannot be handled is on `millrace.dlq` with its cause and the original record, byte for byte.
- On a compacted topic a record without a value means: this key is gone.
"""


def page() -> str:
    """The whole page as Markdown."""
    topics = [*TOPICS, inference_requests("<endpoint>"), inference_results("<endpoint>")]
    envelope = [f"| `{name}` | {_header(schema)} |" for name, schema in asyncapi.ENVELOPE.items()]
    parts = [_HEAD, "## Topics", "", *_topic_table(topics), "", _ENVELOPE + "\n".join(envelope), _EXAMPLE, _RULES, "## Event types", ""]
    return "\n".join([*parts, *_types(TOPICS)])


def _topic_table(topics: Iterable[Topic]) -> Iterator[str]:
    yield "| topic | key | partitions | kept | written by | read by |"
    yield "|---|---|---|---|---|---|"
    for topic in topics:
        kept = "latest of each key" if topic.retention_ms is None else asyncapi.retention(topic).removeprefix("kept for ")
        columns = (f"`{topic.name}`", topic.key, str(topic.partitions), kept, ", ".join(topic.producers), ", ".join(topic.consumers))
        yield f"| {' | '.join(columns)} |"


def _types(topics: Iterable[Topic]) -> Iterator[str]:
    for topic in topics:
        yield f"### `{topic.name}`"
        yield ""
        yield "| type | meaning |"
        yield "|---|---|"
        for payload in topic.payloads:
            yield f"| {_link(payload)} | {catalogue.meaning(payload)} |"
        yield ""


def _link(payload: type[Payload]) -> str:
    return f"[`{payload.event_type}`](../schemas/snapshots/{payload.event_type}.json)"


def _header(schema: dict[str, str]) -> str:
    return schema.get("description") or (f"`{schema['const']}`" if "const" in schema else "RFC 3339.")
