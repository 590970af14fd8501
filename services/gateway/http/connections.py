"""All connections together: how many there may be, whose deadline has passed, and their end."""

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from libs.metrics import PROCESS, Metrics
from libs.metrics.definitions import HTTP_REFUSED
from services.gateway.http.connection import Connection
from services.gateway.http.exchange import Application, AsgiApp, Exchange
from services.gateway.http.heads import RefusedError
from services.gateway.settings import HttpSettings

log = logging.getLogger(__name__)

TICK_S = 1.0
"""How often deadlines are looked at; one that passes in between is noticed so much later."""

_ACCEPTED_S = 0.05
"""In this time the event loop makes the connections that it has accepted."""

SPARE_CONNECTIONS, SPARE_CONNECTIONS_PER_CLIENT = 256, 16
"""So many beyond the most may be told that there is no room; further ones are closed without a word."""


class Connections:
    """The connections of one server. Made and used on the event loop.

    Parameters
    ----------
    metrics
        What the server itself refuses is counted there, by status.

    Attributes
    ----------
    tasks
        ASGI applications at work.
    held_bytes
        Memory taken by bodies that came in more than one piece and are not answered yet.
    unsent_bytes
        Memory taken by answers whose clients take them slowly.
    idle_deadline
        When a connection that becomes idle now must have spoken, as seen at the last tick: never too early, late by a tick at most.
    """

    def __init__(self, application: Application, limits: HttpSettings, loop: asyncio.AbstractEventLoop, metrics: Metrics = PROCESS) -> None:
        self.admit: Callable[[Exchange], int | AsgiApp | None] = application.admit
        self.handle: Callable[[Exchange], None] = application.handle
        self.limits = limits
        self.loop = loop
        self.now = loop.time
        self.is_draining = False
        self.held_bytes = 0
        self.unsent_bytes = 0
        self._metrics = metrics
        self._all: set[Connection] = set()
        self._per_client: Counter[str] = Counter()
        self.tasks: set[asyncio.Task[None]] = set()
        self._empty: asyncio.Future[None] | None = None
        self._tick_s = min(TICK_S, _shortest(limits) / 4)
        self._timer = loop.call_later(self._tick_s, self._tick)
        self.idle_deadline = self.now() + limits.idle_timeout_s + self._tick_s

    def __len__(self) -> int:
        return len(self._all)

    def make(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self)

    def enter(self, connection: Connection) -> RefusedError | None:
        """Count a new connection; the value is why it cannot stay. When too many are told so already, it is closed without a word."""
        self._all.add(connection)
        connection.key = key = client_key(connection.client)
        if key is not None:
            self._per_client[key] += 1
        excess = len(self._all) - self.limits.max_connections
        client_excess = 0 if key is None else self._per_client[key] - self.limits.max_connections_per_client
        if excess <= 0 and client_excess <= 0:
            return None
        if excess > SPARE_CONNECTIONS or client_excess > SPARE_CONNECTIONS_PER_CLIENT:
            self.count_refusal(HTTPStatus.SERVICE_UNAVAILABLE)
            connection.abort()
            return None
        whose = "the gateway" if excess > 0 else "your address"
        return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, f"{whose} has too many connections open")

    def leave(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._all.discard(connection)
        if connection.key is not None:
            self._per_client[connection.key] -= 1
            if not self._per_client[connection.key]:
                del self._per_client[connection.key]
        self._look_empty()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run an application in a task."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._task_done)

    def count_refusal(self, status: int) -> None:
        """Note that the server itself refused something, or broke it off."""
        self._metrics.counter(HTTP_REFUSED, str(int(status))).value += 1

    async def drain(self, timeout_s: float) -> None:
        """Let requests in flight end for up to ``timeout_s``, then break them off. Nobody must accept any longer."""
        self.is_draining = True
        for connection in list(self._all):
            connection.drain()
        await asyncio.sleep(_ACCEPTED_S)
        await self._until_empty(timeout_s)
        if self._all or self.tasks:
            log.warning("%d requests were broken off: they took longer than %g s to end", len(self._all), timeout_s)
        for task in self.tasks:
            task.cancel()
        for connection in list(self._all):
            connection.abort()
        await self._until_empty(1.0)
        self.close()

    def close(self) -> None:
        """Look at no more deadlines."""
        self._timer.cancel()

    async def _until_empty(self, timeout_s: float) -> None:
        if not self._all and not self.tasks:
            return
        self._empty = self.loop.create_future()
        await asyncio.wait([self._empty], timeout=timeout_s)
        self._empty = None

    def _look_empty(self) -> None:
        if self._empty is not None and not self._empty.done() and not self._all and not self.tasks:
            self._empty.set_result(None)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._look_empty()

    def _tick(self) -> None:
        now = self.now()
        self.idle_deadline = now + self.limits.idle_timeout_s + self._tick_s
        self._timer = self.loop.call_later(self._tick_s, self._tick)
        for connection in [each for each in self._all if each.deadline <= now]:
            connection.expire()


def client_key(client: tuple[str, int] | None) -> str | None:
    """What connections of one client have in common: the address, of IPv6 its /64. None for loopback and local sockets."""
    if client is None or client[0].startswith("127."):
        return None
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        else:
            return None if address.is_loopback else str(ipaddress.IPv6Network((address, 64), strict=False))
    return None if address.is_loopback else str(address)


def _shortest(limits: HttpSettings) -> float:
    return min(
        limits.first_byte_timeout_s,
        limits.idle_timeout_s,
        limits.head_timeout_s,
        limits.body_timeout_s,
        limits.write_timeout_s,
        limits.half_closed_timeout_s,
    )
