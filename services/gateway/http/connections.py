"""All connections together: how many there may be, whose deadline has passed, and their end."""

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any

from services.gateway.http.connection import Connection
from services.gateway.http.exchange import Application
from services.gateway.http.heads import RefusedError
from services.gateway.settings import HttpSettings

log = logging.getLogger(__name__)

TICK_S = 1.0
"""How often deadlines are looked at; one that passes in between is noticed so much later."""

SPARE_CONNECTIONS = 256
"""So many beyond the most may be told that there is no room; further ones are closed without a word."""


class Connections:
    """The connections of one server. Made and used on the event loop.

    Attributes
    ----------
    refused
        How often the server itself refused a request or a connection, by status.
    held_bytes
        Memory taken by bodies that came in more than one piece and are not answered yet.
    idle_deadline
        When a connection that becomes idle now must have spoken, as seen at the last tick: never too early, late by a tick at most.
    """

    def __init__(self, application: Application, limits: HttpSettings, loop: asyncio.AbstractEventLoop) -> None:
        self.admit = application.admit
        self.handle = application.handle
        self.limits = limits
        self.loop = loop
        self.now = loop.time
        self.is_draining = False
        self.held_bytes = 0
        self.refused: Counter[int] = Counter()
        self._all: set[Connection] = set()
        self._per_client: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty: asyncio.Future[None] | None = None
        self._tick_s = min(TICK_S, _shortest(limits) / 4)
        self._timer: asyncio.TimerHandle | None = None
        self._tick()

    def __len__(self) -> int:
        return len(self._all)

    def make(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self)

    def enter(self, connection: Connection) -> RefusedError | None:
        """Count a new connection; the value is why it cannot stay."""
        self._all.add(connection)
        connection.key = client_key(connection.client)
        if connection.key is not None:
            self._per_client[connection.key] += 1
            if self._per_client[connection.key] > self.limits.max_connections_per_client:
                return self._no_room("your address has too many connections open")
        if len(self._all) > self.limits.max_connections:
            return self._no_room("the gateway has too many connections open")
        return None

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
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def count_refusal(self, status: int) -> None:
        """Note that the server itself refused something."""
        self.refused[int(status)] += 1

    async def drain(self, timeout_s: float) -> None:
        """Let requests in flight end for up to ``timeout_s``, then break them off. Nobody must accept any longer."""
        self.is_draining = True
        for connection in list(self._all):
            connection.drain()
        await self._until_empty(timeout_s)
        if self._all or self._tasks:
            log.warning("%d requests were broken off: they took longer than %g s to end", len(self._all), timeout_s)
        for task in self._tasks:
            task.cancel()
        for connection in list(self._all):
            connection.abort()
        await self._until_empty(1.0)
        if self._timer is not None:
            self._timer.cancel()

    async def _until_empty(self, timeout_s: float) -> None:
        if not self._all and not self._tasks:
            return
        self._empty = self.loop.create_future()
        await asyncio.wait([self._empty], timeout=timeout_s)
        self._empty = None

    def _look_empty(self) -> None:
        if self._empty is not None and not self._empty.done() and not self._all and not self._tasks:
            self._empty.set_result(None)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._look_empty()

    def _tick(self) -> None:
        now = self.now()
        self.idle_deadline = now + self.limits.idle_timeout_s + self._tick_s
        for connection in [each for each in self._all if each.deadline <= now]:
            connection.expire()
        self._timer = self.loop.call_later(self._tick_s, self._tick)

    def _no_room(self, message: str) -> RefusedError | None:
        return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, message)


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
