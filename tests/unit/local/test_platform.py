import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from libs import reports
from libs.local import platform, processes
from libs.local.errors import AlreadyRunningError, PortTakenError
from libs.local.home import Home
from libs.local.platform import Broker, BrokerKind
from libs.local.settings import BrokerChoice, LocalSettings
from libs.local.supervisor import Event, Part, State
from libs.reports import EndpointReport

SERVICE = """
import http.server, json, os, pathlib, socket, time

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

is_gateway = os.environ["MILLRACE_PART"] == "gateway"
server = http.server.HTTPServer(("127.0.0.1", 0), Healthy, bind_and_activate=not is_gateway)
if is_gateway:
    server.socket.close()
    server.socket = socket.socket(fileno=json.loads(os.environ["GATEWAY_HTTP_SOCKETS"])[0])
    said = pathlib.Path(os.environ["MILLRACE_HOME"]) / "run" / "endpoints.json"
    rows = json.loads(os.environ.get("TEST_ENDPOINTS", "[]"))
    said.write_text(json.dumps({"pid": os.getpid(), "written_at": time.time(), "rows": rows}))
pathlib.Path(os.environ["MILLRACE_READY_FILE"]).write_text(str(os.getpid()))
server.serve_forever()
"""

UP = """
import sys
from libs.local import platform
from libs.local.settings import LocalSettings
from tests.unit.local.conftest import program

settings = LocalSettings(home=sys.argv[1], bootstrap_servers="127.0.0.1:1")
plan = lambda *_: [program("one"), program("two", after=("one",))]
platform.up(settings, lambda said: None, lambda status: print("ready", flush=True), plan)
"""


@pytest.fixture
def settings(tmp_path: Path) -> LocalSettings:
    return LocalSettings(home=tmp_path / "home", bootstrap_servers="127.0.0.1:1")


