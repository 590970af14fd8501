"""Load from ``wrk``: a closed loop that keeps each connection busy with one request at a time.

``wrk`` from the PATH, else from Debian's package, unpacked into the cache without root, else (anywhere but Debian) our own generator, which
takes more of the machine and says so in the results.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Load
from benchmarks.peers.environments import InstallError, cache, installed
from benchmarks.peers.peer import Request

SCRIPT = Path(__file__).with_name("wrk.lua")
_PACKAGES = ("wrk", "libluajit-5.1-2", "libluajit-5.1-common", "libssl3")


@dataclass(frozen=True)
class Wrk:
    """A load generator; ``command`` empty: our own."""

    command: tuple[str, ...]
    libraries: str = ""

    @property
    def title(self) -> str:
        """What it is, for the results."""
        return "wrk 4" if self.command else "benchmarks.generator (wrk is not to be had here)"

    def run(self, request: Request, connections: int, seconds: float, scratch: Path) -> Load:
        """Load a server for so many seconds (rounded up to whole ones for ``wrk``).

        Raises
        ------
        RuntimeError
            The generator itself failed.
        """
        body = scratch / "body"
        body.write_bytes(request.body)
        headers = [f"{name}: {value}" for name, value in request.headers.items()]
        whole_s = max(1, round(seconds))
        if self.command:
            options = ["--threads", "1", "--connections", str(connections), "--duration", f"{whole_s}s", "--timeout", "10s"]
            command = [*self.command, *options, "--latency", "--script", str(SCRIPT), request.url, "--", str(body), *headers]
        else:
            options = ["--connections", str(connections), "--seconds", str(whole_s), "--body", str(body)]
            command = [sys.executable, "-m", "benchmarks.generator", "closed", *options, request.url, *headers]
        environment = {**os.environ, **({"LD_LIBRARY_PATH": self.libraries} if self.libraries else {})}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=whole_s + 60, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return read_summary(done.stdout)


def read_summary(output: str) -> Load:
    """The last line of what ``wrk.lua`` and the generator print."""
    said = json.loads(output.strip().splitlines()[-1])
    answered = said["requests"] - said["status_errors"]
    return Load(
        requests_per_s=answered / (said["duration_us"] / 1e6),
        p50_ms=said["p50_us"] / 1_000,
        p99_ms=said["p99_us"] / 1_000,
        requests=said["requests"],
        errors=said["status_errors"] + said["socket_errors"] + said["timeouts"],
    )


def load_generator() -> Wrk:
    """``wrk``, installed if need be, else our own."""
    found = shutil.which("wrk")
    if found:
        return Wrk((found,))
    folder = cache() / "tools" / "wrk"
    try:
        program, libraries = _unpacked(folder)
    except InstallError:
        return Wrk(())
    return Wrk((str(program),), libraries)


def _unpacked(folder: Path) -> tuple[Path, str]:
    program = folder / "usr" / "bin" / "wrk"
    if not program.exists():
        partial = folder.with_name(f"wrk-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            installed(["apt-get", "download", *_PACKAGES], partial)
            for package in partial.glob("*.deb"):
                installed(["dpkg", "-x", str(package), str(partial)])
                package.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return program, ":".join(str(path) for path in (folder / "usr" / "lib").iterdir() if path.is_dir())
