"""Which requests are traced."""

import pytest
from opentelemetry.sdk.trace import TracerProvider

from libs import telemetry
from services.gateway.tracing import Tracing

SAMPLED = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LATER = b"cc" + SAMPLED[2:] + b"-more"
TWO = [SAMPLED + b", " + SAMPLED, LATER + b", " + SAMPLED]


@pytest.fixture(autouse=True)
def tracer(monkeypatch):
    made = TracerProvider().get_tracer("test")
    monkeypatch.setattr(telemetry, "tracer", lambda: made)


@pytest.mark.parametrize("broken", [b"", b"nonsense", b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01", SAMPLED[:-4], b"\xff" + SAMPLED, *TWO])
def test_a_broken_traceparent_decides_nothing(broken):
    assert Tracing(0.1, lambda: 0.5).begin("POST", broken, {}) is None
    span = Tracing(0.1, lambda: 0.05).begin("POST", broken, {})
    assert span is not None
    assert span.parent is None


def test_a_caller_that_traces_is_followed():
    span = Tracing(0.0).begin("POST", SAMPLED, {})
    assert span is not None
    assert format(span.get_span_context().trace_id, "032x") == SAMPLED[3:35].decode()


def test_without_a_caller_that_traces_the_ratio_decides():
    assert Tracing(0.1, lambda: 0.05).wants(None)
    assert not Tracing(0.1, lambda: 0.5).wants(None)
