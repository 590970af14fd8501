"""Commands to the registry, the facts it states and the snapshots it keeps."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, model_validator

from schemas.artifacts import FileSet
from schemas.base import Alias, Command, Contract, Fact, Name, Payload, Percent, Sha256, VersionNumber
from schemas.environment import EnvironmentLock
from schemas.inference import DeclaredSignature, Signature
from schemas.predictions import PredictionLogSettings
from schemas.validation import Finding, Measurements

MAX_EXAMPLE_BYTES = 262_144
"""The example, and the answer it got, travel inside events: 256 KiB each, as JSON."""

MAX_SPEC_BYTES = 393_216
"""A version's spec travels inside events: 384 KiB of it and a lock of 512 KiB fit the broker's 1 MiB."""

Label = Annotated[str, Field(max_length=64)]
Labels = Annotated[dict[Label, Label], Field(max_length=64, description="Up to 64 keys with their values, each of up to 64 characters.")]


class ArtifactFormat(StrEnum):
    """How a model's file is read."""

    SKLEARN = "sklearn"
    ONNX = "onnx"


class Artifact(Contract):
    """A file in the artifact store, addressed by its content: a model, or an archive of what belongs to one."""

    sha256: Sha256
    size_bytes: int = Field(ge=0)
    filename: str = Field(max_length=255, description="Name the uploader gave it; never used as a path.")


class Lineage(Contract):
    """Where a version came from; every field is optional, none is interpreted."""

    parent_version: VersionNumber | None = None
    cause_event_id: str | None = None
    code: str | None = Field(default=None, max_length=1024)
    parameters: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)


class VersionSpec(Contract):
    """The uploader's description of a version, unchanged for its whole life (but for the example of a version that waits for one).

    ``requirements`` are PEP 508 lines; ``None`` means: infer them from the artifact. ``example`` is a request body in any form that the
    protocols take; it becomes the golden sample of the version.
    """

    artifact: Artifact
    format: ArtifactFormat | None = Field(default=None, description="None: decided by content.")
    requirements: tuple[str, ...] | None = Field(default=None, max_length=200)
    example: dict[str, Any] | None = None
    signature: DeclaredSignature | None = Field(default=None, description="As the uploader declares it; null: found in the trial.")
    code: Artifact | None = Field(default=None, description="Python modules beside the model: an archive of a folder, or one .py file.")
    allow_code: bool = Field(default=False, description="The uploader's consent to code that the artifact carries or calls.")
    forbid_batching: bool = Field(default=False, description="Never join or cut requests, whatever the trial finds.")
    description: str = Field(default="", max_length=4096)
    labels: Labels = Field(default_factory=dict)
    lineage: Lineage = Field(default_factory=Lineage)

    @model_validator(mode="after")
    def _fits_an_event(self) -> "VersionSpec":
        size = len(self.model_dump_json())
        if size > MAX_SPEC_BYTES:
            raise ValueError(f"example, requirements, labels and lineage take {size} bytes together; {MAX_SPEC_BYTES} are the most")
        return self


# Commands ------------------------------------------------------------------------------------------------------------


class RegisterVersion(Command):
    """Register an uploaded artifact as the next version of a model (creating the model if it is new).

    The aliases move to the version when it is validated, so a file that turns out bad takes none away from a good version.
    """

    event_type = "millrace.registry.version.register.v1"
    model_name: Name
    spec: VersionSpec
    aliases: tuple[Alias, ...] = Field(default=(), max_length=64)

    @property
    def entity(self) -> str:
        return self.model_name


class SetAlias(Command):
    """Point an alias at a version; ``version: null`` removes the alias."""

    event_type = "millrace.registry.alias.set.v1"
    model_name: Name
    alias: Alias
    version: VersionNumber | None

    @property
    def entity(self) -> str:
        return self.model_name


class ArchiveVersion(Command):
    """Take a version out of use; refused while it is deployed."""

    event_type = "millrace.registry.version.archive.v1"
    model_name: Name
    version: VersionNumber

    @property
    def entity(self) -> str:
        return self.model_name


