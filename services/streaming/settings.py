"""Settings of streaming."""

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.settings import ArtifactSettings, KafkaSettings, ProcessSettings, RunnerSettings, TelemetrySettings
from services.streaming.answering import AnswerLimits
from services.streaming.streams import StreamLimits


class Settings(BaseSettings):
    """What streaming reads from its environment; ``STREAMING_*`` and the shared groups."""

    model_config = SettingsConfigDict(env_prefix="STREAMING_", frozen=True, populate_by_name=True)

    chunk_records: int = Field(1_000, ge=1, le=50_000, description="Most inference records of one endpoint that are taken at once.")
    chunk_bytes: int = Field(
        4 * 2**20,
        ge=64 * 2**10,
        description="Most bytes of inference records of one endpoint that are taken at once, and fetched ahead; up to a dozen times as "
        "many are in memory.",
    )
    batch_rows: int = Field(
        4_096,
        ge=1,
        description="Most rows that a runner is asked at once; fewer as long as the model takes longer than 50 ms for them.",
    )
    in_flight: int = Field(
        8, ge=1, le=256, description="Most batches of one endpoint that runners are asked at once, two for each replica."
    )
    timeout_s: float = Field(
        25.0,
        gt=0,
        description="An inference record that a model does not answer in this time is given up, in seconds; less than "
        "SERVING_PREDICT_TIMEOUT_S, after which the runner ends itself.",
    )
    claim_bytes: int = Field(
        64 * 2**20, ge=2**20, description="Largest request or result that is fetched from or put into the artifact store, in bytes."
    )
    topics_kept_s: float = Field(
        30.0,
        ge=0,
        description="How long the inference topics of a deleted endpoint stay, in seconds; created again within it, the endpoint has "
        "what they hold. `millrace endpoints delete --keep-topics` keeps them for good.",
    )
    metrics_port: int = Field(
        9105,
        ge=0,
        le=65_535,
        validation_alias=AliasChoices("STREAMING_METRICS_PORT", "METRICS_PORT"),
        description="Port of /metrics on METRICS_HOST; 0: none. One that is taken is done without.",
    )
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    artifacts: ArtifactSettings = Field(default_factory=ArtifactSettings)
    runner: RunnerSettings = Field(default_factory=RunnerSettings)
    process: ProcessSettings = Field(default_factory=ProcessSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)

    @property
    def stream_limits(self) -> StreamLimits:
        """How much is taken at once."""
        return StreamLimits(self.chunk_records, self.chunk_bytes)

    @property
    def answer_limits(self) -> AnswerLimits:
        """How much is asked at once, and for how long."""
        return AnswerLimits(self.batch_rows, self.in_flight, self.timeout_s, self.claim_bytes)
