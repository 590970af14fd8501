"""Settings of the registry."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.settings import KafkaSettings, ProcessSettings, TelemetrySettings


class Settings(BaseSettings):
    """The registry has no settings of its own; these are the shared groups it reads."""

    model_config = SettingsConfigDict(env_prefix="REGISTRY_", frozen=True)

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    process: ProcessSettings = Field(default_factory=ProcessSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)
