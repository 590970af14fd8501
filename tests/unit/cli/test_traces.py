from typing import Any

import pytest

from libs.cli.traces import Span, tree
from tests.unit.cli.conftest import Run
from tests.unit.cli.gateway import FakeGateway

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def jaeger(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, run: Run) -> FakeGateway:
    """A Jaeger (at the gateway's address) that knows one trace."""
    monkeypatch.setenv("MILLRACE_JAEGER_URL", gateway.url)
    parent = {"refType": "CHILD_OF", "traceID": TRACE, "spanID": "a"}
    link = {"refType": "FOLLOWS_FROM", "traceID": "f" * 32, "spanID": "z"}
    failed = [{"key": "error", "value": True}, {"key": "otel.status_description", "value": "no row"}]
    spans: list[dict[str, Any]] = [
        {"spanID": "b", "operationName": "predict", "processID": "p2", "references": [parent], "startTime": 1_500, "duration": 500},
        {"spanID": "a", "operationName": "POST", "processID": "p1", "references": [link], "startTime": 1_000, "duration": 2_000},
    ]
    spans = [{**spans[0], "traceID": TRACE, "tags": failed}, {**spans[1], "traceID": TRACE}]
    processes = {"p1": {"serviceName": "millrace-gateway"}, "p2": {"serviceName": "millrace-runner"}}
    gateway.on("GET", f"/api/traces/{TRACE}", {"data": [{"traceID": TRACE, "spans": spans, "processes": processes}]})
    gateway.on("GET", "/api/services", {"data": ["millrace-gateway"]})
    gateway.on("GET", "/api/traces", {"data": []})
    gateway.on("GET", "/api/v1/events", {"events": []})
    return gateway


def test_a_trace_is_a_tree_with_times_links_and_errors(jaeger: FakeGateway, run: Run) -> None:
    assert run("trace", TRACE.upper()).out.splitlines() == [
        f"trace {TRACE}",
        f"  millrace-gateway: POST  [+0.0 ms, 2.0 ms]  linked to trace {'f' * 32}",
        "  └─ millrace-runner: predict  [+0.5 ms, 0.5 ms]  ERROR no row",
    ]


def test_a_trace_is_found_by_the_events_of_an_operation(jaeger: FakeGateway, run: Run) -> None:
    jaeger.on("GET", "/api/v1/events", {"events": [{"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}]})
    assert run("trace", "op-1").exit_code == 0
    assert jaeger.sent("GET", "/api/v1/events").query == {"correlation_id": "op-1", "follow": "false"}


def test_a_trace_is_found_by_a_request_id_that_a_span_carries(jaeger: FakeGateway, run: Run) -> None:
    jaeger.on("GET", "/api/traces", lambda request: (200, {"data": [{"traceID": TRACE}] if "r-1" in request.query["tags"] else []}))
    assert run("trace", "r-1").exit_code == 0


@pytest.mark.parametrize("identity", ["r-2", "b" * 32])
def test_an_id_that_nobody_knows_is_said(jaeger: FakeGateway, run: Run, identity: str) -> None:
    assert run("trace", identity).err.startswith(f"millrace: nothing is known of '{identity}'")


def test_a_request_id_that_looks_like_a_trace_id_is_found(jaeger: FakeGateway, run: Run) -> None:
    identity = "b" * 32
    jaeger.on("GET", "/api/traces", lambda request: (200, {"data": [{"traceID": TRACE}] if identity in request.query["tags"] else []}))
    assert run("trace", identity).out.startswith(f"trace {TRACE}")


def test_a_trace_whose_spans_are_gone_is_said(jaeger: FakeGateway, run: Run) -> None:
    jaeger.on("GET", "/api/v1/events", {"events": [{"traceparent": f"00-{'c' * 32}-b7ad6b7169203331-01"}]})
    assert f"has no trace {'c' * 32}" in run("trace", "op-1").err


def test_without_jaeger_it_says_how_to_get_one(gateway: FakeGateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_JAEGER_URL", "http://127.0.0.1:9")
    assert run("trace", TRACE).err == (
        "millrace: no Jaeger answers at http://127.0.0.1:9; put `jaeger` on PATH before `millrace up`, or set MILLRACE_JAEGER_URL\n"
    )


def test_spans_whose_parent_is_missing_are_shown_at_the_root() -> None:
    spans = [Span("b", "gone", "s", "late", 2.0, 1.0, None), Span("a", None, "s", "early", 1.0, 0.5, None)]
    assert list(tree(spans)) == ["  s: early  [+0.0 ms, 500 ms]", "  s: late  [+1.0 s, 1.0 s]"]
