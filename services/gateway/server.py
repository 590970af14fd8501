"""The HTTP server as a component: it listens, drains and stops."""

import asyncio
import logging
import resource
import socket

from services.gateway.health import Health
from services.gateway.http import Application, Connections
from services.gateway.listening import listener
from services.gateway.memory import keep_freed_memory
from services.gateway.settings import HttpSettings

log = logging.getLogger(__name__)

BACKLOG = 1_024
"""Connections that may wait to be accepted; the kernel's own bound (``net.core.somaxconn``) may be lower."""

_KEEP_IDLE = getattr(socket, "TCP_KEEPIDLE", 0x10)  # macOS calls it TCP_KEEPALIVE
OPTIONS = (
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
        opened = listener(
            self._host,
            self.port,
            OPTIONS,
            handed_over=self._limits.sockets,
            reuse_port=self._reuse_port,
            variable="GATEWAY_HTTP_PORT",
        )
        self.port = opened.getsockname()[1]
        loop = asyncio.get_running_loop()
        self.connections = Connections(self._application, self._limits, loop)
        self._server = await loop.create_server(self.connections.make, sock=opened, backlog=BACKLOG)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self._health.close()
        if self._server is None or self.connections is None:
            return
        self._server.close()
        self._server = None
        await self.connections.drain(self._drain_timeout_s)


def allow_open_files(wanted: int) -> None:
    """Let this process open so many files, as far as the system allows: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("only %d open files are allowed: set GATEWAY_HTTP_MAX_CONNECTIONS below %d", allowed, max(1, allowed - SPARE_FILES))
