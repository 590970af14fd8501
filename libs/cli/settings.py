"""What the command line reads from its environment."""

import json
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_URL = "http://127.0.0.1:8080"


class CliSettings(BaseSettings):
    """Where the platform is and who asks; read from ``MILLRACE_*`` and ``TRACEPARENT``."""

    model_config = SettingsConfigDict(env_prefix="MILLRACE_", frozen=True, populate_by_name=True)

    home: Path = Field(Path(".millrace"), description="Directory that holds the state of the platform on this machine.")
    url: str = Field("", description="Base URL of the gateway; empty: what the platform in `home` says, else http://127.0.0.1:8080.")
    api_key: SecretStr | None = Field(None, description="Bearer key sent to the gateway.")
    jaeger_url: str = Field("http://127.0.0.1:16686", description="Base URL of Jaeger's query API.")
    traceparent: str | None = Field(None, validation_alias="TRACEPARENT", description="W3C trace context that the command's span joins.")

    @property
    def gateway_url(self) -> str:
        """Base URL of the gateway, without a slash at the end."""
        return (self.url or str(self.platform().get("url") or DEFAULT_URL)).rstrip("/")

    def platform(self) -> dict[str, object]:
        """What the platform running in ``home`` says of itself; empty when none runs there."""
        try:
            said = json.loads((self.home / "run" / "platform.json").read_text())
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}
