"""The whole platform on a real Kafka with a real Jaeger."""

import base64
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import zipfile
from typing import Any

import httpx
import numpy as np
import pytest
from confluent_kafka import KafkaError, KafkaException, Producer

from schemas.registry import ArchiveVersion, CommandRefused, CreateEndpoint
from schemas.topics import COMMANDS
from tests.e2e.platforms import PATIENT_GATEWAY, RunningPlatform, cancer_model, dumped, samples
from tests.integration.servers import JaegerServer, run_jaeger

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory):
    with run_jaeger(tmp_path_factory.mktemp("jaeger")) as server:
        yield server


@pytest.fixture(scope="module")
def platform(tmp_path_factory, jaeger: JaegerServer):
    home = tmp_path_factory.mktemp("mr") / "home"
    running = RunningPlatform(home, "kafka", OTEL_EXPORTER_OTLP_ENDPOINT=jaeger.otlp_http, **PATIENT_GATEWAY)
    running.up()
    try:
        yield running
    finally:
        running.down()
        running.close()
        assert running.processes() == []


@pytest.fixture(scope="module")
def cancer(platform, tmp_path_factory):
    """The model ``cancer``, uploaded and served; its trace id and the local model."""
    folder = tmp_path_factory.mktemp("cancer")
    model = cancer_model()
    path = folder / "cancer.joblib"
    dumped(model, path)
    example = folder / "example.json"
    example.write_text(json.dumps({"instances": samples()[:2].tolist()}))
    trace_id = os.urandom(16).hex()
    platform.environment["TRACEPARENT"] = f"00-{trace_id}-{os.urandom(8).hex()}-01"
    platform.cli("models", "upload", str(path), "--name", "cancer", "--example", str(example), "--wait")
    platform.serve("cancer")
    del platform.environment["TRACEPARENT"]
    return model, trace_id


def test_predictions_over_v1_and_v2_equal_the_local_models_to_the_last_bit(platform, cancer):
    model, _ = cancer
    rows = samples()
    answer = platform.http.post("/v1/models/cancer:predict", json={"instances": rows.tolist()})
    assert answer.json()["predictions"] == model.predict(rows).tolist()
    assert answer.headers["x-millrace-model-version"] == "cancer@1"
    tensor = {"name": "input", "shape": list(rows.shape), "datatype": "FP64", "data": rows.ravel().tolist()}
    body = {"inputs": [tensor], "outputs": [{"name": "predict_proba"}]}
    (output,) = platform.http.post("/v2/models/cancer/infer", json=body).json()["outputs"]
    assert np.array_equal(np.array(output["data"]).reshape(output["shape"]), model.predict_proba(rows))


def test_one_trace_leads_from_the_upload_to_ready(platform, cancer, jaeger):
    _, trace_id = cancer
    wanted = {f"millrace-{name}" for name in ("cli", "gateway", "registry", "validator", "builder", "serving")}
    services: set[str] = set()
    orphans: list[str] = []
    end = time.monotonic() + 120  # every process exports its spans in its own time
    while time.monotonic() < end:
        trace = jaeger.trace(trace_id, spans=10, timeout_s=60)
        services = {process["serviceName"] for process in trace["processes"].values()}
        orphans = _orphans(trace)
        if wanted <= services and len(orphans) <= 3:  # the three commands' parent is this test
            return
        time.sleep(1)
    raise AssertionError(f"services in the trace: {services}; spans whose parent is not in it: {orphans}")


def _orphans(trace):
    ids = {span["spanID"] for span in trace["spans"]}
    return [
        span["operationName"]
        for span in trace["spans"]
        if span["references"] and not any(ref["spanID"] in ids for ref in span["references"])
    ]


