import socket
import sys
from pathlib import Path

import pytest

from libs.local import doctor, processes
from libs.local.doctor import Finding, Level
from libs.local.settings import BrokerChoice, LocalSettings


def findings(subject: str, **changes: object) -> list[Finding]:
    given = {"home": Path("/nonexistent/home"), "bootstrap_servers": "127.0.0.1:1", **changes}
    return [finding for finding in doctor.examine(LocalSettings(**given)) if finding.subject == subject]


def test_a_taken_port_is_a_problem_with_its_holder_and_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind((processes.LOOPBACK, 0))
        taken.listen()
        (finding,) = findings("ports", http_port=taken.getsockname()[1], grpc_enabled=False)
    assert finding.level is Level.PROBLEM
    assert "is taken: process" in finding.text
    assert "set GATEWAY_HTTP_PORT" in finding.remedy


def test_a_broker_of_the_user_is_what_up_would_use() -> None:
    (finding,) = findings("broker")
    assert (finding.level, finding.explanation) == (Level.OK, "`up` uses 127.0.0.1:1, because KAFKA_BOOTSTRAP_SERVERS is set")


def test_without_jars_and_without_a_repository_the_embedded_broker_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.local.kafka.can_fetch", lambda: False)
    (finding,) = findings("broker", bootstrap_servers="", cache_home=tmp_path)
    assert finding.level is Level.WARNING
    assert "`up` would use the embedded broker, which keeps nothing" in finding.text
    (finding,) = findings("broker", bootstrap_servers="", cache_home=tmp_path, broker=BrokerChoice.KAFKA)
    assert finding.level is Level.PROBLEM


def test_a_home_that_cannot_be_written_is_a_problem() -> None:
    (finding,) = findings("home", home=Path("/proc/home"))
    assert finding.level is Level.PROBLEM
    assert "choose another home" in finding.remedy


@pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
def test_a_kernel_without_landlock_is_said_to_protect_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_landlock_version", lambda: -1)
    (finding,) = [finding for finding in findings("cage") if finding.level is not Level.OK]
    assert "A LOADED MODEL CAN READ AND WRITE EVERY FILE OF THIS USER" in finding.explanation
    assert "serve only models that you made yourself" in finding.remedy


def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path: Path) -> None:
    every = doctor.examine(LocalSettings(home=tmp_path, bootstrap_servers="127.0.0.1:1"))
    assert all(finding.remedy for finding in every if finding.level is not Level.OK)
