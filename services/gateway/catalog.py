"""The state of the platform as the gateway knows it: a fold of the four state topics."""

import logging
from collections import OrderedDict

from libs.errors import MillraceError, NotFoundError
from libs.inference.routing import RoutingTable, UnknownEndpointError
from libs.messaging import cloudevents
from libs.messaging.records import Record
from schemas.base import Payload
from schemas.registry import (
    AliasSet,
    DeploymentRemovalRequested,
    DeploymentRequested,
    DeploymentSnapshot,
    DeploymentStatus,
    EndpointCreated,
    EndpointDeleted,
    EndpointSnapshot,
    ExampleSet,
    ModelSnapshot,
    PredictionLogChanged,
    RegisterVersion,
    TrafficChanged,
    VersionAlreadyRegistered,
    VersionArchived,
    VersionRegistered,
    VersionSnapshot,
    VersionStatus,
)
from services.gateway.changes import Changes

log = logging.getLogger(__name__)

_REMEMBERED_CAUSES = 10_000


class Catalog:
    """All models, versions, endpoints and deployments, by id, and the routes that follow from them."""

    def __init__(self) -> None:
        self.models: dict[str, ModelSnapshot] = {}
        self.versions: dict[str, VersionSnapshot] = {}
        self.endpoints: dict[str, EndpointSnapshot] = {}
        self.deployments: dict[str, DeploymentSnapshot] = {}
        self.routing = RoutingTable()
        self.changes = Changes()
        self._causes: OrderedDict[tuple[str, str], None] = OrderedDict()

    def apply(self, record: Record) -> None:
        """Fold one record of a state topic in; one that cannot be read is logged and passed over."""
        if record.value is None:
            self._remove(record.topic, (record.key or b"").decode("utf-8", "replace"))
        else:
            try:
                event = cloudevents.read(record)
            except MillraceError as error:
                log.warning("passed over %s offset %d: %s", record.topic, record.offset, error)
                return
            self._put(event.data)
            if event.causation_id is not None:
                self._causes[record.topic, event.causation_id] = None
                if len(self._causes) > _REMEMBERED_CAUSES:
                    self._causes.popitem(last=False)
        self.changes.notify()

    def has_seen(self, topic: str, cause_id: str) -> bool:
        """Whether a snapshot that the event ``cause_id`` led to has been folded in from a topic."""
        return (topic, cause_id) in self._causes

    def model(self, name: str) -> ModelSnapshot:
        """The model of that name; raises ``NotFoundError``."""
        if name not in self.models:
            raise NotFoundError(f"there is no model {name!r}")
        return self.models[name]

    def version(self, model_name: str, version: str) -> VersionSnapshot:
        """A version by number or alias; raises ``NotFoundError``."""
        model = self.model(model_name)
        number = int(version) if version.isdigit() else model.aliases.get(version)
        if number is None:
            raise NotFoundError(f"model {model_name!r} has no alias {version!r}")
        found = self.versions.get(f"{model_name}@{number}")
        if found is None:
            raise NotFoundError(f"model {model_name!r} has no version {number}; the newest is {model.latest_version}")
        return found

    def versions_of(self, model_name: str) -> list[VersionSnapshot]:
        """All versions of a model, oldest first; raises ``NotFoundError``."""
        latest = self.model(model_name).latest_version
        found = (self.versions.get(f"{model_name}@{number}") for number in range(1, latest + 1))
        return [version for version in found if version is not None]

    def endpoint(self, name: str) -> EndpointSnapshot:
        """The endpoint of that name; raises ``NotFoundError``."""
        if name not in self.endpoints:
            raise UnknownEndpointError(name)
        return self.endpoints[name]

    def deployments_of(self, endpoint_name: str) -> list[DeploymentSnapshot]:
        """Deployments of an endpoint, those that are being removed too, in the order of their creation."""
        found = [deployment for deployment in self.deployments.values() if deployment.endpoint_name == endpoint_name]
        return sorted(found, key=lambda deployment: deployment.created_at)

    def _put(self, snapshot: Payload) -> None:
        match snapshot:
            case ModelSnapshot():
                self.models[snapshot.entity] = snapshot
            case VersionSnapshot():
                self.versions[snapshot.entity] = snapshot
            case EndpointSnapshot():
                self.endpoints[snapshot.entity] = snapshot
            case DeploymentSnapshot():
                self.deployments[snapshot.entity] = snapshot
        self.routing.apply(snapshot)

    def _remove(self, topic: str, entity: str) -> None:
        held: dict[str, dict[str, ModelSnapshot] | dict[str, VersionSnapshot] | dict[str, EndpointSnapshot] | dict[str, DeploymentSnapshot]]
        held = {
            ModelSnapshot.topic: self.models,
            VersionSnapshot.topic: self.versions,
            EndpointSnapshot.topic: self.endpoints,
            DeploymentSnapshot.topic: self.deployments,
        }
        held.get(topic, {}).pop(entity, None)
        self.routing.remove(topic, entity)