def test_one_predict_trace_leads_from_the_gateway_into_the_runner(platform, cancer, jaeger):
    trace_id = os.urandom(16).hex()
    headers = {"traceparent": f"00-{trace_id}-{os.urandom(8).hex()}-01"}
    platform.http.post("/v1/models/cancer:predict", json={"instances": samples()[:1].tolist()}, headers=headers).raise_for_status()
    trace = jaeger.trace(trace_id, spans=2, timeout_s=60)
    by_service = {trace["processes"][span["processID"]]["serviceName"]: span for span in trace["spans"]}
    assert set(by_service) == {"millrace-gateway", "millrace-runner"}
    (parent,) = by_service["millrace-runner"]["references"]
    assert parent["spanID"] == by_service["millrace-gateway"]["spanID"]


@pytest.mark.parametrize("service", ["registry", "validator", "builder", "gateway", "serving"])
def test_a_service_killed_in_the_middle_of_an_upload_is_restarted_and_the_version_becomes_ready(platform, cancer, service, tmp_path):
    name = f"killed-{service}"
    content = dumped(cancer_model(2.0 + len(service)), tmp_path / "m.joblib")
    pid = platform.pid_of(service)
    platform.upload(content, name, example={"instances": samples()[:1].tolist()})
    os.kill(pid, signal.SIGKILL)
    platform.version_when(name, "validated")
    platform.cli("endpoints", "create", name)
    command = [sys.executable, "-m", "libs.cli", "endpoints", "deploy", name, "--model", name, "--wait"]
    with subprocess.Popen(command, env=platform.environment) as deploying:
        if service == "serving":
            os.kill(platform.pid_of("serving"), signal.SIGKILL)
        assert deploying.wait(300) == 0
    answer = platform.http.post(f"/v1/models/{name}:predict", json={"instances": samples()[:3].tolist()})
    assert answer.status_code == 200, answer.text
    platform.cli("endpoints", "delete", name, "--force")


def test_a_killed_runner_is_restarted_and_no_request_fails(platform, cancer):
    (runner,) = platform.runners("cancer")
    runner.kill()
    for _ in range(20):
        answer = platform.http.post("/v1/models/cancer:predict", json={"instances": samples()[:1].tolist()})
        assert answer.status_code == 200, answer.text
        time.sleep(0.1)


class OpensASocket:
    def __reduce__(self):
        return (socket.create_connection, (("127.0.0.1", 9),))


def _truncated_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.joblib", os.urandom(2000))
    return buffer.getvalue()[:-400]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("zip", _truncated_zip(), "truncated"),
        ("text", b"this is not a model\n" * 10, "text"),
        ("socket", pickle.dumps(OpensASocket()), "socket"),
        ("half", pickle.dumps(list(range(1000)))[:-50], "truncated"),
    ],
)
def test_a_file_that_is_no_model_is_rejected_with_a_clear_reason(platform, name, content, word):
    answer = platform.upload(content, f"bad-{name}")
    if answer.status_code < 300:
        view = platform.version_when(f"bad-{name}", "rejected")
        assert word in view["reason"].lower()
        assert view["stage_times"].keys() == {"registered", "rejected"}, "nothing was built"
    else:
        assert word in answer.json()["error"].lower()
    assert platform.is_ready()


def test_an_empty_file_is_refused(platform):
    answer = platform.http.post("/api/v1/artifacts", params={"filename": "m"}, content=b"")
    assert (answer.status_code, answer.json()) == (400, {"error": "the artifact is empty"})


def test_a_wrong_digest_is_refused_and_nothing_is_stored(platform):
    answer = platform.http.post("/api/v1/artifacts", params={"filename": "m"}, content=b"abc", headers={"x-millrace-sha256": "0" * 64})
    assert answer.status_code == 400
    assert "0000" in answer.json()["error"]


