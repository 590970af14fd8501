"""Real servers for the integration tier: an S3 server (Versity S3 Gateway) and Jaeger, built once from their Go modules.

They are kept in ``${XDG_CACHE_HOME:-~/.cache}/millrace/servers/<name>-<version>/<name>`` and never built again while they are there.

    python -m tests.integration.servers build         build what is missing (needs Go; on two cores about 2 and 6 minutes)
    python -m tests.integration.servers jaeger-path   print where the jaeger executable is; its directory can go on the PATH
    python -m tests.integration.servers s3-path       the same for the S3 server

A test takes the fixture ``s3_server`` or ``jaeger_server``: the server runs on free loopback ports for the session.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

_GO_PLACES = ("/usr/local/go/bin/go", "/usr/lib/go/bin/go", "/opt/homebrew/bin/go")
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 2.0
"""Jaeger can take over ten seconds to end its connections; nothing of these servers is worth waiting for."""


@dataclass(frozen=True)
class GoServer:
    """A server that is built from a pinned version of its Go module.

    The main package is built inside a copy of the module's source, because ``go install`` refuses a module with replacements.
    """

    name: str
    module: str
    version: str
    package: str

    @property
    def path(self) -> Path:
        return _cache() / f"{self.name}-{self.version}" / self.name


S3 = GoServer("versitygw", "github.com/versity/versitygw", "v1.8.0", "./cmd/versitygw")

JAEGER = GoServer("jaeger", "github.com/jaegertracing/jaeger", "v1.76.0", "./cmd/jaeger")
"""Jaeger 2 (the last tag that Go can name: from 2.14 on the tags do not follow the rules of Go modules)."""

SERVERS = (S3, JAEGER)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server and the only account it knows."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"


@dataclass(frozen=True)
class JaegerServer:
    """A running Jaeger that keeps traces in memory."""

    otlp_http: str
    otlp_grpc: str
    query: str

    def services(self) -> list[str]:
        """Names of the services that sent a span."""
        return sorted(_get_json(f"{self.query}/api/services")["data"] or [])

    def trace(self, trace_id: str, *, spans: int = 1, timeout_s: float = 60.0) -> dict[str, Any]:
        """The trace in Jaeger's own JSON, as soon as it has at least ``spans`` spans; raises ``TimeoutError``."""
        deadline = time.monotonic() + timeout_s
        found = 0
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, HTTPException):  # 404 while there is no span; a busy Jaeger may also not answer
                (trace,) = _get_json(f"{self.query}/api/traces/{trace_id}")["data"]
                found = len(trace["spans"])
                if found >= spans:
                    return dict(trace)
            time.sleep(0.1)
        raise TimeoutError(f"After {timeout_s} s Jaeger has {found} of {spans} spans of trace {trace_id}.")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with run_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def jaeger_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JaegerServer]:
    with run_jaeger(tmp_path_factory.mktemp("jaeger")) as server:
        yield server


@contextlib.contextmanager
def run_s3(directory: Path) -> Iterator[S3Server]:
    """An S3 server on a free loopback port that keeps its objects in ``directory``."""
    server = S3Server(f"http://127.0.0.1:{_free_port()}", "millrace-tests", secrets.token_hex(16))
    objects, attributes = directory / "objects", directory / "attributes"
    objects.mkdir()
    attributes.mkdir()
    command = [str(_built(S3)), "--port", server.endpoint.removeprefix("http://"), "--region", server.region, "--quiet"]
    command += ["posix", "--sidecar", str(attributes), str(objects)]
    account = {"ROOT_ACCESS_KEY": server.access_key, "ROOT_SECRET_KEY": server.secret_key}
    with _running(command, directory / "log", account, lambda: _answers(server.endpoint)):
        yield server


@contextlib.contextmanager
def run_jaeger(directory: Path) -> Iterator[JaegerServer]:
    """A Jaeger on free loopback ports, with traces in memory."""
    otlp_http, otlp_grpc, query, query_grpc = (f"127.0.0.1:{_free_port()}" for _ in range(4))
    server = JaegerServer(f"http://{otlp_http}", f"http://{otlp_grpc}", f"http://{query}")
    protocols = {"http": {"endpoint": otlp_http}, "grpc": {"endpoint": otlp_grpc}}
    config = directory / "config.json"
    config.write_text(
        json.dumps(
            {
                "service": {
                    "extensions": ["jaeger_storage", "jaeger_query"],
                    "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
                    "telemetry": {"metrics": {"level": "none"}},
                },
                "extensions": {
                    "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 100_000}}}},
                    "jaeger_query": {
                        "storage": {"traces": "memory"},
                        "http": {"endpoint": query},
                        "grpc": {"endpoint": query_grpc},
                    },
                },
                "receivers": {"otlp": {"protocols": protocols}},
                "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
            }
        )
    )
    command = [str(_built(JAEGER)), "--config", str(config)]
    with _running(command, directory / "log", {}, lambda: _answers(server.query) and _answers(server.otlp_http)):
        yield server


def build(server: GoServer) -> Path:
    """Build the server unless it is there; safe when two processes do it at once, and an interrupted build leaves nothing behind."""
    server.path.parent.mkdir(parents=True, exist_ok=True)
    with (server.path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not server.path.exists():
            _build(server, _go())
    return server.path


def _build(server: GoServer, go: str) -> None:
    started = time.monotonic()
    print(f"building {server.name} {server.version} …", file=sys.stderr, flush=True)
    downloaded = subprocess.run([go, "mod", "download", "-json", f"{server.module}@{server.version}"], stdout=subprocess.PIPE, check=True)
    with tempfile.TemporaryDirectory(dir=server.path.parent) as directory:
        source, executable = Path(directory, "source"), Path(directory, server.name)
        shutil.copytree(json.loads(downloaded.stdout)["Dir"], source, copy_function=shutil.copyfile)
        _make_writable(source)
        subprocess.run(
            [go, "build", "-p", "1", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", str(executable), server.package],
            cwd=source,
            env={**os.environ, "CGO_ENABLED": "0"},
            preexec_fn=lambda: os.nice(19) and None,
            check=True,
        )
        executable.replace(server.path)
    print(f"built {server.path} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _make_writable(directory: Path) -> None:
    for place, _, _ in os.walk(directory):
        os.chmod(place, 0o755)


def _go() -> str:
    go = shutil.which("go") or next((place for place in _GO_PLACES if os.access(place, os.X_OK)), None)
    if go is None:
        sys.exit("Building the servers of the integration tests needs Go 1.25 or newer; install it and put `go` on the PATH.")
    return go


def _built(server: GoServer) -> Path:
    if not server.path.exists():
        pytest.fail(f"{server.name} is not built; run `python -m tests.integration.servers build` once.", pytrace=False)
    return server.path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace" / "servers"


@contextlib.contextmanager
def _running(command: list[str], log: Path, variables: dict[str, str], is_ready: Callable[[], bool]) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            preexec_fn=_die_with_parent,
        )
        try:
            _wait_until_ready(process, log, is_ready)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not become ready:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def _die_with_parent() -> None:
    """Linux: a killed test run leaves no server behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _answers(url: str) -> bool:
    """Whether anything speaks HTTP there, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError, HTTPException):
        return False
    return True


def _get_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return dict(json.load(answer))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: list[str]) -> None:
    match arguments:
        case ["build"]:
            for server in SERVERS:
                build(server)
        case ["jaeger-path" | "s3-path" as which]:
            server = JAEGER if which == "jaeger-path" else S3
            if not server.path.exists():
                sys.exit(f"{server.name} is not built; run `python -m tests.integration.servers build` once.")
            print(server.path)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