class SetExample(Command):
    """Give an example to a version that needs one; it is tried again with it. Refused for any other version."""

    event_type = "millrace.registry.version.set_example.v1"
    model_name: Name
    version: VersionNumber
    example: dict[str, Any]

    @property
    def entity(self) -> str:
        return self.model_name


class CreateEndpoint(Command):
    """Create an endpoint: a stable name that predictions are asked of."""

    event_type = "millrace.registry.endpoint.create.v1"
    endpoint_name: Name
    labels: Labels = Field(default_factory=dict)
    description: str = Field(default="", max_length=4096)
    prediction_log: PredictionLogSettings | None = Field(default=None, description="null: the defaults.")

    @property
    def entity(self) -> str:
        return self.endpoint_name


class SetPredictionLog(Command):
    """Set how an endpoint's requests are logged, from now on."""

    event_type = "millrace.registry.endpoint.set_prediction_log.v1"
    endpoint_name: Name
    prediction_log: PredictionLogSettings

    @property
    def entity(self) -> str:
        return self.endpoint_name


class DeployVersion(Command):
    """Deploy a validated version to an endpoint.

    At most one of ``version`` and ``alias`` is given; neither means the newest validated version. The traffic moves when the
    deployment is ready: it then gets ``traffic_percent`` and the others keep their proportions in the rest.
    """

    event_type = "millrace.registry.endpoint.deploy.v1"
    endpoint_name: Name
    model_name: Name
    version: VersionNumber | None = None
    alias: Alias | None = None
    traffic_percent: Percent = 100
    min_replicas: int = Field(default=1, ge=1, le=64)
    max_replicas: int = Field(default=1, ge=1, le=64)

    @model_validator(mode="after")
    def _consistent(self) -> "DeployVersion":
        if self.version is not None and self.alias is not None:
            raise ValueError("give a version or an alias, not both")
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}")
        return self

    @property
    def entity(self) -> str:
        return self.endpoint_name


class UndeployVersion(Command):
    """Remove a deployed version from an endpoint; refused while it takes traffic, unless ``force``."""

    event_type = "millrace.registry.endpoint.undeploy.v1"
    endpoint_name: Name
    deployment_id: str
    force: bool = False

    @property
    def entity(self) -> str:
        return self.endpoint_name


class SetTraffic(Command):
    """Set an endpoint's whole split; keys are deployment ids, values sum to 100."""

    event_type = "millrace.registry.endpoint.set_traffic.v1"
    endpoint_name: Name
    traffic: dict[str, Percent]

    @property
    def entity(self) -> str:
        return self.endpoint_name


class DeleteEndpoint(Command):
    """Delete an endpoint; refused while a deployment takes traffic, unless ``force``, which removes its deployments too.

    Its inference topics go a little later, unless ``keep_topics``.
    """

    event_type = "millrace.registry.endpoint.delete.v1"
    endpoint_name: Name
    force: bool = False
    keep_topics: bool = False

    @property
    def entity(self) -> str:
        return self.endpoint_name


# Facts ---------------------------------------------------------------------------------------------------------------


class RefusalKind(StrEnum):
    """Why a command was refused, as a caller would sort it."""

    INVALID = "invalid"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"


class CommandRefused(Fact):
    """A command was understood and not carried out; nothing has changed."""

    event_type = "millrace.registry.command.refused.v1"
    command_type: str
    command_entity: str
    kind: RefusalKind
    reason: str

    @property
    def entity(self) -> str:
        return self.command_entity


class VersionRegistered(Fact):
    """A new immutable version exists; the validator inspects it next."""

    event_type = "millrace.registry.version.registered.v1"
    model_name: Name
    version: VersionNumber
    spec: VersionSpec

    @property
    def entity(self) -> str:
        return self.model_name


class VersionAlreadyRegistered(Fact):
    """The same content was uploaded again under the same model; ``version`` is the one that exists."""

    event_type = "millrace.registry.version.already_registered.v1"
    model_name: Name
    version: VersionNumber

    @property
    def entity(self) -> str:
        return self.model_name