@pytest.mark.parametrize(
    ("name", "requirements", "status", "word"),
    [
        ("no-sklearn", ["numpy"], "rejected", "sklearn"),
        ("conflict", ["scikit-learn==1.9.1", "numpy<1.20"], "build_failed", "numpy"),
        ("unknown", ["this-package-does-not-exist-millrace"], "build_failed", "this-package-does-not-exist-millrace"),
    ],
)
def test_requirements_that_do_not_do_are_named(platform, tmp_path, name, requirements, status, word):
    content = dumped(cancer_model(), tmp_path / "m.joblib")
    platform.upload(content, f"req-{name}", requirements=requirements)
    view = platform.version_when(f"req-{name}", status)
    assert word in view["reason"]


def test_an_example_that_does_not_fit_is_the_reason(platform, tmp_path):
    content = dumped(cancer_model(), tmp_path / "m.joblib")
    platform.upload(content, "bad-example", example={"instances": [[1, 2, 3]]})
    assert "30" in platform.version_when("bad-example", "rejected")["reason"]


@pytest.mark.parametrize(
    "name",
    ["..", "a%2Fb", "%C3%A9t%C3%A9", "x" * 300, "-a", "a b"],
)
def test_names_that_are_none_are_refused_by_rule(platform, name):
    answer = platform.http.post(
        f"/api/v1/models/{name}/versions", json={"artifact": {"sha256": "0" * 64, "size_bytes": 1, "filename": "m"}}
    )
    assert answer.status_code in (400, 404)
    assert answer.json().keys() == {"error"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/models/unknown"),
        ("GET", "/api/v1/models/cancer/versions/99"),
        ("GET", "/api/v1/endpoints/unknown"),
        ("POST", "/v1/models/unknown:predict"),
        ("POST", "/v2/models/cancer/versions/99/infer"),
    ],
)
def test_what_does_not_exist_is_404(platform, cancer, method, path):
    answer = platform.http.request(method, path, json={"instances": [[0.0] * 30]} if method == "POST" else None)
    assert (answer.status_code, list(answer.json())) == (404, ["error"])


def test_an_endpoint_under_traffic_is_not_deleted(platform, cancer):
    answer = platform.http.delete("/api/v1/endpoints/cancer")
    assert answer.status_code == 409
    assert "traffic" in answer.json()["error"]
    assert platform.http.post("/v1/models/cancer:predict", json={"instances": samples()[:1].tolist()}).status_code == 200


def test_a_version_that_is_not_built_cannot_be_deployed(platform, cancer, tmp_path):
    platform.upload(b"text\n" * 9, "never")
    platform.version_when("never", "rejected")
    answer = platform.http.post("/api/v1/endpoints/cancer/deployments", json={"model": "never", "version": 1})
    assert answer.status_code == 409
    assert "rejected" in answer.json()["error"]


class AnyKafkaClient:
    """Another program, which puts on the topic of commands whatever it likes."""

    def __init__(self, servers: str) -> None:
        self._producer = Producer({"bootstrap.servers": servers, "message.max.bytes": 20_000_000, "log_level": 0})

    def command(self, value: bytes, headers: dict[str, bytes]) -> int:
        """Send a record; the offset at which it stands. Raises what the broker refuses it with."""
        told: list[tuple[KafkaError | None, int | None]] = []
        self._producer.produce(
            COMMANDS.name, value, headers=list(headers.items()), on_delivery=lambda error, sent: told.append((error, sent.offset()))
        )
        assert self._producer.flush(120) == 0
        ((error, offset),) = told
        if error is not None:
            raise KafkaException(error)
        assert offset is not None
        return offset


def cloudevent(event_type: str, event_id: str) -> dict[str, bytes]:
    return {"ce_specversion": b"1.0", "ce_id": event_id.encode(), "ce_type": event_type.encode(), "ce_source": b"/somebody"}


