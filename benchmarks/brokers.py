"""A broker of its own for a benchmark."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager


def free_port() -> int:
    """A loopback port that nobody holds right now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def kafka() -> Iterator[str]:
    """A real Kafka in a temporary home; yields its bootstrap servers."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as home:
        command = [sys.executable, "-m", "libs.local.kafka", "--home", home, "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _wait(port, process, timeout_s=300)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _wait(port: int, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit("the broker ended while starting")
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"the broker did not open port {port} in {timeout_s} s")
