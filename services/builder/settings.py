"""Settings of the builder."""

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.settings import EnvironmentSettings, KafkaSettings, ProcessSettings, TelemetrySettings


class Settings(BaseSettings):
    """What the builder reads from its environment; ``BUILDER_*`` and the shared groups."""

    model_config = SettingsConfigDict(env_prefix="BUILDER_", frozen=True, populate_by_name=True)

    concurrency: int = Field(2, ge=1, le=64, description="Environments built at once, for versions of different models.")
    resolution_timeout_s: float = Field(120.0, gt=0, description="Longest time one resolution may take, in seconds.")
    resolution_max_age_s: float = Field(
        7 * 86_400.0,
        ge=0,
        description="Age up to which a resolution is used again for equal requirements, in seconds; 0: always resolve again.",
    )
    metrics_port: int = Field(
        9103,
        ge=0,
        le=65_535,
        validation_alias=AliasChoices("BUILDER_METRICS_PORT", "METRICS_PORT"),
        description="Port of /metrics on METRICS_HOST; 0: none. One that is taken is done without.",
    )
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    environments: EnvironmentSettings = Field(default_factory=EnvironmentSettings)
    process: ProcessSettings = Field(default_factory=ProcessSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)