def shows(catalog: Catalog, command: Payload, command_id: str, fact: Payload) -> bool:
    """Whether the state already holds what a fact, the answer to a command, says of it.

    Facts and snapshots come from different topics, so either may be read first. What was changed again in the meantime counts as seen
    by the snapshot that names the command as its cause.
    """
    match fact:
        case VersionRegistered():
            return f"{fact.model_name}@{fact.version}" in catalog.versions and fact.model_name in catalog.models
        case VersionAlreadyRegistered():
            aliases = command.aliases if isinstance(command, RegisterVersion) else ()
            version = catalog.versions.get(f"{fact.model_name}@{fact.version}")
            moved = _aliased(catalog, fact.model_name, aliases, fact.version) or catalog.has_seen(ModelSnapshot.topic, command_id)
            example = command.spec.example if isinstance(command, RegisterVersion) else None
            return version is not None and (version.status is not VersionStatus.VALIDATED or moved) and _has_example(version, example)
        case AliasSet():
            aliased = _aliased(catalog, fact.model_name, (fact.alias,), fact.version)
            return aliased or catalog.has_seen(ModelSnapshot.topic, command_id)
        case VersionArchived():
            version = catalog.versions.get(f"{fact.model_name}@{fact.version}")
            return version is None or version.status is VersionStatus.ARCHIVED
        case ExampleSet():
            version = catalog.versions.get(f"{fact.model_name}@{fact.version}")
            return version is None or _has_example(version, fact.example)
        case EndpointCreated():
            return fact.endpoint_name in catalog.endpoints or catalog.has_seen(EndpointSnapshot.topic, command_id)
        case EndpointDeleted():
            return fact.endpoint_name not in catalog.endpoints
        case DeploymentRequested():
            deployment = catalog.deployments.get(fact.deployment_id)
            joined = fact.endpoint_name in catalog.endpoints and fact.deployment_id in catalog.endpoints[fact.endpoint_name].deployment_ids
            current = deployment is not None and deployment.generation >= fact.generation
            return (current and joined) or _overtaken(catalog, command_id)
        case DeploymentRemovalRequested():
            deployment = catalog.deployments.get(fact.deployment_id)
            left = fact.endpoint_name not in catalog.endpoints or (
                fact.deployment_id not in catalog.endpoints[fact.endpoint_name].deployment_ids
            )
            stops = deployment is None or deployment.status is DeploymentStatus.REMOVING
            return (left and stops) or _overtaken(catalog, command_id)
        case TrafficChanged():
            endpoint = catalog.endpoints.get(fact.endpoint_name)
            return endpoint is None or endpoint.traffic == fact.traffic or catalog.has_seen(EndpointSnapshot.topic, command_id)
        case PredictionLogChanged():
            endpoint = catalog.endpoints.get(fact.endpoint_name)
            changed = endpoint is None or endpoint.prediction_log == fact.prediction_log
            return changed or catalog.has_seen(EndpointSnapshot.topic, command_id)
        case _:
            return True


def _overtaken(catalog: Catalog, command_id: str) -> bool:
    """Whether what a command made of a deployment and its endpoint was seen, whatever became of them since."""
    return catalog.has_seen(DeploymentSnapshot.topic, command_id) and catalog.has_seen(EndpointSnapshot.topic, command_id)


def _has_example(version: VersionSnapshot, example: object) -> bool:
    """Whether a version no longer waits for an example that it was given."""
    return example is None or version.status is not VersionStatus.NEEDS_EXAMPLE or version.spec.example is not None


def _aliased(catalog: Catalog, model_name: str, aliases: tuple[str, ...], version: int | None) -> bool:
    model = catalog.models.get(model_name)
    return model is not None and all(model.aliases.get(alias) == version for alias in aliases)
