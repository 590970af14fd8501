"""``python -m tests.integration.http_server``: the gateway's HTTP server with a small application, on uvloop, in a process of its own.

The settings come as JSON in the first argument. Writes the port to standard output; SIGTERM drains and ends it.
"""

import asyncio
import hashlib
import json
import signal
import sys

import uvloop

from services.gateway.health import Health
from services.gateway.http import AsgiApp, Exchange
from services.gateway.server import HttpServer
from services.gateway.settings import HttpSettings

TEXT = (b"content-type", b"text/plain")


class Application:
    """Echoes.

    ``/slow`` takes the seconds of its query and counts, ``/stream`` reads as a stream, ``/large`` answers so many bytes.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.gone = 0

    def admit(self, exchange: Exchange) -> int | AsgiApp | None:
        if exchange.raw_path == b"/stream":
            return stream
        if exchange.raw_path == b"/refused":
            exchange.respond(401, [TEXT], b"who are you?")
            return None
        return 1_000_000

    def handle(self, exchange: Exchange) -> None:
        if exchange.raw_path == b"/slow":
            self.begun += 1
            timer = asyncio.get_running_loop().call_later(float(exchange.query), exchange.respond, 200, [TEXT], b"at last")
            exchange.on_gone = lambda: self._lose(timer)
        elif exchange.raw_path == b"/large":
            exchange.respond(200, [TEXT], b"x" * int(exchange.query))
        elif exchange.raw_path == b"/slow/counts":
            exchange.respond(200, [TEXT], b"%d begun, %d gone" % (self.begun, self.gone))
        else:
            exchange.respond(200, [TEXT], bytes(exchange.body))

    def _lose(self, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        self.gone += 1


async def stream(scope, receive, send) -> None:
    """Answer with the size and the SHA-256 of the body."""
    digest = hashlib.sha256()
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        digest.update(message["body"])
        size += len(message["body"])
        if not message["more_body"]:
            break
    body = f"{size} {digest.hexdigest()}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [TEXT]})
    await send({"type": "http.response.body", "body": body})


async def main() -> None:
    server = HttpServer(Application(), Health(), "127.0.0.1", 0, HttpSettings(**json.loads(sys.argv[1])), drain_timeout_s=30)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await server.start()
    print(server.port, flush=True)
    await stopping.wait()
    await server.stop()


if __name__ == "__main__":
    uvloop.run(main())
