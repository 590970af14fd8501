import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.gateway import FakeGateway

V1 = "/v1/models/cancer:predict"
V2 = "/v2/models/cancer/infer"
ANSWERED = {"x-millrace-model-version": "cancer@1", "x-request-id": "r-1"}


def test_predict_prints_the_answer_byte_for_byte(gateway: FakeGateway, run: Run) -> None:
    gateway.on("POST", V1, b'{"predictions": [0.1000000000000000055]}', headers=ANSWERED)
    outcome = run("predict", "cancer", "--data", '{"instances": [[1.0]]}')
    assert (outcome.exit_code, outcome.out) == (0, '{"predictions": [0.1000000000000000055]}\n')
    assert outcome.err.startswith("answered by cancer@1, trace ")
    assert gateway.sent("POST", V1).body == b'{"instances": [[1.0]]}'


def test_predict_sends_inputs_to_the_v2_door(gateway: FakeGateway, run: Run, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"inputs": []}')
    gateway.on("POST", V2, {"outputs": []}, headers=ANSWERED)
    shown = json.loads(run("predict", "cancer", "--json-request", tmp_path / "request.json", "--json").out)
    assert (shown["answer"], shown["model_version"], shown["request_id"]) == ({"outputs": []}, "cancer@1", "r-1")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        ((), 2, "give the request with either --json-request FILE or --data JSON"),
        (("--data", "{}", "--json-request", "x"), 2, "give the request with either --json-request FILE or --data JSON"),
        (("--json-request", "nowhere.json"), 1, "nowhere.json cannot be read: No such file or directory"),
        (("--data", "{"), 1, "the request is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_an_unusable_request_is_not_sent(gateway: FakeGateway, run: Run, arguments: tuple[str, ...], exit_code: int, sentence: str) -> None:
    outcome = run("predict", "cancer", *arguments)
    assert (outcome.exit_code, outcome.err) == (exit_code, f"millrace: {sentence}\n")
    assert gateway.requests == []


def test_nobody_at_the_address_says_how_to_start_the_platform(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("MILLRACE_URL", url)
        outcome = run("models", "list")
    assert (outcome.exit_code, outcome.out) == (1, "")
    assert outcome.err == f"millrace: the platform does not answer at {url}; start it with: millrace up\n"


def test_an_address_that_is_none_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_URL", "gateway:8080")
    outcome = run("models", "list")
    assert outcome.exit_code == 1
    assert outcome.err.startswith("millrace: MILLRACE_URL 'gateway:8080' is not a usable address")
    assert outcome.err.count("\n") == 1


def test_something_else_at_the_address_is_not_mistaken_for_a_gateway(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", "/api/v1/models", b"<html>hello</html>")
    assert "is not a Millrace gateway" in run("models", "list").err


def test_an_error_without_a_sentence_is_told_by_its_status(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", "/api/v1/models", b"<html>", status=502)
    assert run("models", "list").err == "millrace: GET /api/v1/models was answered with 502 Bad Gateway\n"


def test_the_address_comes_from_the_platform_at_home(
    gateway: FakeGateway, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "platform.json").write_text(json.dumps({"gateway": gateway.url}))
    monkeypatch.delenv("MILLRACE_URL")
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path))
    gateway.on("GET", "/api/v1/models", {"models": []})
    assert run("models", "list").exit_code == 0


def test_the_key_travels_as_a_bearer_token_and_is_never_shown(gateway: FakeGateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_API_KEY", "s3cret")
    gateway.on("GET", "/api/v1/models", {"error": "unknown key"}, status=401)
    outcome = run("models", "list")
    assert gateway.requests[0].headers["authorization"] == "Bearer s3cret"
    assert "s3cret" not in outcome.out + outcome.err


def test_requests_join_the_trace_of_the_environment(gateway: FakeGateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    monkeypatch.setenv("TRACEPARENT", f"00-{trace_id}-b7ad6b7169203331-01")
    gateway.on("POST", V1, {"predictions": []})
    assert trace_id in run("predict", "cancer", "--data", "{}").err
    _, trace, parent, flags = gateway.sent("POST", V1).headers["traceparent"].split("-")
    assert (trace, flags) == (trace_id, "01")
    assert parent != "b7ad6b7169203331"


@pytest.mark.parametrize("arguments", [("models", "lst"), ("models", "list", "--nope"), ("nope",), ("endpoints", "deploy", "cancer")])
def test_a_misused_command_line_is_one_sentence_and_the_way_to_help(run: Run, arguments: tuple[str, ...]) -> None:
    outcome = run(*arguments)
    assert (outcome.exit_code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.endswith("--help\n")


@pytest.mark.parametrize("arguments", [("promote", "cancer"), ("endpoints", "promote", "cancer"), ("retrain", "cancer")])
def test_what_does_not_exist_yet_is_not_offered(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def told(identity: str, **more: Any) -> dict[str, Any]:
    return {
        "id": identity,
        "type": "millrace.registry.endpoint.created.v1",
        "time": "2026-01-01T00:00:00Z",
        "subject": "cancer",
        "data": {"endpoint_name": "cancer", "description": "d"},
        **more,
    }


def test_events_without_following_are_the_kept_ones(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", "/api/v1/events", {"events": [told("e-1")]})
    outcome = run("events", "tail", "--no-follow", "--type", "*.created.v1", "--entity", "cancer")
    assert "cancer  registry.endpoint.created.v1  description=d" in outcome.out
    assert gateway.requests[0].query == {"follow": "false", "type": "*.created.v1", "entity": "cancer"}


def test_events_as_json_are_one_cloudevent_per_line(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", "/api/v1/events", {"events": [told("e-1"), told("e-2")]})
    lines = run("events", "tail", "--no-follow", "--json").out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["e-1", "e-2"]


LETTER = {
    "id": "l-1",
    "time": "2026-01-01T00:00:00Z",
    "consumer": "registry",
    "origin_topic": "millrace.commands",
    "origin_partition": 0,
    "origin_offset": 7,
    "cause": "the CloudEvent has no type",
    "error": "InvalidMessage",
}


def test_dead_letters_are_listed_with_cause_and_origin(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", "/api/v1/dead-letters", {"dead_letters": [LETTER]})
    row = run("dlq", "list").out.splitlines()[1]
    assert "millrace.commands-0@7" in row
    assert row.endswith("the CloudEvent has no type")


def test_a_dead_letter_is_shown_with_the_record_it_was(gateway: FakeGateway, run: Run) -> None:
    record = {"value_base64": base64.b64encode(b"\xffhello").decode(), "headers_base64": [["ce_id", base64.b64encode(b"7").decode()]]}
    gateway.on("GET", "/api/v1/dead-letters/l-1", {**LETTER, **record})
    out = run("dlq", "show", "l-1").out
    assert "\\xffhello" in out
    assert "header ce_id  7" in out


def test_replay_asks_the_gateway(gateway: FakeGateway, run: Run) -> None:
    gateway.on("POST", "/api/v1/dead-letters/l-1:replay", {})
    assert run("dlq", "replay", "l-1").exit_code == 0


def run_millrace(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "libs.cli", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30, check=False)


def test_help_loads_nothing_heavy() -> None:
    heavy = "httpx rich ray faust numpy sklearn pydantic opentelemetry aiokafka"
    code = f"import sys; from libs.cli.__main__ import main; main(['--help']); print(sorted(set('{heavy}'.split()) & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_following_events_ends_cleanly_on_ctrl_c(gateway: FakeGateway) -> None:
    gateway.on("GET", "/api/v1/events", {"events": [told("e-1")]})
    command = [sys.executable, "-m", "libs.cli", "events", "tail"]
    with subprocess.Popen(
        command,
        env={**os.environ, "MILLRACE_URL": gateway.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored when the tests run in the background
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "registry.endpoint.created.v1" in process.stdout.readline()
        gateway.publish(told("e-1"), told("e-2", subject="other"))
        assert "other" in process.stdout.readline()
        process.send_signal(2)
        assert process.wait(10) == 130
        assert process.stderr.read() == ""


def test_a_reader_that_goes_away_is_no_error(gateway: FakeGateway) -> None:
    gateway.on("GET", "/api/v1/events", {"events": [told(str(number)) for number in range(5_000)]})
    command = f"{sys.executable} -m libs.cli events tail --no-follow | head -1 | wc -l"
    shown = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "MILLRACE_URL": gateway.url},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (shown.stdout.strip(), shown.stderr) == ("1", "")


def test_a_collector_that_is_down_does_not_fail_a_command(gateway: FakeGateway) -> None:
    gateway.on("GET", "/api/v1/models", {"models": []})
    began = time.monotonic()
    shown = run_millrace("models", "list", MILLRACE_URL=gateway.url, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert time.monotonic() - began < 20
