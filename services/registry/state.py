"""The registry's state: a fold of the compacted topics that it alone writes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from schemas.base import Fact
from schemas.registry import DeploymentSnapshot, EndpointSnapshot, ModelSnapshot, VersionSnapshot
from services.registry.errors import not_found

Snapshot: TypeAlias = ModelSnapshot | VersionSnapshot | EndpointSnapshot | DeploymentSnapshot


@dataclass(frozen=True)
class Context:
    """What a decision may know beside the state: when, and in which story and trace."""

    now: datetime
    correlation_id: str
    traceparent: str | None = None


@dataclass(frozen=True)
class Deletion:
    """An entity that no longer exists."""

    snapshot_type: type[Snapshot]
    entity: str


Change: TypeAlias = Snapshot | Deletion


@dataclass(frozen=True)
class Decision:
    """What a command or an outcome leads to: facts to state, and entities as they are from now on."""

    facts: tuple[Fact, ...] = ()
    changes: tuple[Change, ...] = ()

    def __add__(self, other: "Decision") -> "Decision":
        return Decision(self.facts + other.facts, self.changes + other.changes)


@dataclass
class State:
    """All entities, by id."""

    models: dict[str, ModelSnapshot] = field(default_factory=dict)
    versions: dict[str, VersionSnapshot] = field(default_factory=dict)
    endpoints: dict[str, EndpointSnapshot] = field(default_factory=dict)
    deployments: dict[str, DeploymentSnapshot] = field(default_factory=dict)

    def apply(self, changes: Iterable[Change]) -> None:
        """Fold changes in."""
        for change in changes:
            match change:
                case ModelSnapshot():
                    self.models[change.entity] = change
                case VersionSnapshot():
                    self.versions[change.entity] = change
                case EndpointSnapshot():
                    self.endpoints[change.entity] = change
                case DeploymentSnapshot():
                    self.deployments[change.entity] = change
                case Deletion():
                    self._delete(change)

    def _delete(self, deletion: Deletion) -> None:
        if deletion.snapshot_type is EndpointSnapshot:
            self.endpoints.pop(deletion.entity, None)
        elif deletion.snapshot_type is DeploymentSnapshot:
            self.deployments.pop(deletion.entity, None)
        elif deletion.snapshot_type is VersionSnapshot:
            self.versions.pop(deletion.entity, None)
        else:
            self.models.pop(deletion.entity, None)

    def model(self, name: str) -> ModelSnapshot:
        """The model of that name; refuses when there is none."""
        if name not in self.models:
            raise not_found(f"there is no model {name!r}")
        return self.models[name]

    def version(self, model_name: str, version: int) -> VersionSnapshot:
        """That version of a model; refuses when there is none."""
        model = self.model(model_name)
        found = self.versions.get(f"{model_name}@{version}")
        if found is None:
            raise not_found(f"model {model_name!r} has no version {version}; the newest is {model.latest_version}")
        return found

    def endpoint(self, name: str) -> EndpointSnapshot:
        """The endpoint of that name; refuses when there is none."""
        if name not in self.endpoints:
            raise not_found(f"there is no endpoint {name!r}")
        return self.endpoints[name]

    def versions_of(self, model_name: str) -> list[VersionSnapshot]:
        """All versions of a model, oldest first."""
        latest = self.models[model_name].latest_version if model_name in self.models else 0
        found = (self.versions.get(f"{model_name}@{number}") for number in range(1, latest + 1))
        return [version for version in found if version is not None]

    def deployments_of(self, endpoint_name: str) -> list[DeploymentSnapshot]:
        """All deployments of an endpoint, including those being removed."""
        return [deployment for deployment in self.deployments.values() if deployment.endpoint_name == endpoint_name]
