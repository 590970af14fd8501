"""Settings of the registry."""

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.settings import KafkaSettings, ProcessSettings, TelemetrySettings


class Settings(BaseSettings):
    """What the registry reads from its environment; ``REGISTRY_*`` and the shared groups."""

    model_config = SettingsConfigDict(env_prefix="REGISTRY_", frozen=True, populate_by_name=True)

    metrics_port: int = Field(
        9101,
        ge=0,
        le=65_535,
        validation_alias=AliasChoices("REGISTRY_METRICS_PORT", "METRICS_PORT"),
        description="Port of /metrics on METRICS_HOST; 0: none. One that is taken is done without.",
    )
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    process: ProcessSettings = Field(default_factory=ProcessSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)
