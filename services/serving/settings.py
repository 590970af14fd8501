"""Settings of serving."""

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.settings import ArtifactSettings, EnvironmentSettings, KafkaSettings, ProcessSettings, RunnerSettings, TelemetrySettings
from services.serving.spec import Limits, Places


class RaySettings(BaseSettings):
    """Which cluster; the variables are Ray's own. Ray itself reads ``RAY_AUTH_MODE`` and ``RAY_AUTH_TOKEN_PATH``."""

    model_config = SettingsConfigDict(env_prefix="RAY_", frozen=True)

    address: str = Field("127.0.0.1:6379", description="host:port of the Ray cluster.")
    address_file: Path | None = Field(
        None, description="File that names the cluster instead, once it is up: JSON with the key `address`. `millrace up` sets it."
    )


class Settings(BaseSettings):
    """What serving reads from its environment; ``SERVING_*`` and the shared groups."""

    model_config = SettingsConfigDict(env_prefix="SERVING_", frozen=True, populate_by_name=True)

    listen: Literal["unix", "tcp"] = Field("unix", description="unix: gateway and replicas share a machine; tcp: they do not.")
    keep_warm: bool = Field(True, description="Keep a spare Ray worker with Serve imported (90 MB), so that a replica starts sooner.")
    threads: int = Field(1, ge=1, le=256, description="Threads of the numeric libraries in one runner.")
    memory_limit_bytes: int = Field(
        4 * 2**30, ge=64 * 2**20, description="Memory that a served model may allocate, in bytes; as much as in its trial."
    )
    predict_timeout_s: float = Field(
        30.0,
        gt=0,
        description="A model that is busy with one request for longer is taken for hung, and its runner is replaced, in seconds.",
    )
    poll_settled_s: float = Field(2.0, gt=0, description="How often Ray is asked while everything is as it should be, in seconds.")
    poll_unsettled_s: float = Field(0.1, gt=0, description="How often Ray is asked while something is on its way, in seconds.")
    metrics_port: int = Field(
        9104,
        ge=0,
        le=65_535,
        validation_alias=AliasChoices("SERVING_METRICS_PORT", "METRICS_PORT"),
        description="Port of /metrics on METRICS_HOST; 0: none. One that is taken is done without.",
    )
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    ray: RaySettings = Field(default_factory=RaySettings)
    artifacts: ArtifactSettings = Field(default_factory=ArtifactSettings)
    environments: EnvironmentSettings = Field(default_factory=EnvironmentSettings)
    runner: RunnerSettings = Field(default_factory=RunnerSettings)
    process: ProcessSettings = Field(default_factory=ProcessSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)

    @property
    def places(self) -> Places:
        """Where replicas find things."""
        return Places(
            artifacts_url=self.artifacts.url,
            artifact_cache_dir=_absolute(self.process.home / "cache" / "artifacts"),
            environments_dir=_absolute(self.environments.dir),
            runner_key_file=_absolute(self.runner.key_file),
            listen=self.listen,
        )

    @property
    def limits(self) -> Limits:
        """What a served model may use."""
        return Limits(threads=self.threads, memory_bytes=self.memory_limit_bytes, predict_timeout_s=self.predict_timeout_s)


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()