@pytest.fixture
def supervisor(settings: LocalSettings) -> Iterator[subprocess.Popen[str]]:
    """A platform of two tiny parts, ready, in a process of its own."""
    command = [sys.executable, "-c", UP, str(settings.home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        platform.down(settings)


def test_status_shows_every_part_of_a_running_platform(settings: LocalSettings, supervisor: subprocess.Popen[str]) -> None:
    found = platform.status(settings)
    assert (found.is_running, found.is_ready, found.pid) == (True, True, supervisor.pid)
    assert [(part.name, part.state, part.restarts) for part in found.parts] == [("one", "ready", 0), ("two", "ready", 0)]
    assert all(part.memory_bytes > 0 and part.pid for part in found.parts)
    assert json.loads(json.dumps(found.as_dict()))["parts"][0]["name"] == "one"


def test_down_stops_everything(settings: LocalSettings, supervisor: subprocess.Popen[str]) -> None:
    assert platform.down(settings) == platform.DownReport(was_running=True, leftovers_ended=0)
    assert supervisor.wait(5) == 0
    assert not platform.status(settings).is_running
    assert processes.members(Home.at(settings.home).instance) == []


def test_down_without_a_platform_does_nothing(settings: LocalSettings) -> None:
    assert platform.down(settings) == platform.DownReport(was_running=False, leftovers_ended=0)


def test_ctrl_c_stops_everything(settings: LocalSettings, supervisor: subprocess.Popen[str]) -> None:
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(5) == 0
    assert processes.members(Home.at(settings.home).instance) == []


def test_nothing_outlives_a_supervisor_that_was_killed(settings: LocalSettings, supervisor: subprocess.Popen[str]) -> None:
    members = processes.members(Home.at(settings.home).instance)
    supervisor.kill()
    supervisor.wait()
    _, alive = psutil.wait_procs(members, timeout=5)
    assert alive == []


def test_down_ends_what_escaped_a_killed_supervisor(settings: LocalSettings) -> None:
    instance = Home.at(settings.home).instance
    command = [sys.executable, "-I", "-S", "-c", "import signal; print('up', flush=True); signal.pause()"]
    environment = {**os.environ, processes.INSTANCE_VARIABLE: instance}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as escaped:
        assert escaped.stdout is not None
        escaped.stdout.readline()
        assert platform.status(settings).leftovers == 1
        assert platform.down(settings) == platform.DownReport(was_running=False, leftovers_ended=1)
    assert not psutil.pid_exists(escaped.pid)


def test_a_second_up_on_the_same_home_is_refused(settings: LocalSettings, supervisor: subprocess.Popen[str]) -> None:
    with pytest.raises(AlreadyRunningError, match=rf"already running: pid {supervisor.pid}, gateway http://127\.0\.0\.1:8080"):
        platform.up_detached(settings, lambda said: None)


def test_a_stale_state_is_recovered_with_a_note(settings: LocalSettings) -> None:
    home = Home.at(settings.home)
    home.create()
    home.write_state({"pid": 1})
    said: list[object] = []
    platform.recover(home, said.append)
    assert [notice.text for notice in said if isinstance(notice, platform.Notice)] == [
        "the platform was not stopped properly last time; 0 leftover processes were ended"
    ]
    assert not home.state_file.exists()


def test_a_detached_up_hands_on_why_it_failed(settings: LocalSettings) -> None:
    with socket.socket() as taken:
        taken.bind((processes.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        occupied = settings.model_copy(update={"bootstrap_servers": "", "broker": BrokerChoice.EMBEDDED, "kafka_port": port})
        with pytest.raises(PortTakenError, match=rf"broker cannot listen on 127\.0\.0\.1:{port}"):
            platform.up_detached(occupied, lambda said: None)
    assert not platform.status(settings).is_running


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalSettings:
    """A whole platform whose services are tiny programs."""
    for name in platform.SERVICES:
        (tmp_path / "services" / name).mkdir(parents=True)
        (tmp_path / "services" / name / "__main__.py").write_text(SERVICE)
    (tmp_path / "services" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return LocalSettings(
        home=tmp_path / "home",
        broker=BrokerChoice.EMBEDDED,
        bootstrap_servers="",
        otlp_endpoint="http://127.0.0.1:1",
        ray_address="127.0.0.1:1",
        kafka_port=_free_port(),
        http_port=_free_port(),
        grpc_port=_free_port(),
    )


def test_up_waits_for_deployed_endpoints_a_while_and_says_which_do_not_answer(
    pretended: LocalSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"name": "broken", "is_ready": False, "is_awaited": False, "reason": "m@1: failed (out of memory)"}
    silent = {"name": "cancer", "is_ready": False, "is_awaited": True, "reason": "m@2: no runner answers (refused)"}
    monkeypatch.setenv("TEST_ENDPOINTS", json.dumps([failed, silent]))
    said: list[str] = []
    settings = pretended.model_copy(update={"ready_timeout_s": 1.0})
    try:
        found = platform.up_detached(settings, lambda each: said.append(each.text) if isinstance(each, platform.Notice) else None)
        assert all(part.state == State.READY for part in found.parts)
        assert not found.is_ready
        assert [text for text in said if text.startswith(("waiting", "1 endpoint", "endpoint"))] == [
            "waiting for 1 endpoint to answer: cancer",
            "1 endpoint did not answer within 1 s and may later: cancer: m@2: no runner answers (refused)",
            "endpoint broken does not answer: m@1: failed (out of memory)",
        ]
        reports.write(Home.at(settings.home).run / reports.ENDPOINTS_FILE, [EndpointReport("broken", is_ready=False, reason="failed")])
        assert platform.status(settings).is_ready
        assert [each.name for each in platform.status(settings).endpoints] == ["broken"]
        (Home.at(settings.home).run / reports.ENDPOINTS_FILE).unlink()
        assert not platform.status(settings).is_ready, "nobody says which endpoints answer"
    finally:
        platform.down(settings)


def test_a_detached_up_returns_when_everything_is_ready(pretended: LocalSettings) -> None:
    settings = pretended
    ready: list[str] = []
    try:
        found = platform.up_detached(
            settings, lambda said: ready.append(said.part) if isinstance(said, Event) and said.state is State.READY else None
        )
        assert found.is_ready
        assert set(ready) == {"broker", "topics", *platform.SERVICES} == {part.name for part in found.parts}
    finally:
        report = platform.down(settings)
    assert report == platform.DownReport(was_running=True, leftovers_ended=0)
    assert all(processes.is_port_free(port) for port in (settings.kafka_port, settings.http_port))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((processes.LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_users_broker_wins_over_ours(settings: LocalSettings) -> None:
    assert platform.choose_broker(settings, lambda said: None) == Broker(BrokerKind.EXTERNAL, "127.0.0.1:1")


def test_the_embedded_broker_is_announced_loudly(settings: LocalSettings) -> None:
    said: list[Event | platform.Notice] = []
    embedded = settings.model_copy(update={"bootstrap_servers": "", "broker": BrokerChoice.EMBEDDED})
    assert platform.choose_broker(embedded, said.append).kind is BrokerKind.EMBEDDED
    assert [notice.is_loud for notice in said if isinstance(notice, platform.Notice)] == [True]


def test_services_wait_for_the_topics_and_serving_is_restarted_with_ray(settings: LocalSettings, home: Home) -> None:
    listed = platform.parts(settings, home, Broker(BrokerKind.KAFKA, "127.0.0.1:9092"), None)
    after = {part.name: part.after for part in listed}
    assert list(after) == ["broker", "topics", "ray", "registry", "validator", "builder", "serving", "streaming", "gateway"]
    assert after["topics"] == ("broker",)
    assert after["serving"] == ("topics",)
    assert {part.name: part.restarts_with for part in listed if part.restarts_with} == {"serving": ("ray",)}
    assert all(after[name] == ("topics",) for name in ("registry", "validator", "builder", "streaming", "gateway"))


def test_what_the_user_set_reaches_the_services(settings: LocalSettings, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTIFACTS_URL", "s3://mine")
    monkeypatch.delenv("RUNNER_KEY_FILE", raising=False)
    listed = platform.parts(settings, home, Broker(BrokerKind.EMBEDDED, "127.0.0.1:9092"), None)
    environment = next(part for part in listed if part.name == "gateway").environment()
    assert environment["ARTIFACTS_URL"] == "s3://mine"
    assert environment["RUNNER_KEY_FILE"] == str(home.runner_key)
    assert environment["KAFKA_EMBEDDED"] == "true"
    assert environment["MILLRACE_HOME"] == str(home.root)


def test_services_send_their_spans_to_the_collector_of_the_settings(
    settings: LocalSettings, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    broker = Broker(BrokerKind.KAFKA, "127.0.0.1:9092")
    environments = [
        platform.parts(settings.model_copy(update={"otlp_endpoint": given}), home, broker, None)[-1].environment()
        for given in ("http://there", "")
    ]
    assert [environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") for environment in environments] == ["http://there", None]


def test_a_restart_shows_in_the_status(settings: LocalSettings, supervisor: subprocess.Popen[str]) -> None:
    os.kill(next(part.pid for part in platform.status(settings).parts if part.pid) or 0, signal.SIGKILL)
    while platform.status(settings).parts[0].restarts == 0 or platform.status(settings).parts[0].state != State.READY:
        pass
    assert platform.status(settings).is_ready


def test_a_port_that_the_kernel_gives_to_clients_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Event | platform.Notice] = []
    monkeypatch.setattr(processes, "is_ephemeral", lambda port: port == 39_092)
    platform._warn_of_ephemeral_ports([Part("broker", ports=(39_092,)), Part("gateway", ports=(8080,))], said.append)
    (notice,) = said
    assert isinstance(notice, platform.Notice)
    assert "port 39092 of broker is one that the kernel gives to clients" in notice.text
    assert "sysctl -w net.ipv4.ip_local_reserved_ports=39092" in notice.text
