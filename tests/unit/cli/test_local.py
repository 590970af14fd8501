import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libs.local import doctor, platform
from libs.local.errors import PortTakenError
from libs.local.platform import DownReport, Notice, PartStatus, PlatformStatus
from libs.local.settings import BrokerChoice, LocalSettings
from libs.local.supervisor import Event, State
from libs.reports import EndpointReport, StreamReport
from tests.unit.cli.conftest import Run

READY = PlatformStatus(
    home="/home/mill/.millrace",
    is_running=True,
    pid=7,
    uptime_s=75.0,
    is_ready=True,
    gateway="http://127.0.0.1:8080",
    grpc="127.0.0.1:8081",
    bootstrap_servers="127.0.0.1:9092",
    broker="kafka",
    memory_bytes=3 * 2**30,
    parts=(PartStatus("gateway", "ready", 8, 70.0, 1, 2**20, (8080,), ""),),
)

Replace = Callable[..., None]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Put something else in the place of a function of the platform."""
    return lambda **functions: [monkeypatch.setattr(platform, name, function) for name, function in functions.items()]


def test_up_says_each_part_as_it_becomes_ready(replace: Replace, run: Run) -> None:
    def up_detached(_: LocalSettings, listener: platform.Listener) -> PlatformStatus:
        listener(Notice("fetching Kafka"))
        listener(Notice("EMBEDDED BROKER", is_loud=True))
        listener(Event("broker", State.STARTING, 0.1))
        listener(Event("broker", State.READY, 3.24))
        listener(Event("gateway", State.EXITED, 4.0, "it ended with exit code 1; restarting in 0.5 s"))
        return READY

    replace(up_detached=up_detached)
    outcome = run("up", "--detach")
    part, ready = outcome.out.splitlines()
    assert part.split() == ["broker", "ready", "3.2", "s"]
    assert "http://127.0.0.1:8080" in ready
    assert "fetching Kafka" in outcome.err
    assert "!!!\nEMBEDDED BROKER\n!!!" in outcome.err
    assert "it ended with exit code 1" in outcome.err


def test_up_takes_home_and_broker_from_the_command_line(replace: Replace, run: Run, tmp_path: Path) -> None:
    seen: list[LocalSettings] = []
    replace(up_detached=lambda settings, _: seen.append(settings) or READY)
    assert run("up", "--detach", "--home", tmp_path, "--broker", "embedded").exit_code == 0
    assert (seen[0].home, seen[0].broker) == (tmp_path, BrokerChoice.EMBEDDED)


def test_home_is_taken_from_the_environment_and_else_is_here(
    replace: Replace, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    replace(down=lambda settings: seen.append(settings.home) or DownReport(was_running=True, leftovers_ended=0))
    run("down")
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path))
    run("down")
    assert seen == [Path(".millrace"), tmp_path]


def test_an_unknown_broker_is_refused_with_the_choices(run: Run) -> None:
    outcome = run("up", "--broker", "rabbit")
    assert outcome.exit_code == 2
    assert "embedded" in outcome.err


def test_up_that_cannot_start_is_one_sentence(replace: Replace, run: Run) -> None:
    def up(*_: Any) -> None:
        raise PortTakenError("gateway cannot listen on 127.0.0.1:8080: process 9 (nginx) listens there; end it or choose another port")

    replace(up=up)
    outcome = run("up")
    assert (outcome.exit_code, outcome.out) == (1, "")
    assert (
        outcome.err == "millrace: gateway cannot listen on 127.0.0.1:8080: process 9 (nginx) listens there; end it or choose another port\n"
    )


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (DownReport(was_running=True, leftovers_ended=0), "stopped\n"),
        (DownReport(was_running=False, leftovers_ended=0), "the platform was not running\n"),
        (DownReport(was_running=False, leftovers_ended=2), "2 leftover processes were ended\nthe platform was not running\n"),
    ],
)
def test_down_says_what_it_did(replace: Replace, run: Run, report: DownReport, said: str) -> None:
    replace(down=lambda _: report)
    assert (run("down").exit_code, run("down").out) == (0, said)


def test_status_shows_every_part(replace: Replace, run: Run) -> None:
    replace(status=lambda _: READY)
    outcome = run("status")
    assert outcome.exit_code == 0
    assert outcome.out.splitlines()[-1].split() == ["gateway", "ready", "8", "1", "min", "10", "s", "1", "1.0", "MiB", "8080"]
    assert json.loads(run("status", "--json").out)["parts"][0]["name"] == "gateway"


def test_status_shows_last_errors_failing_streams_and_endpoints(replace: Replace, run: Run) -> None:
    part = PartStatus("gateway", "ready", 8, 70.0, 4, 2**20, (8080,), "", "it ended with exit code 1: ValueError: no", time.time() - 120)
    found = dataclasses.replace(
        READY,
        is_ready=False,
        parts=(part,),
        endpoints=(EndpointReport("cancer", is_ready=False, is_awaited=True, reason="cancer@1: no runner answers"),),
        failing_streams=(StreamReport("shop", 3, 17, "TypeError: a bug", 69, 1.0),),
    )
    replace(status=lambda _: found)
    outcome = run("status")
    assert outcome.exit_code == 1
    assert "gateway: 4 restarts; last error, 2 min 0 s ago: it ended with exit code 1: ValueError: no" in outcome.out
    assert "the stream of shop fails at partition 3 offset 17 (69 times): TypeError: a bug" in outcome.out
    assert outcome.out.splitlines()[-1].split(maxsplit=2) == ["cancer", "waiting", "cancer@1: no runner answers"]
    shown = json.loads(run("status", "--json").out)
    assert shown["parts"][0]["last_error"] == "it ended with exit code 1: ValueError: no"
    assert (shown["failing_streams"][0]["offset"], shown["endpoints"][0]["is_awaited"]) == (17, True)


def test_status_of_a_platform_that_does_not_run_fails_and_says_how_to_start_it(replace: Replace, run: Run) -> None:
    replace(status=lambda _: PlatformStatus("/home/mill", is_running=False, leftovers=3))
    outcome = run("status")
    assert outcome.exit_code == 1
    assert outcome.out == (
        "the platform in /home/mill is not running (3 leftover processes; `millrace down` ends them); start it with: millrace up\n"
    )


@pytest.mark.parametrize(("level", "exit_code"), [(doctor.Level.WARNING, 0), (doctor.Level.PROBLEM, 1)])
def test_doctor_fails_only_when_the_platform_cannot_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, level: doctor.Level, exit_code: int
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: [doctor.Finding(level, "memory", "1 GiB of memory", "end other programs")])
    outcome = run("doctor")
    assert outcome.exit_code == exit_code
    assert outcome.out.split()[:2] == [level, "memory"]
    assert "1 GiB of memory; end other programs" in outcome.out
    assert json.loads(run("doctor", "--json").out)["findings"][0]["remedy"] == "end other programs"
