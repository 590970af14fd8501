"""The demo must notice when a promise does not hold; here a serving side of a few lines breaks them one by one."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from libs.cli import demo
from libs.cli.client import Client
from libs.cli.demo import StepFailedError, Trained
from libs.cli.plain_kafka import PlainKafka
from libs.cli.traces import Span
from libs.local.embedded import MockCluster
from libs.local.settings import LocalSettings
from schemas.topics import inference_requests, inference_results
from tests.unit.cli.gateway import FakeGateway

REQUESTS, RESULTS = inference_requests(demo.ENDPOINT), inference_results(demo.ENDPOINT)

Result = dict[str, Any]
Serve = Callable[[Result], list[Result]]
"""From the right result of a request to the results that are published."""


@pytest.fixture(scope="module")
def trained() -> Trained:
    samples = np.array([[float(number)] * 30 for number in range(4)])
    model = make_pipeline(LogisticRegression()).fit(samples, [0, 0, 1, 1])
    return Trained(model, samples, model.predict(samples).tolist(), model.predict_proba(samples).tolist())


@pytest.fixture
def servers() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = MockCluster(port, {topic.name: topic.partitions for topic in (REQUESTS, RESULTS)})
    yield f"127.0.0.1:{port}"
    cluster.close()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STREAMED_RECORDS": 8, "RESULT_TIMEOUT_S": 3.0, "SURPLUS_S": 0.5}.items():
        monkeypatch.setattr(demo, name, value)


@contextmanager
def serving(servers: str, trained: Trained, serve: Serve) -> Iterator[PlainKafka]:
    """Answer requests, in a thread, as ``serve`` says."""
    done = threading.Event()
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "serving"})
    consumer.assign([TopicPartition(REQUESTS.name, partition, 0) for partition in range(REQUESTS.partitions)])
    producer = Producer({"bootstrap.servers": servers})

    def work() -> None:
        while not done.is_set():
            record = consumer.poll(0.02)
            if record is None or record.error():
                continue
            request_id = (record.key() or b"").decode()
            request = json.loads(record.value() or b"")
            ask = trained.model.predict_proba if request.get("outputs") == ["predict_proba"] else trained.model.predict
            predictions = ask(request["instances"]).tolist()
            right = {"request_id": request_id, "endpoint_name": demo.ENDPOINT, "status": "completed", "predictions": predictions}
            for result in serve(right):
                producer.produce(RESULTS.name, key=request_id, value=json.dumps(result), headers={"ce_correlationid": request_id})
            producer.poll(0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield PlainKafka(servers)
    finally:
        done.set()
        thread.join()
        consumer.close()


def test_a_stream_that_is_answered_once_each_holds(servers: str, trained: Trained) -> None:
    with serving(servers, trained, lambda right: [right]) as kafka:
        demo.check_stream(kafka, trained)
        demo.check_cloudevent(kafka, trained)


@pytest.mark.parametrize(
    ("serve", "sentence"),
    [
        (lambda right: [right, right], "answered more than once"),
        (lambda right: [], "8 of 8 records were not answered"),
        (lambda right: [{**right, "predictions": [7]}], "differ from what the model says"),
        (lambda right: [{**right, "status": "failed", "predictions": None, "error": "no runner"}], "failed: no runner"),
    ],
)
def test_a_stream_that_breaks_a_promise_fails_the_step(servers: str, trained: Trained, serve: Serve, sentence: str) -> None:
    with serving(servers, trained, serve) as kafka, pytest.raises(StepFailedError, match=sentence):
        demo.check_stream(kafka, trained)


def version() -> dict[str, Any]:
    return {"signature": {"inputs": [{"name": "input"}]}}


def answers(gateway: FakeGateway, trained: Trained, *, nudge: float) -> Client:
    gateway.on("POST", "/v1/models/cancer:predict", {"predictions": trained.labels})
    probabilities = [value + nudge for row in trained.probabilities for value in row]
    outputs = [{"name": "predict", "data": trained.labels}, {"name": "predict_proba", "data": probabilities}]
    gateway.on("POST", "/v2/models/cancer/infer", {"outputs": outputs})
    return Client(gateway.url)


def test_equal_answers_hold(gateway: FakeGateway, trained: Trained) -> None:
    with answers(gateway, trained, nudge=0.0) as client:
        demo.check_v1(client, trained)
        demo.check_v2(client, trained, version())


class Traces:
    """Knows of every trace the same: one span of each of these services."""

    def __init__(self, *services: str) -> None:
        self._services = services

    def spans_so_far(self, trace_id: str) -> list[Span]:
        return [Span(name, None, f"millrace-{name}", "predict", 0.0, 1.0, None) for name in self._services]


def test_a_trace_is_printed_span_by_span(gateway: FakeGateway, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    with answers(gateway, trained, nudge=0.0) as client:
        demo.show_trace(client, Traces("cli", "gateway", "runner"), trained)
    assert "millrace-runner: predict" in capsys.readouterr().out


def test_a_trace_without_a_span_of_the_runner_fails_the_step(
    gateway: FakeGateway, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TRACE_TIMEOUT_S", 0.0)
    with (
        answers(gateway, trained, nudge=0.0) as client,
        pytest.raises(StepFailedError, match="has no span of millrace-runner, "),
    ):
        demo.show_trace(client, Traces("cli", "gateway"), trained)


@pytest.mark.parametrize(
    ("on_path", "given", "keep", "used"),
    [("", "", False, True), ("/bin/jaeger", "", False, False), ("", "http://collector", False, False), ("", "", True, False)],
)
def test_spans_come_here_when_nobody_else_takes_them_and_we_stay(
    on_path: str, given: str, keep: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.cli.demo.shutil.which", lambda name: on_path or None)
    settings = LocalSettings(otlp_endpoint=given)
    assert demo.sending_to("http://here", settings, keep=keep).otlp_endpoint == ("http://here" if used else given)


def test_a_difference_in_the_last_bits_fails_the_step(gateway: FakeGateway, trained: Trained) -> None:
    with answers(gateway, trained, nudge=1e-15) as client, pytest.raises(StepFailedError, match="V2 probabilities differ"):
        demo.check_v2(client, trained, version())
