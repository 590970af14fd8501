"""The HTTP server as a component: uvicorn on one socket, without its own ideas about signals and logs."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from libs.errors import ConfigurationError
from services.gateway.health import Health


class HttpServer:
    """Serves an ASGI application.

    ``stop`` takes no new connections, lets requests in flight end for up to ``drain_timeout_s``, and then cancels them.

    Attributes
    ----------
    port
        The port listened on, once started.
    """

    def __init__(self, app: ASGIApp, health: Health, host: str, port: int, drain_timeout_s: float) -> None:
        self._health = health
        self._host = host
        self.port = port
        config = uvicorn.Config(
            app,
            loop="none",
            http=_Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        listener = self._listen()
        self.port = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            await asyncio.wait({self._serving}, timeout=0.005)
            if self._serving.done():
                self._serving.result()
                raise ConfigurationError(f"the HTTP server on {self._host}:{self.port} ended while it started")

    async def run(self) -> None:
        if self._serving is not None:
            await asyncio.shield(self._serving)

    async def stop(self) -> None:
        self._health.close()
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving

    def _listen(self) -> socket.socket:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            raise ConfigurationError(f"the address {self._host!r} cannot be used: {error.strerror}") from error
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise ConfigurationError(
                f"cannot listen on {self._host}:{self.port}: {error.strerror}; set GATEWAY_HTTP_PORT to a port that is free"
            ) from error
        return listener


class _Protocol(HttpToolsProtocol):
    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer what is no HTTP in JSON, like every other error."""
        body = orjson.dumps({"error": "the request is not valid HTTP"})
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % len(body) + body)
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process's life-cycle, not to one of its components."""
        yield