class AliasSet(Fact):
    """An alias points at ``version`` now (``null``: removed)."""

    event_type = "millrace.registry.alias.was_set.v1"
    model_name: Name
    alias: Alias
    version: VersionNumber | None
    previous_version: VersionNumber | None = None

    @property
    def entity(self) -> str:
        return self.model_name


class VersionArchived(Fact):
    """A version is out of use."""

    event_type = "millrace.registry.version.archived.v1"
    model_name: Name
    version: VersionNumber

    @property
    def entity(self) -> str:
        return self.model_name


class ExampleSet(Fact):
    """A version that needed an example has one now; the validator tries it again with it."""

    event_type = "millrace.registry.version.example_was_set.v1"
    model_name: Name
    version: VersionNumber
    example: dict[str, Any]

    @property
    def entity(self) -> str:
        return self.model_name


class EndpointCreated(Fact):
    """An endpoint exists; it has no deployment yet."""

    event_type = "millrace.registry.endpoint.created.v1"
    endpoint_name: Name
    labels: Labels = Field(default_factory=dict)
    description: str = ""
    prediction_log: PredictionLogSettings = Field(default_factory=PredictionLogSettings)

    @property
    def entity(self) -> str:
        return self.endpoint_name


class PredictionLogChanged(Fact):
    """An endpoint's requests are logged in another way now."""

    event_type = "millrace.registry.endpoint.prediction_log_changed.v1"
    endpoint_name: Name
    prediction_log: PredictionLogSettings
    previous: PredictionLogSettings

    @property
    def entity(self) -> str:
        return self.endpoint_name


class DeploymentRequested(Fact):
    """A version shall run for an endpoint; serving makes it so."""

    event_type = "millrace.registry.deployment.requested.v1"
    endpoint_name: Name
    deployment_id: str
    generation: int = Field(ge=1)
    model_name: Name
    version: VersionNumber
    traffic_percent: Percent
    min_replicas: int
    max_replicas: int

    @property
    def entity(self) -> str:
        return self.endpoint_name


class DeploymentRemovalRequested(Fact):
    """A deployment shall stop; serving makes it so."""

    event_type = "millrace.registry.deployment.removal_requested.v1"
    endpoint_name: Name
    deployment_id: str

    @property
    def entity(self) -> str:
        return self.endpoint_name


class TrafficChanged(Fact):
    """An endpoint's split is ``traffic`` now (deployment id → percent)."""

    event_type = "millrace.registry.endpoint.traffic_changed.v1"
    endpoint_name: Name
    traffic: dict[str, Percent]
    previous: dict[str, Percent] = Field(default_factory=dict)

    @property
    def entity(self) -> str:
        return self.endpoint_name


class EndpointDeleted(Fact):
    """An endpoint is gone; its deployments are being removed, and so are its inference topics, unless ``keep_topics``."""

    event_type = "millrace.registry.endpoint.deleted.v1"
    endpoint_name: Name
    keep_topics: bool = False

    @property
    def entity(self) -> str:
        return self.endpoint_name


# Snapshots -----------------------------------------------------------------------------------------------------------


class VersionStatus(StrEnum):
    """Where a version is in its life: registered → inspected → built → validated, or rejected / build_failed; archived at the end.

    A built version that refuses a made-up row is ``needs_example`` until it has answered, or refused, an example.
    """

    REGISTERED = "registered"
    INSPECTED = "inspected"
    BUILT = "built"
    NEEDS_EXAMPLE = "needs_example"
    VALIDATED = "validated"
    REJECTED = "rejected"
    BUILD_FAILED = "build_failed"
    ARCHIVED = "archived"


class DeploymentStatus(StrEnum):
    """Where a deployment is: pending → ready (⇄ degraded) or failed; removing until serving says it is gone."""

    PENDING = "pending"
    READY = "ready"
    DEGRADED = "degraded"
    FAILED = "failed"
    REMOVING = "removing"


