"""The AsyncAPI 3.0 document of everything that is said on the log, made from the topics table and the payload models.

References
----------
AsyncAPI Specification 3.0.0; Kafka bindings 0.5.0; CloudEvents 1.0.2, Kafka Protocol Binding.
"""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from schemas import catalogue
from schemas.base import Payload
from schemas.inference import InferenceResult
from schemas.topics import PAYLOADS, TOPICS, Topic, inference_requests, inference_results

TITLE = "Millrace"

_REQUESTS, _RESULTS = inference_requests("{endpoint}"), inference_results("{endpoint}")
_PARTIES = {"anyone": "any Kafka client", "every consumer": "every service that consumes"}

ENVELOPE: dict[str, dict[str, Any]] = {
    "content-type": {"type": "string", "description": "`application/json`, unless the event type says otherwise."},
    "ce_specversion": {"const": "1.0"},
    "ce_id": {"type": "string", "description": "Unique per source; the same for every repeat of an event."},
    "ce_type": {"type": "string", "description": "Event type; ends in the major version of its contract."},
    "ce_source": {"type": "string", "description": "Who says it, e.g. /millrace/registry."},
    "ce_time": {"type": "string", "format": "date-time"},
    "ce_subject": {"type": "string", "description": "The entity it is about; also the record's key."},
    "ce_correlationid": {"type": "string", "description": "Id of the event that began the story; its own id for that one."},
    "ce_causationid": {"type": "string", "description": "Id of the event that led to this one; absent at the beginning of a story."},
    "ce_causationsource": {"type": "string", "description": "Source of that event: an id is unique within its source only."},
    "traceparent": {"type": "string", "description": "W3C trace context."},
}
"""Headers of a record in binary mode."""


def document(version: str) -> dict[str, Any]:
    """The whole document; ``version`` is that of the platform."""
    topics = [*TOPICS, _REQUESTS, _RESULTS]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": TITLE,
            "version": version,
            "description": "CloudEvents 1.0 on Kafka, written in binary mode; structured mode is read too. Unknown fields are ignored.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"local": {"host": "127.0.0.1:9092", "protocol": "kafka", "description": "The broker that `millrace up` starts."}},
        "channels": {_channel_name(topic): _channel(topic) for topic in topics},
        "operations": dict(operation for topic in topics for operation in _operations(topic)),
        "components": {
            "messages": {**{name: _message(payload) for name, payload in PAYLOADS.items()}, **_inference_messages()},
            "messageTraits": {"cloudevent": _cloudevent()},
            "schemas": _schemas([*PAYLOADS.values(), InferenceResult]),
        },
    }


def _channel(topic: Topic) -> dict[str, Any]:
    channel: dict[str, Any] = {
        "address": topic.name,
        "description": f"Keyed by {topic.key}; {retention(topic)}.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _message_names(topic)},
        "bindings": {
            "kafka": {
                "topic": topic.name,
                "partitions": topic.partitions,
                "topicConfiguration": {"cleanup.policy": [topic.config["cleanup.policy"]], **_retention_config(topic)},
                "bindingVersion": "0.5.0",
            }
        },
    }
    if "{endpoint}" in topic.name:
        channel["parameters"] = {"endpoint": {"description": "Name of the endpoint."}}
    return channel


def retention(topic: Topic) -> str:
    """How long a topic keeps records, in words."""
    if topic.retention_ms is None:
        return "compacted: the latest record of each key is kept"
    return f"kept for {topic.retention_ms // 86_400_000} days"


def _retention_config(topic: Topic) -> dict[str, int]:
    return {} if topic.retention_ms is None else {"retention.ms": topic.retention_ms}


def _operations(topic: Topic) -> list[tuple[str, dict[str, Any]]]:
    channel = _channel_name(topic)
    operations = []
    for action, parties in (("send", topic.producers), ("receive", topic.consumers)):
        for party in parties:
            names = _said_by(party, topic) if action == "send" else _message_names(topic)
            operation = {
                "action": action,
                "channel": {"$ref": f"#/channels/{channel}"},
                "summary": f"{_PARTIES.get(party, party)} {action}s on {topic.name}.",
                "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names],
            }
            operations.append((f"{party.replace(' ', '-')}.{action}.{channel}", operation))
    return operations


def _said_by(party: str, topic: Topic) -> list[str]:
    """What one producer says on a topic: the types of its own domain where there are such, else all."""
    names = _message_names(topic)
    return [name for name in names if name.startswith(f"millrace.{party}.")] or names


def _message(payload: type[Payload]) -> dict[str, Any]:
    own_type = {} if payload.content_type == Payload.content_type else {"contentType": payload.content_type}
    return {
        "name": payload.event_type,
        "title": payload.__name__,
        "summary": catalogue.meaning(payload),
        **own_type,
        "traits": [{"$ref": "#/components/messageTraits/cloudevent"}],
        "payload": {"$ref": f"#/components/schemas/{payload.__name__}"},
        "examples": [{"name": name, "payload": data} for name, data in catalogue.examples(payload.event_type).items()],
    }


def _inference_messages() -> dict[str, Any]:
    return {
        "inference.request": {
            "name": "inference.request",
            "title": "InferenceRequest",
            "summary": "A V1 (`instances`) or V2 (`inputs`) request body, or a V2 request in protobuf or with binary tensors.",
            "payload": {"type": "object"},
            "examples": [{"name": "v1", "payload": {"instances": [[5.1, 3.5, 1.4, 0.2]]}}],
        },
        "inference.result": {
            "name": "inference.result",
            "title": "InferenceResult",
            "summary": catalogue.meaning(InferenceResult),
            "payload": {"$ref": "#/components/schemas/InferenceResult"},
        },
    }


def _cloudevent() -> dict[str, Any]:
    optional = {"ce_causationid", "ce_causationsource", "traceparent"}
    return {
        "contentType": "application/json",
        "headers": {"type": "object", "properties": ENVELOPE, "required": [name for name in ENVELOPE if name not in optional]},
        "correlationId": {"location": "$message.header#/ce_correlationid"},
        "bindings": {"kafka": {"key": {"type": "string", "description": "The entity."}, "bindingVersion": "0.5.0"}},
    }


def _schemas(models: list[type[BaseModel]]) -> dict[str, Any]:
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = _draft_07(definitions["$defs"])
    return dict(sorted(schemas.items()))


def _draft_07(schema: Any) -> Any:
    """The same schema in JSON Schema draft 7, which AsyncAPI builds on: fixed elements of arrays are ``items`` there."""
    if isinstance(schema, list):
        return [_draft_07(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {("items" if name == "prefixItems" else name): _draft_07(value) for name, value in schema.items()}


def _message_names(topic: Topic) -> list[str]:
    if topic in (_REQUESTS, _RESULTS):
        return ["inference.request" if topic == _REQUESTS else "inference.result"]
    return [payload.event_type for payload in topic.payloads]


def _channel_name(topic: Topic) -> str:
    return topic.name.removeprefix("millrace.").replace("{endpoint}.", "")
