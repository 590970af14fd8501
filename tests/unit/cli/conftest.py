from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from opentelemetry.sdk.trace import TracerProvider

from libs.cli.__main__ import main
from tests.unit.cli.gateway import FakeGateway


@dataclass(frozen=True)
class Outcome:
    """What the shell sees of a command."""

    exit_code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    fake = FakeGateway()
    monkeypatch.setenv("MILLRACE_URL", fake.url)
    yield fake
    fake.close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, without touching the process's logging and tracing."""
    monkeypatch.setattr("libs.cli.session.trace_provider", lambda settings: TracerProvider())
    for name in ("TRACEPARENT", "MILLRACE_API_KEY", "MILLRACE_JAEGER_URL", "MILLRACE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def run_command(*arguments: object) -> Outcome:
        exit_code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(exit_code, captured.out, captured.err)

    return run_command


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for the state at once when there are no events, instead of after a second."""
    monkeypatch.setattr("libs.cli.stages.REFRESH_S", 0.01)
    monkeypatch.setattr("libs.cli.stages.GATEWAY_RETRY_S", 0.01)
