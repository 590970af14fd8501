"""The HTTP server as a component: it listens, drains and stops."""

import asyncio
import logging
import resource
import socket

from libs.errors import ConfigurationError
from services.gateway.health import Health
from services.gateway.http import Application, Connections
from services.gateway.memory import keep_freed_memory
from services.gateway.settings import HttpSettings

log = logging.getLogger(__name__)

BACKLOG = 1_024
"""Connections that may wait to be accepted; the kernel's own bound (``net.core.somaxconn``) may be lower."""

_KEEP_IDLE = getattr(socket, "TCP_KEEPIDLE", 0x10)  # macOS calls it TCP_KEEPALIVE
OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, _KEEP_IDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""Of the listener; an accepted socket takes them from it. A machine that vanished without a word is noticed after two minutes: a minute of
silence and four probes. It may have waited for an answer, or listened to a stream, and no deadline of ours would have passed."""

SPARE_FILES = 512
"""Open files that are left for everything else: the broker, the runners, uploads."""


class HttpServer:
    """Serves an application on one socket.

    ``stop`` takes no new connections, closes idle ones, lets requests in flight end for up to ``drain_timeout_s``, and then breaks
    them off.

    Parameters
    ----------
    reuse_port
        Share the port with other processes (``SO_REUSEPORT``); the kernel spreads the connections.

    Attributes
    ----------
    port
        The port listened on, once started.
    connections
        The connections, once started.
    """

    def __init__(
        self,
        application: Application,
        health: Health,
        host: str,
        port: int,
        limits: HttpSettings,
        drain_timeout_s: float,
        *,
        reuse_port: bool = False,
    ) -> None:
        self._application = application
        self._health = health
        self._host = host
        self.port = port
        self._drain_timeout_s = drain_timeout_s
        self._limits = limits
        self._reuse_port = reuse_port
        self._server: asyncio.Server | None = None
        self.connections: Connections | None = None

    async def start(self) -> None:
        keep_freed_memory()
        allow_open_files(self._limits.max_connections + SPARE_FILES)
        listener = self._listen()
        self.port = listener.getsockname()[1]
        loop = asyncio.get_running_loop()
        self.connections = Connections(self._application, self._limits, loop)
        self._server = await loop.create_server(self.connections.make, sock=listener, backlog=BACKLOG)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self._health.close()
        if self._server is None or self.connections is None:
            return
        self._server.close()
        self._server = None
        await self.connections.drain(self._drain_timeout_s)

    def _listen(self) -> socket.socket:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            raise ConfigurationError(f"the address {self._host!r} cannot be used: {error.strerror}") from error
        try:
            for level, option, value in OPTIONS:
                listener.setsockopt(level, option, value)
            if self._reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise ConfigurationError(
                f"cannot listen on {self._host}:{self.port}: {error.strerror}; set GATEWAY_HTTP_PORT to a port that is free"
            ) from error
        return listener


def allow_open_files(wanted: int) -> None:
    """Let this process open so many files, as far as the system allows: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("only %d open files are allowed: set GATEWAY_HTTP_MAX_CONNECTIONS below %d", allowed, max(1, allowed - SPARE_FILES))
