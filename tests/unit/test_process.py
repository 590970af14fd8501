"""How a service process begins and ends."""

import logging

import pytest
from opentelemetry import trace
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.errors import ConfigurationError
from libs.metrics.server import MetricsServer
from libs.process import _metrics_server, run_service
from libs.settings import ProcessSettings, TelemetrySettings


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="EXAMPLE_")

    size: int = Field(1, ge=1, description="A number.")
    process: ProcessSettings = Field(default_factory=ProcessSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)


@pytest.fixture(autouse=True)
def untouched_globals(monkeypatch):
    """A service owns its process: it sets up logging and the tracer provider. A test gives both back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(trace, "set_tracer_provider", lambda _provider: None)
    yield
    root.handlers[:], root.level = handlers, level


def test_a_setting_out_of_bounds_is_named_in_one_sentence(monkeypatch):
    monkeypatch.setenv("EXAMPLE_SIZE", "0")
    with pytest.raises(SystemExit, match="example: the settings in the environment are not valid: size: Input should be greater than"):
        run_service("example", Settings, lambda _: [])


def test_a_service_that_must_not_start_says_why_in_one_sentence():
    def build(_settings):
        raise ConfigurationError("it listens on the moon")

    with pytest.raises(SystemExit, match="^example: it listens on the moon$"):
        run_service("example", Settings, build)


def test_a_bug_leaves_its_traceback():
    def build(_settings):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_service("example", Settings, build)


def test_a_service_with_a_port_for_it_shows_its_metrics():
    class Measured(Settings):
        metrics_port: int = 0

    (server,) = _metrics_server(Measured())
    assert isinstance(server, MetricsServer)
    assert _metrics_server(Settings()) == []


def test_readyz_asks_the_components_that_can_tell():
    class Measured(Settings):
        metrics_port: int = 0

    class Ready:
        def __init__(self, is_ready: bool) -> None:
            self.is_ready = lambda: is_ready

    (without,) = _metrics_server(Measured(), [object()])
    (one,) = _metrics_server(Measured(), [object(), Ready(True)])
    (two,) = _metrics_server(Measured(), [Ready(True), Ready(False)])
    assert without._is_ready is None
    assert (one._is_ready(), two._is_ready()) == (True, False)
