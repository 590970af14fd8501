"""Settings that two or more services share; each service nests the groups it needs in its own ``Settings``."""

from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class KafkaSettings(BaseSettings):
    """How to reach the log; read from ``KAFKA_*``."""

    model_config = SettingsConfigDict(env_prefix="KAFKA_", frozen=True)

    bootstrap_servers: str = Field("127.0.0.1:9092", description="Comma-separated host:port of the brokers.")
    embedded: bool = Field(False, description="The broker is librdkafka's in-process one, which has no topic administration.")
    group_instance: str = Field(
        "0",
        description="Name of this instance within its consumer groups (static membership, KIP-345): a restart takes its place at once. "
        "Two instances of one service need two names.",
    )
    request_timeout_ms: int = Field(30_000, ge=1_000, description="Longest wait for one request to the broker, in milliseconds.")
    session_timeout_ms: int = Field(
        10_000, ge=6_000, description="A consumer silent for so long loses its place in the group, in milliseconds."
    )


class ArtifactSettings(BaseSettings):
    """Where artifacts are kept; read from ``ARTIFACTS_*``."""

    model_config = SettingsConfigDict(env_prefix="ARTIFACTS_", frozen=True, populate_by_name=True)

    url: str = Field("file://.millrace/artifacts", description="file:///directory or s3://bucket[/prefix].")
    s3_endpoint: str = Field("", description="host:port of the S3 server, with http:// or https:// in front.")
    s3_region: str = Field("us-east-1", description="Region that requests are signed for.")
    s3_access_key: SecretStr | None = Field(
        None, validation_alias=AliasChoices("ARTIFACTS_S3_ACCESS_KEY", "AWS_ACCESS_KEY_ID"), description="Access key of the S3 server."
    )
    s3_secret_key: SecretStr | None = Field(
        None, validation_alias=AliasChoices("ARTIFACTS_S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"), description="Secret key of the S3 server."
    )
    max_bytes: int = Field(8 * 2**30, ge=1, description="Largest artifact accepted, in bytes.")


class EnvironmentSettings(BaseSettings):
    """Where model environments are kept; read from ``ENVIRONMENTS_*``."""

    model_config = SettingsConfigDict(env_prefix="ENVIRONMENTS_", frozen=True)

    dir: Path = Field(Path(".millrace/environments"), description="Directory of the content-addressed environments.")
    build_timeout_s: float = Field(600.0, gt=0, description="Longest time one resolution or one installation may take, in seconds.")


class RunnerSettings(BaseSettings):
    """What is common to everybody who starts a runner or talks to one; read from ``RUNNER_*``."""

    model_config = SettingsConfigDict(env_prefix="RUNNER_", frozen=True)

    key_file: Path = Field(
        Path(".millrace/secrets/runner.key"), description="File with the platform's runner key; each runner's token is derived from it."
    )


class ProcessSettings(BaseSettings):
    """What the process that supervises a service wants of it; read from ``MILLRACE_*``."""

    model_config = SettingsConfigDict(env_prefix="MILLRACE_", frozen=True, populate_by_name=True)

    home: Path = Field(Path(".millrace"), description="Directory that holds the state of the platform on this machine.")
    metrics_host: str = Field(
        "127.0.0.1",
        validation_alias=AliasChoices("METRICS_HOST"),
        description="Address on which services without a door of their own show /metrics.",
    )
    ready_file: Path | None = Field(None, description="File to write the process id to once the service is ready.")


class TelemetrySettings(BaseSettings):
    """Traces and logs; the variables are OpenTelemetry's own, plus ``LOG_FORMAT`` and ``LOG_LEVEL``."""

    model_config = SettingsConfigDict(frozen=True)

    otel_exporter_otlp_endpoint: str = Field("", description="Base URL of an OTLP/HTTP collector; empty: traces are not exported.")
    otel_traces_sampler_arg: float = Field(1.0, ge=0, le=1, description="Share of new traces that are sampled (a caller's decision wins).")
    log_format: str = Field("auto", pattern="^(auto|json|text)$", description="auto: text on a terminal, JSON elsewhere.")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Lowest level that is logged.")
