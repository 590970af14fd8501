"""gRPC load from ``ghz``, built once from its Go module into the cache: a closed loop of ``ModelInfer`` calls."""

import json
import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.figures import Load
from benchmarks.peers.environments import InstallError, cache, installed

VERSION = "v0.93.0"
PROTO = Path(__file__).with_name("inference.proto")
_GO_PLACES = ("/usr/local/go/bin/go", "/usr/lib/go/bin/go", "/opt/homebrew/bin/go")


def built() -> Path:
    """The program, built first if it is not there.

    Raises
    ------
    InstallError
        There is no Go here, or it cannot be built.
    """
    program = cache() / "tools" / f"ghz-{VERSION}" / "ghz"
    if not program.exists():
        go = shutil.which("go") or next((place for place in _GO_PLACES if Path(place).exists()), None)
        if go is None:
            raise InstallError("ghz is built with Go, and there is none here")
        installed([go, "install", f"github.com/bojand/ghz/cmd/ghz@{VERSION}"], None, GOBIN=str(program.parent))
    return program


def run(program: Path, address: str, message: bytes, connections: int, seconds: float, scratch: Path, **metadata: str) -> Load:
    """Load a gRPC server for so many seconds, each connection with one call at a time.

    Parameters
    ----------
    address
        ``host:port``, without TLS.
    message
        The serialized ``ModelInferRequest``.
    metadata
        Sent with each call, as ``authorization``.

    Raises
    ------
    RuntimeError
        ghz itself failed.
    """
    body = scratch / "message"
    body.write_bytes(message)
    options = [
        *("--insecure", "--proto", str(PROTO), "--call", "inference.GRPCInferenceService.ModelInfer", "--binary-file", str(body)),
        *("--concurrency", str(connections), "--connections", str(connections), "--duration", f"{seconds}s", "--duration-stop", "ignore"),
        *("--format", "json", "--skipFirst", "0"),
    ]
    if metadata:
        options += ["--metadata", json.dumps(metadata)]
    command = [str(program), *options, address]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ghz failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return read_report(done.stdout)


def read_report(output: str) -> Load:
    """What ghz prints as JSON; its times are in nanoseconds."""
    said = json.loads(output)
    answered = int((said.get("statusCodeDistribution") or {}).get("OK", 0))
    latency = {row["percentage"]: row["latency"] / 1e6 for row in said.get("latencyDistribution") or ()}
    return Load(
        requests_per_s=answered / (said["total"] / 1e9),
        p50_ms=latency.get(50, 0.0),
        p99_ms=latency.get(99, 0.0),
        requests=said["count"],
        errors=said["count"] - answered,
    )
