"""What serving says of the deployments it keeps running."""

from pydantic import Field

from schemas.base import Fact, Name
from schemas.registry import Replica


class DeploymentReady(Fact):
    """All replicas asked for answer; ``replicas`` says where."""

    event_type = "millrace.serving.deployment.ready.v1"
    endpoint_name: Name
    deployment_id: str
    generation: int = Field(ge=1)
    replicas: tuple[Replica, ...]

    @property
    def entity(self) -> str:
        return self.endpoint_name


class DeploymentChanged(Fact):
    """The set of answering replicas is another one now (a runner died, moved, or was added); empty means nobody answers.

    ``is_cluster_away``: what runs the replicas does not answer, and none that is lost is replaced; ``replicas`` are those known last.
    """

    event_type = "millrace.serving.deployment.changed.v1"
    endpoint_name: Name
    deployment_id: str
    generation: int = Field(ge=1)
    replicas: tuple[Replica, ...]
    reason: str = ""
    is_cluster_away: bool = False

    @property
    def entity(self) -> str:
        return self.endpoint_name


class DeploymentFailed(Fact):
    """A deployment cannot be made to run."""

    event_type = "millrace.serving.deployment.failed.v1"
    endpoint_name: Name
    deployment_id: str
    generation: int = Field(ge=1)
    reason: str

    @property
    def entity(self) -> str:
        return self.endpoint_name


class DeploymentRemoved(Fact):
    """A deployment's replicas are gone."""

    event_type = "millrace.serving.deployment.removed.v1"
    endpoint_name: Name
    deployment_id: str
    generation: int = Field(ge=1)

    @property
    def entity(self) -> str:
        return self.endpoint_name
