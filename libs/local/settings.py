"""How the platform on this machine is run."""

import os
from enum import StrEnum
from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class BrokerChoice(StrEnum):
    """Which broker ``up`` starts: ``auto`` is Kafka, or the embedded one where Kafka cannot be had."""

    AUTO = "auto"
    KAFKA = "kafka"
    EMBEDDED = "embedded"


class LocalSettings(BaseSettings):
    """What ``millrace up`` needs to know; read from the environment, overridden by the command line."""

    model_config = SettingsConfigDict(env_prefix="MILLRACE_", frozen=True, populate_by_name=True)

    home: Path = Field(
        Path(".millrace"), validation_alias=AliasChoices("MILLRACE_HOME"), description="Directory that holds the state of the platform."
    )
    broker: BrokerChoice = Field(
        BrokerChoice.AUTO, validation_alias=AliasChoices("MILLRACE_BROKER"), description="auto, kafka or embedded."
    )
    bootstrap_servers: str = Field(
        "",
        validation_alias=AliasChoices("KAFKA_BOOTSTRAP_SERVERS"),
        description="Brokers to use instead of one that `up` starts, comma-separated host:port.",
    )
    kafka_port: int = Field(
        9092,
        ge=1,
        le=65535,
        validation_alias=AliasChoices("MILLRACE_KAFKA_PORT"),
        description="Loopback port of the broker that `up` starts.",
    )
    kafka_heap_mb: int = Field(
        384,
        ge=192,
        le=512,
        validation_alias=AliasChoices("MILLRACE_KAFKA_HEAP_MB"),
        description="Largest heap of Kafka's JVM, in MiB. At rest about 60 are in use.",
    )
    http_port: int = Field(
        8080, ge=1, le=65535, validation_alias=AliasChoices("GATEWAY_HTTP_PORT"), description="Port of the gateway's HTTP door."
    )
    grpc_port: int = Field(
        8081, ge=1, le=65535, validation_alias=AliasChoices("GATEWAY_GRPC_PORT"), description="Port of the gateway's gRPC door."
    )
    grpc_enabled: bool = Field(
        True, validation_alias=AliasChoices("GATEWAY_GRPC_ENABLED"), description="Whether the gateway has a gRPC door."
    )
    gateway_workers: int = Field(
        1, ge=1, le=64, validation_alias=AliasChoices("GATEWAY_WORKERS"), description="Processes of the gateway that share its ports."
    )
    http_host: str = Field(
        "127.0.0.1", validation_alias=AliasChoices("GATEWAY_HOST", "GATEWAY_HTTP_HOST"), description="Address of the gateway's HTTP door."
    )
    ready_timeout_s: float = Field(
        120.0,
        ge=0,
        validation_alias=AliasChoices("MILLRACE_READY_TIMEOUT_S"),
        description="Longest wait of `up` for deployed endpoints to answer once every part is ready, in seconds.",
    )
    otlp_endpoint: str = Field(
        "",
        validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="Collector to use instead of a Jaeger that `up` starts; base URL of OTLP over HTTP.",
    )
    ray_address: str = Field(
        "", validation_alias=AliasChoices("RAY_ADDRESS"), description="Ray cluster to use instead of a head that `up` starts."
    )
    artifacts_url: str = Field(
        "", validation_alias=AliasChoices("ARTIFACTS_URL"), description="Artifact store to use instead of a directory in the home."
    )
    cache_home: Path = Field(
        Path("~/.cache"), validation_alias=AliasChoices("XDG_CACHE_HOME"), description="Directory that holds what may be fetched again."
    )

    @property
    def cache(self) -> Path:
        """Millrace's own directory among the user's caches."""
        return self.cache_home.expanduser().absolute() / "millrace"


def inherited_environment() -> dict[str, str]:
    """The environment of this process, for the processes that it starts."""
    return dict(os.environ)
