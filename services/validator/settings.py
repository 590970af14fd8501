"""Settings of the validator."""

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.settings import ArtifactSettings, EnvironmentSettings, KafkaSettings, ProcessSettings, TelemetrySettings
from services.validator.validation import TrialLimits


class Settings(BaseSettings):
    """What the validator reads from its environment; ``VALIDATOR_*`` and the shared groups."""

    model_config = SettingsConfigDict(env_prefix="VALIDATOR_", frozen=True, populate_by_name=True)

    concurrency: int = Field(
        4,
        ge=1,
        le=64,
        description="Versions of different models handled at once; each trial may take the limits below, and more trials than cores make "
        "measured latencies longer.",
    )
    expanded_max_bytes: int = Field(8 * 2**30, ge=1, description="Largest content of a compressed artifact, or of an archive, in bytes.")
    allow_code: bool = Field(
        True,
        description="Whether uploaders may consent (`--allow-code`) to a pickle that carries code or calls more than models need, and "
        "bring modules of their own (`--code`).",
    )
    load_timeout_s: float = Field(60.0, gt=0, description="Longest time a model may take to load, in seconds.")
    predict_timeout_s: float = Field(
        10.0, gt=0, description="Longest time a model may take to answer its example, or made-up rows, in seconds."
    )
    cpu_limit_s: int = Field(120, ge=1, description="CPU time that one trial may use, in seconds.")
    memory_limit_bytes: int = Field(4 * 2**30, ge=64 * 2**20, description="Memory that a model may allocate in its trial, in bytes.")
    latency_runs: int = Field(20, ge=0, description="Predictions made to measure latency.")
    latency_time_s: float = Field(2.0, ge=0, description="Longest time spent on measuring latency, in seconds.")
    metrics_port: int = Field(
        9102,
        ge=0,
        le=65_535,
        validation_alias=AliasChoices("VALIDATOR_METRICS_PORT", "METRICS_PORT"),
        description="Port of /metrics on METRICS_HOST; 0: none. One that is taken is done without.",
    )
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    artifacts: ArtifactSettings = Field(default_factory=ArtifactSettings)
    environments: EnvironmentSettings = Field(default_factory=EnvironmentSettings)
    process: ProcessSettings = Field(default_factory=ProcessSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)

    @property
    def limits(self) -> TrialLimits:
        """What a version may use while it is tried."""
        return TrialLimits(
            load_s=self.load_timeout_s,
            predict_s=self.predict_timeout_s,
            probe_s=self.predict_timeout_s,
            cpu_s=self.cpu_limit_s,
            memory_bytes=self.memory_limit_bytes,
            latency_runs=self.latency_runs,
            latency_s=self.latency_time_s,
        )
