"""What the management API shows: snapshots as JSON, without what only machines need."""

import base64
from collections.abc import Mapping
from typing import Any

from libs.messaging.cloudevents import Event
from schemas.dead_letter import DeadLetter
from schemas.registry import DeploymentSnapshot, ModelSnapshot, VersionSnapshot
from services.gateway.catalog import Catalog
from services.gateway.journal import Operation

View = dict[str, Any]


def model_view(catalog: Catalog, model: ModelSnapshot) -> View:
    """A model with the status of each of its versions."""
    versions = [{"version": version.version, "status": version.status.value} for version in catalog.versions_of(model.model_name)]
    return {**model.model_dump(mode="json"), "versions": versions}


def version_view(catalog: Catalog, version: VersionSnapshot, *, full: bool = False) -> View:
    """A version with the aliases that point at it; the text of the environment's lock only if ``full``."""
    model = catalog.models.get(version.model_name)
    aliases = sorted(alias for alias, number in model.aliases.items() if number == version.version) if model else []
    return {**_without_lock(version.model_dump(mode="json"), full), "aliases": aliases}


def deployment_view(catalog: Catalog, deployment: DeploymentSnapshot) -> View:
    """A deployment with its share of the endpoint's traffic."""
    endpoint = catalog.endpoints.get(deployment.endpoint_name)
    percent = endpoint.traffic.get(deployment.deployment_id, 0) if endpoint else 0
    return {**_without_lock(deployment.model_dump(mode="json"), full=False), "traffic_percent": percent}


def endpoint_view(catalog: Catalog, name: str) -> View:
    """An endpoint with its deployments, those that are being removed too."""
    deployments = [deployment_view(catalog, deployment) for deployment in catalog.deployments_of(name)]
    return {**catalog.endpoint(name).model_dump(mode="json"), "deployments": deployments}


def operation_view(operation: Operation) -> View:
    """What became of a command."""
    view: View = {"id": operation.command_id, "done": operation.is_done}
    if operation.letter is not None:
        view["error"] = f"the command could not be handled: {operation.letter.cause}"
    if operation.fact is not None:
        data = operation.fact.data()
        view["outcome"] = {"type": operation.fact.envelope.type, "data": data}
        if isinstance(data, Mapping) and "command_type" in data and "reason" in data:
            view["error"] = data["reason"]
    return view


def dead_letter_view(event: Event[DeadLetter], *, full: bool = False) -> View:
    """A dead letter; the record itself only if ``full``, its value also as text where it is text."""
    letter = event.data.model_dump(mode="json")
    record = {name: letter.pop(name) for name in ("key_base64", "value_base64", "headers_base64")}
    view: View = {"id": event.id, "time": event.time.isoformat().replace("+00:00", "Z"), **letter}
    if full:
        view |= record
        view["key"], view["value"] = _text(record["key_base64"]), _text(record["value_base64"])
        view["headers"] = [[name, _text(value)] for name, value in record["headers_base64"]]
    return view


def _without_lock(view: View, full: bool) -> View:
    if not full and view.get("environment") is not None:
        view["environment"].pop("lock")
    return view


def _text(encoded: str | None) -> str | None:
    if encoded is None:
        return None
    try:
        return base64.b64decode(encoded).decode()
    except UnicodeDecodeError:
        return None
