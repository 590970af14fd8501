"""The AsyncAPI document: its structure, and that it is complete."""

import json

import pytest
from jsonschema import Draft7Validator

from schemas import catalogue
from schemas.topics import PAYLOADS, TOPICS

REFERENCE = {"type": "object", "required": ["$ref"], "properties": {"$ref": {"type": "string", "pattern": "^#/"}}}
KEY = "^[A-Za-z0-9_.{}-]+$"

STRUCTURE = {
    "type": "object",
    "required": ["asyncapi", "info", "servers", "channels", "operations", "components"],
    "properties": {
        "asyncapi": {"const": "3.0.0"},
        "info": {"type": "object", "required": ["title", "version"]},
        "servers": {"type": "object", "additionalProperties": {"type": "object", "required": ["host", "protocol"]}},
        "channels": {
            "type": "object",
            "propertyNames": {"pattern": KEY},
            "additionalProperties": {
                "type": "object",
                "required": ["address", "messages"],
                "properties": {"messages": {"type": "object", "additionalProperties": REFERENCE}},
            },
        },
        "operations": {
            "type": "object",
            "propertyNames": {"pattern": KEY},
            "additionalProperties": {
                "type": "object",
                "required": ["action", "channel"],
                "properties": {
                    "action": {"enum": ["send", "receive"]},
                    "channel": REFERENCE,
                    "messages": {"type": "array", "minItems": 1, "items": REFERENCE},
                },
            },
        },
        "components": {
            "type": "object",
            "properties": {
                "messages": {
                    "type": "object",
                    "propertyNames": {"pattern": KEY},
                    "additionalProperties": {
                        "type": "object",
                        "required": ["name", "title", "summary", "payload"],
                        "properties": {"traits": {"type": "array", "items": REFERENCE}, "examples": {"type": "array"}},
                    },
                },
                "schemas": {"type": "object", "additionalProperties": {"type": "object"}},
            },
        },
    },
}
"""The part of the AsyncAPI 3.0 structure that the document uses."""


@pytest.fixture(scope="module")
def document() -> dict:
    return json.loads((catalogue.DIRECTORY / "asyncapi.json").read_text())


def references(node):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = node.values()
    if not isinstance(node, (str, int, float, bool, type(None))):
        for each in node:
            yield from references(each)


def resolved(document, reference: str):
    node = document
    for part in reference.removeprefix("#/").split("/"):
        node = node[part.replace("~1", "/").replace("~0", "~")]
    return node


def test_it_has_the_structure_of_asyncapi_3(document):
    Draft7Validator(STRUCTURE).validate(document)


def test_every_reference_leads_somewhere(document):
    for reference in references(document):
        assert resolved(document, reference) is not None


def test_operations_name_messages_of_their_own_channel(document):
    for operation in document["operations"].values():
        assert all(reference["$ref"].startswith(f"{operation['channel']['$ref']}/messages/") for reference in operation["messages"])


def test_it_lists_every_topic_with_its_types(document):
    listed = {channel["address"]: set(channel["messages"]) for channel in document["channels"].values()}
    for topic in TOPICS:
        assert listed.pop(topic.name) == {payload.event_type for payload in topic.payloads}
    assert set(listed) == {"millrace.inference.{endpoint}.requests", "millrace.inference.{endpoint}.results"}


def test_it_lists_every_type_with_schema_and_examples(document):
    messages = document["components"]["messages"]
    for event_type, payload in PAYLOADS.items():
        assert messages[event_type]["payload"]["$ref"] == f"#/components/schemas/{payload.__name__}"
        assert messages[event_type]["examples"]


def test_its_schemas_are_draft_7_and_its_examples_fit_them(document):
    for message in document["components"]["messages"].values():
        schema = {**document, **message["payload"]}
        Draft7Validator.check_schema(message["payload"])
        for example in message.get("examples", []):
            Draft7Validator(schema).validate(example["payload"])


def test_every_producer_and_consumer_of_the_table_has_an_operation(document):
    for topic in TOPICS:
        channel = topic.name.removeprefix("millrace.")
        for action, parties in (("send", topic.producers), ("receive", topic.consumers)):
            for party in parties:
                assert document["operations"][f"{party.replace(' ', '-')}.{action}.{channel}"]["action"] == action


def test_a_service_sends_only_the_types_of_its_domain(document):
    sent = {reference["$ref"].rpartition("/")[2] for reference in document["operations"]["builder.send.events"]["messages"]}
    assert sent == {name for name in PAYLOADS if name.startswith("millrace.builder.")}
