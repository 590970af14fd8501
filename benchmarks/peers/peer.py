"""What a server in the comparison is: how it is installed, started, and asked."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil

from benchmarks.peers import bodies
from benchmarks.peers.environments import Environment, built
from libs.local.processes import child_setup, end, last_lines

SERVERS = Path(__file__).with_name("servers")
_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 10.0


class Form(StrEnum):
    """In which form rows travel."""

    JSON = "json"
    BINARY = "binary"
    GRPC = "grpc"


class PeerError(RuntimeError):
    """A server does not start, or answers wrongly."""


@dataclass(frozen=True)
class Request:
    """One request, repeated by the load; ``body`` of a gRPC request is the serialized message."""

    url: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": bodies.JSON_TYPE})


@dataclass(frozen=True)
class Place:
    """Where a server runs: the folder of the models (``<name>.joblib``), one of its own for what it writes, and its loopback ports."""

    models: Path
    scratch: Path
    port: int
    grpc_port: int

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"


class Peer:
    """A server that is one command in an environment of its own; each subclass is one server.

    Attributes
    ----------
    forms
        The forms it takes rows in.
    models
        The models it serves; empty when it serves none and answers the request itself.
    ready_path
        Answers 200 once every model is loaded.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    environment: ClassVar[Environment]
    forms: ClassVar[frozenset[Form]] = frozenset({Form.JSON})
    models: ClassVar[frozenset[str]] = frozenset({"iris", "cancer", "boosted"})
    ready_path: ClassVar[str] = "/"

    def command(self, python: Path, place: Place) -> list[str]:
        """What starts it."""
        raise NotImplementedError

    def variables(self, place: Place) -> dict[str, str]:  # noqa: ARG002
        """Environment variables beside the inherited ones."""
        return {}

    def request(self, place: Place, model: str, rows: np.ndarray, form: Form) -> Request:  # noqa: ARG002
        """The request for these rows."""
        return Request(f"{place.url}/{model}", bodies.instances(rows))

    def labels(self, answer: bytes, headers: Mapping[str, str], form: Form) -> list[int]:  # noqa: ARG002
        """The labels in an answer."""
        return bodies.predictions(answer)

    def install(self) -> None:
        """Have it on this machine; raises ``InstallError``."""
        built(self.environment)

    @contextmanager
    def running(self, place: Place) -> Iterator[None]:
        """Start it, wait until it is ready, and end it with everything that it started.

        Raises
        ------
        PeerError
            It ended while it started, or was not ready in a minute and a half.
        """
        log = place.scratch / f"{self.name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **self.variables(place)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(built(self.environment), place),
                cwd=place.scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=child_setup(),
            )
        try:
            self._wait(process, place, log)
            yield
        finally:
            stop(process)

    def _wait(self, process: "subprocess.Popen[bytes]", place: Place, log: Path) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise PeerError(f"{self.title} ended while it started: {_said(log)}")
            if is_answered(place.url + self.ready_path):
                return
            time.sleep(0.1)
        raise PeerError(f"{self.title} was not ready after {_START_TIMEOUT_S:.0f} s: {_said(log)}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that descend from it, gently at first."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end([each for each in family if each.is_running()], 2.0)


def is_answered(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def _said(log: Path) -> str:
    return " | ".join(line.strip() for line in last_lines(log, count=3) if line.strip()) or "it said nothing"
