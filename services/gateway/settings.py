"""Settings of the gateway."""

from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.settings import ArtifactSettings, KafkaSettings, ProcessSettings, RunnerSettings, TelemetrySettings


class Settings(BaseSettings):
    """Read from ``GATEWAY_*``, and the shared groups from their own variables.

    Any ``host`` but a loopback address needs API keys; ``build()`` refuses to start without.
    """

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", frozen=True, populate_by_name=True)

    host: str = Field("127.0.0.1", validation_alias=AliasChoices("GATEWAY_HOST", "GATEWAY_HTTP_HOST"), description="Address to listen on.")
    http_port: int = Field(8080, ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")
    api_keys: SecretStr = Field(SecretStr(""), description="Bearer keys, as name:key,name:key; each key has at least 16 characters.")
    api_keys_file: Path | None = Field(None, description="File with lines name:SHA-256 of the key (hex); # begins a comment.")
    management_max_bytes: int = Field(
        1_000_000, ge=1_024, description="Largest body of a management request, in bytes: a command is one record."
    )
    predict_max_bytes: int = Field(64 * 2**20, ge=1_024, description="Largest body of a predict request, in bytes.")
    predict_timeout_ms: int = Field(
        30_000, ge=1, description="Time a predict request may take when the caller does not say, in milliseconds."
    )
    replica_wait_ms: int = Field(
        5_000, ge=0, description="Longest time a predict request waits for a replica that is being restarted, in milliseconds."
    )
    command_wait_s: float = Field(
        10.0, ge=0, le=60, description="Time to wait for a command's event when the caller does not say, in seconds."
    )
    broker_timeout_s: float = Field(5.0, gt=0, description="Longest time the broker may take to accept a record, in seconds.")
    drain_timeout_s: float = Field(
        10.0, gt=0, description="Longest time requests in flight may take once the process is told to stop, in seconds."
    )
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    artifacts: ArtifactSettings = Field(default_factory=ArtifactSettings)
    runner: RunnerSettings = Field(default_factory=RunnerSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)
    process: ProcessSettings = Field(default_factory=ProcessSettings)