def test_commands_that_are_none_are_answered_and_change_nothing(platform, cancer):
    value, create = b'{"endpoint_name": "never-made"}', CreateEndpoint.event_type
    bad = [
        (value, cloudevent(create.replace("create", "paint"), "unknown"), "no contract has the event type"),
        (b'{"name": "never-made"}', cloudevent(create, "missing"), "endpoint_name: Field required"),
        (value, cloudevent(create.replace(".v1", ".v9"), "version"), f"is not a known version of this event; known: {create}"),
        (value, {}, "it has no ce_ headers"),
        (value, {"\x01" * 200_000: b""}, "it has no ce_ headers"),  # as JSON its name does not fit into a record
    ]
    before = restarts(platform), registered(platform)
    client = AnyKafkaClient(f"127.0.0.1:{platform.kafka_port}")
    with pytest.raises(KafkaException) as refused:
        client.command(b"x" * 10_000_000, cloudevent(create, "huge"))
    assert refused.value.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE
    offsets = [client.command(value, headers) for value, headers, _ in bad]
    client.command(b'{"model_name": "never-made", "version": 1}', cloudevent(ArchiveVersion.event_type, "understood"))

    letters = dead_letters_when(platform, offsets)
    for letter, (value, _, cause) in zip(letters, bad, strict=True):
        assert cause in letter["cause"]
        assert letter["consumer"] == "registry"
        assert letter["value_truncated"] or base64.b64decode(letter["value_base64"]) == value
    assert [letter["value_truncated"] for letter in letters] == [False, False, False, False, True]
    operation = answered_operation(platform, "understood")
    assert operation["outcome"]["type"] == CommandRefused.event_type
    assert "never-made" in operation["error"]

    assert platform.is_ready()
    assert (restarts(platform), registered(platform)) == before
    platform.cli("endpoints", "create", "made-afterwards")
    platform.cli("endpoints", "delete", "made-afterwards")


def restarts(platform: RunningPlatform) -> dict[str, tuple[str, int]]:
    return {part["name"]: (part["state"], part["restarts"]) for part in platform.status()["parts"]}


def registered(platform: RunningPlatform) -> list[object]:
    """What is registered, without what replicas do by themselves."""
    models = platform.http.get("/api/v1/models").json()
    endpoints = platform.http.get("/api/v1/endpoints").json()["endpoints"]
    return [models, [(endpoint["endpoint_name"], endpoint["traffic"], endpoint["deployment_ids"]) for endpoint in endpoints]]


def dead_letters_when(platform: RunningPlatform, offsets: list[int]) -> list[dict[str, Any]]:
    """The dead letters of the commands at these offsets, whole, once all are there."""
    end = time.monotonic() + 120
    while True:
        listed = platform.http.get("/api/v1/dead-letters").json()["dead_letters"]
        ids = {letter["origin_offset"]: letter["id"] for letter in listed if letter["origin_topic"] == COMMANDS.name}
        if ids.keys() >= {*offsets}:
            return [platform.http.get(f"/api/v1/dead-letters/{ids[offset]}").json() for offset in offsets]
        assert time.monotonic() < end, listed
        time.sleep(0.2)


def answered_operation(platform: RunningPlatform, command_id: str) -> dict[str, Any]:
    """What became of a command, once it is known."""
    end = time.monotonic() + 120
    while not (view := platform.http.get(f"/api/v1/operations/{command_id}").json()).get("done"):
        assert time.monotonic() < end, view
        time.sleep(0.2)
    return view


def test_everything_is_back_after_down_and_up(platform, cancer):
    before = platform.http.get("/api/v1/endpoints/cancer").json()["traffic"]
    platform.down()
    assert platform.processes() == []
    with pytest.raises(httpx.TransportError):
        platform.is_ready()
    platform.up()
    assert platform.http.get("/api/v1/endpoints/cancer").json()["traffic"] == before
    end = time.monotonic() + 180
    while (answer := platform.http.post("/v1/models/cancer:predict", json={"instances": samples()[:1].tolist()})).status_code != 200:
        assert time.monotonic() < end, answer.text
        time.sleep(0.5)


def test_a_second_up_says_that_it_runs_already(platform):
    done = platform.cli("up", "--detach", check=False)
    assert done.returncode != 0
    assert "already running" in done.stderr
