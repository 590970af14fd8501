"""Settings of the gateway."""

from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.settings import ArtifactSettings, KafkaSettings, ProcessSettings, RunnerSettings, TelemetrySettings
from schemas.base import NAME_PATTERN


class HttpSettings(BaseSettings):
    """Limits and deadlines of the HTTP server; ``docs/http-limits.md`` says what happens at each."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_HTTP_", frozen=True)

    sockets: tuple[int, ...] = Field(
        (),
        description="Descriptors of sockets that listen on the port already, one for each worker, as a JSON list: who starts the gateway "
        "holds them, so that connections wait while it restarts. Empty: it opens its own.",
    )
    max_connections: int = Field(4_096, ge=1, description="Most connections at once; a further one is answered 503.")
    max_connections_per_client: int = Field(
        512,
        ge=1,
        description="Most connections at once from one address (IPv6: one /64); loopback is exempt. A further one is answered 503.",
    )
    max_head_bytes: int = Field(32_768, ge=1_024, description="Longest head of a request, in bytes; else 431.")
    max_header_bytes: int = Field(16_384, ge=256, description="Longest header field, name and value, in bytes; else 431.")
    max_headers: int = Field(100, ge=8, description="Most header fields of a request; else 431.")
    max_target_bytes: int = Field(8_192, ge=256, description="Longest URL of a request, in bytes; else 414.")
    max_ahead_bytes: int = Field(
        65_536, ge=1_024, description="Bytes of pipelined requests that are read while one is being answered; then reading pauses."
    )
    max_buffered_bytes: int = Field(
        2**30,
        ge=2**20,
        description="Memory for bodies that are being received, all connections together, in bytes; else 503. As much again for answers "
        "that clients do not take at once; beyond it one is cut.",
    )
    first_byte_timeout_s: float = Field(10.0, gt=0, description="Time a new connection may be silent, in seconds.")
    idle_timeout_s: float = Field(75.0, gt=0, description="Time a connection may be silent between two requests, in seconds.")
    head_timeout_s: float = Field(
        10.0, gt=0, description="Time from the first byte of a request to the end of its head, in seconds; else 408."
    )
    body_timeout_s: float = Field(
        10.0, gt=0, description="A body must bring min_bytes_per_s on average over every so many seconds, or its end; else 408."
    )
    write_timeout_s: float = Field(
        20.0, gt=0, description="A client must take min_bytes_per_s of its answer on average over every so many seconds; else it is cut."
    )
    min_bytes_per_s: int = Field(1_024, ge=1, description="Slowest pace of a body and of an answer, in bytes per second.")
    half_closed_timeout_s: float = Field(
        1.0,
        gt=0,
        description="Time in which a client that ended its sending side still gets its answer, in seconds; then it counts as gone.",
    )


class GrpcSettings(BaseSettings):
    """The gRPC door; ``docs/protocols/grpc.md`` says what happens at each limit. Messages are as large as ``predict_max_bytes`` allows."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_GRPC_", frozen=True)

    enabled: bool = Field(True, description="Whether there is a gRPC door.")
    sockets: tuple[int, ...] = Field((), description="As GATEWAY_HTTP_SOCKETS, for this port.")
    port: int = Field(8081, ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")
    max_connections: int = Field(1_024, ge=1, description="Most connections at once; a further one is closed at once.")
    max_connections_per_client: int = Field(
        256, ge=1, description="Most connections at once from one address (IPv6: one /64); loopback is exempt."
    )
    max_streams: int = Field(1_000, ge=1, description="Most calls of one connection at once; the client holds further ones back.")
    max_metadata_bytes: int = Field(16_384, ge=1_024, description="Longest metadata of a call, compressed, in bytes.")
    max_buffered_bytes: int = Field(
        512 * 2**20, ge=2**20, description="Memory for messages that are being received, all connections together, in bytes."
    )
    header_timeout_s: float = Field(
        10.0, gt=0, description="Time for the greeting of a new connection, and for metadata or a frame that has begun, in seconds."
    )
    body_timeout_s: float = Field(
        60.0, gt=0, description="Time in which the message of a call must be complete, or be coming at 1 KiB a second, in seconds."
    )
    write_timeout_s: float = Field(
        60.0, gt=0, description="A client must take something of its answers every so many seconds; else it is cut."
    )
    idle_timeout_s: float = Field(600.0, gt=0, description="Time a connection may be without calls, in seconds.")


class LogSettings(BaseSettings):
    """The prediction log; ``docs/prediction-log.md`` says what happens at each limit."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_LOG_", frozen=True)

    queue_bytes: int = Field(
        64 * 2**20,
        ge=2**20,
        description="Memory for records that wait for the broker, in bytes. Beyond half of it inputs and outputs are left out, beyond it "
        "rows are given up.",
    )
    payload_bytes_per_s: int = Field(
        32 * 2**20, ge=0, description="Most inputs and outputs put into the log per second, in bytes; the rest is left out."
    )
    flush_ms: int = Field(250, ge=10, le=10_000, description="How often records are cut, in milliseconds.")


class Settings(BaseSettings):
    """Read from ``GATEWAY_*``, and the shared groups from their own variables.

    Any ``host`` but a loopback address needs API keys; ``build()`` refuses to start without.
    """

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", frozen=True, populate_by_name=True)

    host: str = Field("127.0.0.1", validation_alias=AliasChoices("GATEWAY_HOST", "GATEWAY_HTTP_HOST"), description="Address to listen on.")
    http_port: int = Field(8080, ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")
    workers: int = Field(1, ge=1, le=64, description="Processes that share the port, each with its own queues; 1: no others are started.")
    api_keys: SecretStr = Field(SecretStr(""), description="Bearer keys, as name:key,name:key; each key has at least 16 characters.")
    api_keys_file: Path | None = Field(None, description="File with lines name:SHA-256 of the key (hex); # begins a comment.")
    management_max_bytes: int = Field(
        1_000_000, ge=1_024, description="Largest body of a management request, in bytes: a command is one record."
    )
    predict_max_bytes: int = Field(64 * 2**20, ge=1_024, description="Largest body of a predict request, in bytes.")
    default_endpoint: str | None = Field(
        None, pattern=NAME_PATTERN, description="Endpoint that POST /invocations is for; when absent, the only one there is."
    )
    predict_timeout_ms: int = Field(
        30_000, ge=1, description="Time a predict request may take when the caller does not say, in milliseconds."
    )
    replica_wait_ms: int = Field(
        5_000, ge=0, description="Longest time a predict request waits for a replica that is being restarted, in milliseconds."
    )
    batch_rows: int = Field(16_384, ge=1, le=1_000_000, description="Most rows of one batch.")
    batch_bytes: int = Field(
        8 * 2**20, ge=1_024, description="Largest inputs of one batch, in bytes; a larger request is cut, or goes alone."
    )
    batches_in_flight: int = Field(
        2,
        ge=1,
        le=64,
        description="Batches that one replica is given at once while its model is quicker than the way to it and back; else one.",
    )
    batch_ms: int = Field(
        100, ge=1, description="Time that a batch may be expected to take, in milliseconds: a slow model gets smaller batches."
    )
    queue_ms: int = Field(
        1_000, ge=1, description="Longest expected wait of a predict request that is still accepted, in milliseconds; beyond it: 429."
    )
    queue_requests: int = Field(
        1024, ge=1, description="Most predict requests that wait for one deployment; further ones are refused with 429."
    )
    accepted_requests: int = Field(10_000, ge=1, description="Most predict requests that are answered at once, all deployments together.")
    held_bytes: int = Field(
        2**30, ge=2**20, description="Memory for the tensors of all predict requests that are being answered, in bytes; beyond it: 429."
    )
    look_us: int = Field(
        500,
        ge=0,
        le=10_000,
        description="Time that the event loop looks for the answer to the only request there is before it sleeps, in microseconds: one "
        "client that asks without pause is answered sooner, for processor time. 0: never.",
    )
    async_concurrency: int = Field(
        32,
        ge=1,
        le=1_000,
        description="Asynchronous predictions that one process carries out at once; of one endpoint at most half of them.",
    )
    async_expiry_s: int = Field(
        86_400, ge=1, le=604_800, description="Time an asynchronous prediction is kept when the caller does not say, in seconds."
    )
    async_operations: int = Field(
        100_000,
        ge=1,
        description="Asynchronous predictions that are kept until they expire, of one caller at most half of them; further ones: 429.",
    )
    async_kept_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="Memory for asynchronous requests and their answers, in bytes, of one caller at most half of it; beyond it: 429.",
    )
    webhook_hosts: str = Field(
        "", description="Comma-separated hosts, or host:port, that webhooks may go to; * stands for any part. Empty: none may."
    )
    webhook_secret: SecretStr = Field(SecretStr(""), description="Key that webhooks are signed with (Standard Webhooks, v1).")
    webhook_attempts: int = Field(6, ge=1, le=20, description="How often a webhook is tried.")
    webhook_first_pause_s: float = Field(
        1.0, gt=0, description="Pause after the first attempt of a webhook, in seconds; each next is twice as long."
    )
    command_wait_s: float = Field(
        10.0, ge=0, le=60, description="Time to wait for a command's event when the caller does not say, in seconds."
    )
    broker_timeout_s: float = Field(5.0, gt=0, description="Longest time the broker may take to accept a record, in seconds.")
    drain_timeout_s: float = Field(
        10.0, gt=0, description="Longest time requests in flight may take once the process is told to stop, in seconds."
    )
    http: HttpSettings = Field(default_factory=HttpSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    grpc: GrpcSettings = Field(default_factory=GrpcSettings)
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    artifacts: ArtifactSettings = Field(default_factory=ArtifactSettings)
    runner: RunnerSettings = Field(default_factory=RunnerSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)
    process: ProcessSettings = Field(default_factory=ProcessSettings)
