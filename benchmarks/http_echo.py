"""``python -m benchmarks.http_echo``: the gateway's HTTP server against uvicorn (httptools, uvloop), with an echo behind each.

Needs ``wrk``. Processor time per request says more than requests per second on a machine that has other work.
"""

import argparse
import asyncio
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import uvloop

from benchmarks.tables import show
from services.gateway.health import Health
from services.gateway.http import AsgiApp, Exchange
from services.gateway.server import HttpServer
from services.gateway.settings import HttpSettings

PATH = "/v1/models/iris:predict"
BODY = '{"instances": [[5.1, 3.5, 1.4, 0.2]]}'
PEER = Path(__file__).parent / "peers" / "servers" / "asgi_echo.py"
IDLE_CONNECTIONS = 2_000

_SCRIPTS = {
    "the same head each time": f"""
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer 0123456789abcdef"
wrk.body = '{BODY}'
""",
    "a request id in each head": f"""
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer 0123456789abcdef"
wrk.body = '{BODY}'
local number = 0
request = function()
  number = number + 1
  wrk.headers["X-Request-Id"] = "r" .. number
  return wrk.format()
end
""",
    "240 kB": """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/octet-stream"
wrk.body = string.rep("x", 240000)
""",
}


class Echo:
    """The application."""

    def admit(self, exchange: Exchange) -> int | AsgiApp | None:  # noqa: ARG002
        return 2**20

    def handle(self, exchange: Exchange) -> None:
        exchange.respond(200, [(b"content-type", b"application/json")], bytes(exchange.body))


async def serve(port: int) -> None:
    """Serve the echo for ever."""
    await HttpServer(Echo(), Health(), "127.0.0.1", port, HttpSettings(), drain_timeout_s=1).start()
    await asyncio.Event().wait()


def main(arguments: Sequence[str] = ()) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_echo")
    parser.add_argument("--serve", type=int, metavar="PORT", help="only serve the echo")
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    options = parser.parse_args(arguments)
    if options.serve:
        uvloop.run(serve(options.serve))
        return
    commands = {"millrace": [sys.executable, "-m", "benchmarks.http_echo", "--serve"], "uvicorn": [sys.executable, str(PEER)]}
    with _started(commands["millrace"]) as ours, _started(commands["uvicorn"]) as theirs:
        rows = list(_rows({"millrace": ours, "uvicorn": theirs}, options.seconds, options.rounds))
    show("Echo over HTTP", ["request", "connections", "server", "requests/s", "p50", "p99", "processor µs/request"], rows)
    memory = [(name, *(_memory(command, request) for request in (b"", _request()))) for name, command in commands.items()]
    show(f"Bytes per idle connection, of {IDLE_CONNECTIONS}", ["server", "silent", "after a request"], memory)


def _rows(servers: dict[str, tuple[psutil.Process, int]], seconds: int, rounds: int) -> Iterator[tuple[object, ...]]:
    for title, script in _SCRIPTS.items():
        for connections in (1, 32, 128):
            found: dict[str, list[tuple[float, str, str, float]]] = {name: [] for name in servers}
            for _ in range(rounds):
                for name, (process, port) in servers.items():
                    found[name].append(_measure(process, port, script, connections, seconds))
            for name, figures in found.items():
                rate, p50, p99, _ = max(figures)
                yield title, connections, name, f"{rate:,.0f}", p50, p99, f"{min(figure[3] for figure in figures):.1f}"


def _measure(process: psutil.Process, port: int, script: str, connections: int, seconds: int) -> tuple[float, str, str, float]:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        before = process.cpu_times()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "-s", file.name, "--latency", f"http://127.0.0.1:{port}{PATH}"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        after = process.cpu_times()
    requests = int(_found(r"(\d+) requests in", text))
    busy_s = after.user + after.system - before.user - before.system
    return (
        float(_found(r"Requests/sec:\s+([\d.]+)", text)),
        _found(r"\n +50% +(\S+)", text),
        _found(r"\n +99% +(\S+)", text),
        busy_s / requests * 1e6,
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None or "Non-2xx" in text:
        raise SystemExit(text)
    return match[1]


def _memory(command: Sequence[str], request: bytes) -> int:
    """Resident memory that one more connection takes, in bytes."""
    with _started(command) as (process, port):
        _connected(port, _request()).close()
        before = process.memory_info().rss
        connections = [_connected(port, request) for _ in range(IDLE_CONNECTIONS)]
        time.sleep(0.5)
        taken = process.memory_info().rss - before
        for connection in connections:
            connection.close()
    return round(taken / IDLE_CONNECTIONS)


def _request() -> bytes:
    fields = ("host: h", "user-agent: some client", "accept: */*", "connection: keep-alive", "content-type: application/json")
    head = [f"POST {PATH} HTTP/1.1", *fields, "authorization: Bearer 0123456789abcdef", f"content-length: {len(BODY)}"]
    return "\r\n".join([*head, "", BODY]).encode()


def _connected(port: int, request: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    if request:
        connection.sendall(request)
        connection.recv(4096)
    return connection


@contextmanager
def _started(command: Sequence[str]) -> Iterator[tuple[psutil.Process, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([*command, str(port)]) as process:
        try:
            _wait(port)
            yield psutil.Process(process.pid), port
        finally:
            process.terminate()


def _wait(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
