"""What the command line reads from its environment."""

import json
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.local.jaeger import OTLP_PORT, QUERY_PORT

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_BROKER = "127.0.0.1:9092"
OTLP_URL = f"http://127.0.0.1:{OTLP_PORT}"


class CliSettings(BaseSettings):
    """Where the platform is and who asks; read from ``MILLRACE_*`` and ``TRACEPARENT``."""

    model_config = SettingsConfigDict(env_prefix="MILLRACE_", frozen=True, populate_by_name=True)

    home: Path = Field(Path(".millrace"), description="Directory that holds the state of the platform on this machine.")
    url: str = Field("", description="Base URL of the gateway; empty: what the platform in `home` says, else http://127.0.0.1:8080.")
    api_key: SecretStr | None = Field(None, description="Bearer key sent to the gateway.")
    kafka_bootstrap_servers: str = Field(
        "",
        validation_alias="KAFKA_BOOTSTRAP_SERVERS",
        description="Brokers to read the prediction log from; empty: what the platform in `home` says, else 127.0.0.1:9092.",
    )
    jaeger_url: str = Field("http://127.0.0.1:16686", description="Base URL of Jaeger's query API.")
    traceparent: str | None = Field(None, validation_alias="TRACEPARENT", description="W3C trace context that the command's span joins.")

    @property
    def gateway_url(self) -> str:
        """Base URL of the gateway, without a slash at the end."""
        return (self.url or str(self._platform().get("gateway") or DEFAULT_URL)).rstrip("/")

    @property
    def bootstrap_servers(self) -> str:
        """Brokers of the platform."""
        return self.kafka_bootstrap_servers or str(self._platform().get("bootstrap_servers") or DEFAULT_BROKER)

    @property
    def is_embedded(self) -> bool:
        """Whether the brokers are the embedded one."""
        return not self.kafka_bootstrap_servers and self._platform().get("broker") == "embedded"

    @property
    def collector(self) -> str:
        """OTLP endpoint that the platform in ``home`` sends its traces to; empty when it sends them nowhere."""
        said = str(self._platform().get("jaeger") or "")
        return OTLP_URL if said.endswith(f":{QUERY_PORT}") else said

    def _platform(self) -> dict[str, object]:
        try:
            said = json.loads((self.home / "run" / "platform.json").read_text())
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}
