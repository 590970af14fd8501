"""One row per topic: name, key, event types, producer, consumers, retention. Nobody else writes a topic name."""

from dataclasses import dataclass

from schemas import dead_letter, environment, operations, predictions, registry, serving, validation
from schemas.base import Payload

DAY_MS = 86_400_000


@dataclass(frozen=True)
class Topic:
    """A row of the topics table.

    ``partitions`` is fixed where one order matters (1) and a minimum elsewhere. ``retention_ms`` None means compacted: the latest
    record of each key stays for ever.
    """

    name: str
    key: str
    payloads: tuple[type[Payload], ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    partitions: int = 1
    retention_ms: int | None = 7 * DAY_MS

    @property
    def config(self) -> dict[str, str]:
        """Broker configuration of the topic."""
        if self.retention_ms is None:
            return {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.1", "segment.ms": str(DAY_MS)}
        return {"cleanup.policy": "delete", "retention.ms": str(self.retention_ms)}


COMMANDS = Topic(
    "millrace.commands",
    "entity",
    (
        registry.RegisterVersion,
        registry.SetAlias,
        registry.ArchiveVersion,
        registry.SetExample,
        registry.CreateEndpoint,
        registry.DeployVersion,
        registry.UndeployVersion,
        registry.SetTraffic,
        registry.SetPredictionLog,
        registry.DeleteEndpoint,
    ),
    producers=("gateway", "anyone"),
    consumers=("registry", "gateway"),
)

EVENTS = Topic(
    "millrace.events",
    "entity",
    (
        registry.CommandRefused,
        registry.VersionRegistered,
        registry.VersionAlreadyRegistered,
        registry.AliasSet,
        registry.VersionArchived,
        registry.ExampleSet,
        registry.EndpointCreated,
        registry.DeploymentRequested,
        registry.DeploymentRemovalRequested,
        registry.TrafficChanged,
        registry.PredictionLogChanged,
        registry.EndpointDeleted,
        validation.VersionInspected,
        validation.VersionNeedsExample,
        validation.VersionValidated,
        validation.VersionRejected,
        environment.VersionBuilt,
        environment.VersionBuildFailed,
        serving.DeploymentReady,
        serving.DeploymentChanged,
        serving.DeploymentFailed,
        serving.DeploymentRemoved,
        predictions.PredictionLogLost,
    ),
    producers=("registry", "validator", "builder", "serving", "gateway"),
    consumers=("registry", "validator", "builder", "gateway", "streaming"),
    retention_ms=90 * DAY_MS,
)

STATE_MODELS = Topic("millrace.state.models", "model", (registry.ModelSnapshot,), ("registry",), ("registry", "gateway"), retention_ms=None)
STATE_VERSIONS = Topic(
    "millrace.state.versions",
    "model@version",
    (registry.VersionSnapshot,),
    ("registry",),
    ("registry", "validator", "gateway"),
    retention_ms=None,
)
STATE_ENDPOINTS = Topic(
    "millrace.state.endpoints",
    "endpoint",
    (registry.EndpointSnapshot,),
    ("registry",),
    ("registry", "gateway", "streaming"),
    retention_ms=None,
)
STATE_DEPLOYMENTS = Topic(
    "millrace.state.deployments",
    "deployment",
    (registry.DeploymentSnapshot,),
    ("registry",),
    ("registry", "gateway", "serving", "streaming"),
    retention_ms=None,
)
PREDICTIONS = Topic(
    "millrace.predictions",
    "endpoint",
    (predictions.PredictionsLogged, predictions.RequestsCounted),
    producers=("gateway",),
    consumers=("anyone",),
    partitions=8,
)
OPERATIONS = Topic(
    "millrace.operations",
    "operation",
    (operations.PredictionAccepted, operations.PredictionEnded, operations.WebhookEnded),
    producers=("gateway",),
    consumers=("gateway",),
    partitions=4,
)
DLQ = Topic(
    "millrace.dlq",
    "original key",
    (dead_letter.DeadLetter,),
    producers=("every consumer",),
    consumers=("gateway",),
    retention_ms=30 * DAY_MS,
)

STATE = (STATE_MODELS, STATE_VERSIONS, STATE_ENDPOINTS, STATE_DEPLOYMENTS)
TOPICS = (COMMANDS, EVENTS, *STATE, PREDICTIONS, OPERATIONS, DLQ)

INFERENCE_PARTITIONS = 4


def inference_requests(endpoint_name: str) -> Topic:
    """Streaming inference in: one record per request; records of one key are answered in order."""
    return Topic(f"millrace.inference.{endpoint_name}.requests", "any", (), ("anyone",), ("streaming",), INFERENCE_PARTITIONS)


def inference_results(endpoint_name: str) -> Topic:
    """Streaming inference out: one record per request, under its key, written in transactions."""
    return Topic(f"millrace.inference.{endpoint_name}.results", "the request's", (), ("streaming",), ("anyone",), INFERENCE_PARTITIONS)


PAYLOADS: dict[str, type[Payload]] = {payload.event_type: payload for topic in TOPICS for payload in topic.payloads}
"""CloudEvents type → payload class, for everything that is said on the fixed topics."""
