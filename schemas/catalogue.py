"""The contracts as documents: JSON Schemas and examples by event type, and what their docstrings say."""

import inspect
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from schemas.base import Payload
from schemas.topics import PAYLOADS

DIRECTORY = Path(__file__).parent
EXAMPLES = DIRECTORY / "examples"
SNAPSHOTS = DIRECTORY / "snapshots"


def json_schema(payload: type[Payload]) -> dict[str, Any]:
    """JSON Schema (2020-12) of what readers of an event type accept."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:{payload.event_type}", **payload.model_json_schema()}


def snapshots() -> dict[str, dict[str, Any]]:
    """The schema of every event type, by event type."""
    return {event_type: json_schema(payload) for event_type, payload in sorted(PAYLOADS.items())}


def stored_snapshots() -> dict[str, dict[str, Any]]:
    """The schemas as they were last generated, by event type; types that are gone are still among them."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(SNAPSHOTS.glob("*.json"))}


def examples(event_type: str) -> dict[str, Any]:
    """Example data of an event type by the name of its file: ``<event type>.json`` and any ``<event type>-<variant>.json``."""
    paths = [EXAMPLES / f"{event_type}.json", *sorted(EXAMPLES.glob(f"{event_type}-*.json"))]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def meaning(model: type[BaseModel]) -> str:
    """The first sentence of a model's docstring, on one line."""
    paragraph = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return paragraph.split(". ")[0].rstrip(".") + "."


def rendered(document: Any) -> str:
    """JSON as it is stored: indented, with a newline at the end."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