class Replica(Contract):
    """One runner that answers: ``address`` is ``unix:/path`` or ``tcp:host:port``."""

    replica_id: str
    address: str


class ModelSnapshot(Payload):
    """A registered model: its aliases and the highest version number given so far."""

    event_type = "millrace.registry.model.snapshot.v1"
    topic = "millrace.state.models"
    model_name: Name
    latest_version: int = Field(ge=0)
    aliases: dict[str, int] = Field(default_factory=dict)
    created_at: datetime
    updated_at: datetime

    @property
    def entity(self) -> str:
        return self.model_name


class VersionSnapshot(Payload):
    """A model version: what was uploaded, how far it came, and what each stage found.

    ``stage_times`` maps each status that was reached to the time it was reached.
    """

    event_type = "millrace.registry.version.snapshot.v1"
    topic = "millrace.state.versions"
    model_name: Name
    version: VersionNumber
    status: VersionStatus
    spec: VersionSpec
    format: ArtifactFormat | None = None
    files: FileSet | None = Field(default=None, description="What the artifact was unpacked to; null when it is one file.")
    code: FileSet | None = Field(default=None, description="The modules that came with it.")
    requirements: tuple[str, ...] | None = Field(default=None, description="As given, or as inferred at inspection.")
    environment: EnvironmentLock | None = None
    signature: Signature | None = None
    measurements: Measurements | None = None
    findings: tuple[Finding, ...] = ()
    reason: str | None = Field(default=None, description="Why it was rejected, could not be built or needs an example; one sentence.")
    pending_aliases: tuple[Alias, ...] = Field(default=(), description="Aliases that point here once the version is validated.")
    stage_times: dict[str, datetime] = Field(default_factory=dict)
    correlation_id: str | None = None
    created_at: datetime
    updated_at: datetime

    @property
    def entity(self) -> str:
        return f"{self.model_name}@{self.version}"


class EndpointSnapshot(Payload):
    """An endpoint: its deployments and how its traffic is split over them (percent; sums to 100, or is empty)."""

    event_type = "millrace.registry.endpoint.snapshot.v1"
    topic = "millrace.state.endpoints"
    endpoint_name: Name
    labels: Labels = Field(default_factory=dict)
    description: str = ""
    traffic: dict[str, Percent] = Field(default_factory=dict)
    deployment_ids: tuple[str, ...] = ()
    prediction_log: PredictionLogSettings = Field(default_factory=PredictionLogSettings)
    created_at: datetime
    updated_at: datetime

    @property
    def entity(self) -> str:
        return self.endpoint_name


class DeploymentSnapshot(Payload):
    """A version at work for an endpoint: everything serving needs to run it and the gateway to reach it.

    ``generation`` grows with every change of what shall run; reports about an older generation are ignored.
    ``pending_traffic_percent`` is the share it gets when it becomes ready for the first time. ``is_cluster_away``: what runs the replicas
    does not answer, and none that is lost is replaced before it does.
    """

    event_type = "millrace.registry.deployment.snapshot.v1"
    topic = "millrace.state.deployments"
    deployment_id: str
    generation: int = Field(ge=1)
    endpoint_name: Name
    model_name: Name
    version: VersionNumber
    status: DeploymentStatus
    artifact: Artifact
    files: FileSet | None = Field(default=None, description="What the artifact was unpacked to; null when it is one file.")
    code: FileSet | None = Field(default=None, description="The modules that came with it.")
    format: ArtifactFormat
    environment: EnvironmentLock
    signature: Signature
    min_replicas: int
    max_replicas: int
    pending_traffic_percent: Percent | None = None
    replicas: tuple[Replica, ...] = ()
    is_cluster_away: bool = False
    reason: str | None = None
    stage_times: dict[str, datetime] = Field(default_factory=dict)
    correlation_id: str | None = None
    traceparent: str | None = Field(
        default=None, description="Trace context of the deploy command, so that serving's work joins its trace."
    )
    created_at: datetime
    updated_at: datetime

    @property
    def entity(self) -> str:
        return self.deployment_id
