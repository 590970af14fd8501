"""Counting, adding up, and what Prometheus reads."""

import asyncio
import json
import re

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from libs.metrics import PROCESS, Metrics
from libs.metrics import definitions as metric
from libs.metrics.definitions import METRICS, Kind
from libs.metrics.exposition import Exposition, of
from libs.metrics.instruments import as_document, from_document, summed
from libs.metrics.reference import PAGE, with_table
from libs.metrics.server import MetricsServer


def filled() -> Metrics:
    metrics = Metrics()
    metrics.counter(metric.REQUESTS_ACCEPTED, "e", "v1").value += 3
    metrics.gauge(metric.LOG_AVAILABLE).value = 1
    for value in (0.0005, 0.3, 1e9):
        metrics.histogram(metric.REQUEST_SECONDS, "e", "m", "1").observe(value)
    metrics.watch(metric.REQUESTS_QUEUED, lambda: [(("e", "m", "1"), 7.0)])
    return metrics


def value(text, name, **labels):
    samples = [sample for family in parse(text) for sample in family.samples]
    (found,) = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
    return found


def test_prometheus_reads_what_was_counted():
    body, content_type = of(filled()).render("text/plain")
    text = body.decode()
    assert content_type.startswith("text/plain; version=0.0.4")
    assert value(text, "millrace_requests_accepted_total", endpoint="e", protocol="v1") == 3
    assert value(text, "millrace_requests_queued", endpoint="e") == 7
    assert value(text, "millrace_request_seconds_bucket", le="0.0005") == 1
    assert value(text, "millrace_request_seconds_bucket", le="0.5") == 2
    assert value(text, "millrace_request_seconds_count") == 3
    assert value(text, "process_open_fds") > 0


def test_openmetrics_is_given_to_whoever_accepts_it():
    body, content_type = of(filled()).render("application/openmetrics-text; version=1.0.0, text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text")
    assert {family.name for family in parse_openmetrics(body.decode())} > {"millrace_requests_accepted", "millrace_request_seconds"}


def test_parts_of_a_process_are_added_up():
    total = {(sample.metric.name, sample.labels): sample for sample in summed([filled().samples(), filled().samples()])}
    assert total["millrace_requests_accepted_total", ("e", "v1")].value == 6
    assert sum(total["millrace_request_seconds", ("e", "m", "1")].counts) == 6


def test_each_process_of_a_service_has_its_own_series(monkeypatch):
    document = json.loads(json.dumps(as_document(filled().samples())))
    monkeypatch.setattr(PROCESS, "worker", "0")
    text = Exposition(filled().samples, lambda: from_document(document, "1")).render("")[0].decode()
    for worker in ("0", "1"):
        assert value(text, "millrace_requests_accepted_total", endpoint="e", worker=worker) == 3
        assert value(text, "millrace_log_available", worker=worker) == 1
        assert value(text, "millrace_request_seconds_bucket", le="0.5", worker=worker) == 2
    assert value(text, "process_open_fds", worker="0") > 0


def test_the_only_process_of_a_service_has_no_label():
    assert "worker=" not in of(filled()).render("")[0].decode()


def test_what_another_version_counts_is_left_out():
    assert from_document([["millrace_unknown_total", [], 1, []], ["millrace_request_seconds", ["e", "m", "1"], 1.0, [1, 2]]], "1") == []


def test_what_is_put_off_is_done_before_reading():
    metrics = Metrics()
    metrics.before_reading(lambda: setattr(metrics.counter(metric.LOG_RECORDS), "value", 5))
    assert [sample.value for sample in metrics.samples()] == [5]


def test_a_metric_is_used_as_it_is_defined():
    with pytest.raises(TypeError, match="is a counter, not a gauge"):
        Metrics().gauge(metric.LOG_RECORDS)
    with pytest.raises(TypeError, match="has the labels"):
        Metrics().counter(metric.REQUESTS_ACCEPTED, "e")


@pytest.mark.parametrize("each", METRICS, ids=lambda each: each.name)
def test_names_say_kind_and_unit(each):
    assert re.fullmatch(r"millrace_[a-z_]+", each.name)
    assert each.name.endswith("_total") == (each.kind is Kind.COUNTER)
    assert each.meaning.endswith(".")
    assert list(each.buckets) == sorted(set(each.buckets))


def test_names_are_unique():
    assert len({each.name for each in METRICS}) == len(METRICS)


def test_the_page_has_every_metric():
    assert PAGE.read_text() == with_table(PAGE.read_text()), "run `make schemas`"


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.fixture
async def server(unused_tcp_port):
    made = MetricsServer(of(filled()), "127.0.0.1", unused_tcp_port)
    await made.start()
    yield made
    await made.stop()


async def test_a_small_server_answers_scrapes(server):
    answer = await ask(server.bound_port, b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"millrace_requests_accepted_total" in body
    assert f"content-length: {len(body)}".encode() in head


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"POST /metrics", b"405"), (b"GET /", b"404"), (b"GET /readyz", b"404"), (b"GET /metrics?x=1", b"200"), (b"nonsense", b"404")],
)
async def test_it_answers_nothing_else(server, request_line, status):
    answer = await ask(server.bound_port, request_line + b" HTTP/1.1\r\n\r\n")
    assert answer.split(b" ", 2)[1] == status


@pytest.mark.parametrize(("is_ready", "status"), [(True, b"200 OK"), (False, b"503 Service Unavailable")])
async def test_a_service_that_can_tell_says_whether_it_is_ready(unused_tcp_port, is_ready, status):
    made = MetricsServer(of(filled()), "127.0.0.1", unused_tcp_port, lambda: is_ready)
    await made.start()
    answer = await ask(made.bound_port, b"GET /readyz HTTP/1.1\r\n\r\n")
    refused = await ask(made.bound_port, b"POST /readyz HTTP/1.1\r\n\r\n")
    await made.stop()
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert answer.endswith(b'{"ready": true}' if is_ready else b'{"ready": false}')
    assert refused.startswith(b"HTTP/1.1 405")


async def test_an_endless_head_is_cut(server):
    assert await ask(server.bound_port, b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 10_000) == b""


async def test_a_taken_port_does_not_keep_a_service_from_starting(server, caplog):
    second = MetricsServer(of(filled()), "127.0.0.1", server.bound_port)
    await second.start()
    await second.stop()
    assert second.bound_port == 0
    assert "metrics are not served" in caplog.text
