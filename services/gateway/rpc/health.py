"""The health-checking service of gRPC (``grpc.health.v1``): the whole server, and each of its services by name.

References
----------
gRPC, "GRPC Health Checking Protocol".
"""

import asyncio
from collections.abc import Collection

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from libs.errors import InvalidArgumentError, NotFoundError, OverloadedError
from services.gateway.health import Health
from services.gateway.rpc.calls import StreamCall, UnaryCall
from services.gateway.rpc.http2 import Connection

SERVICE = "grpc.health.v1.Health"

MOST_WATCHES = 8
"""Watches of one connection; a client needs one for each service that it looks after, and there are two."""

_LOOK_S = 0.5
_LONGEST_NAME = 200


class HealthService:
    """Tells whether the gateway takes requests; ``services`` are the names that may be asked for.

    All watches share one timer, which runs while there are any.
    """

    def __init__(self, health: Health, services: Collection[str]) -> None:
        self._health = health
        self._services = frozenset(("", *services))
        self._watches: dict[Connection, set[_Watch]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def check(self, call: UnaryCall, message: bytes) -> None:
        """The state now."""
        name = _service(message)
        if name not in self._services:
            raise NotFoundError(f"there is no service {name!r}")
        call.reply(HealthCheckResponse(status=self.status(name)).SerializeToString())

    def watch(self, call: StreamCall) -> "_Watch":
        """The state now, and again whenever it has changed."""
        return _Watch(self, call)

    def status(self, name: str) -> int:
        """The state of a service."""
        if name not in self._services:
            return int(HealthCheckResponse.SERVICE_UNKNOWN)
        return int(HealthCheckResponse.SERVING if self._health.is_ready else HealthCheckResponse.NOT_SERVING)

    def join(self, watch: "_Watch", connection: Connection) -> None:
        """Tell a watch the state, now and whenever it has changed; raises ``OverloadedError`` when the connection has enough of them."""
        watches = self._watches.setdefault(connection, set())
        if len(watches) >= MOST_WATCHES:
            raise OverloadedError(f"a connection has at most {MOST_WATCHES} watches")
        watches.add(watch)
        watch.tell()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def leave(self, watch: "_Watch", connection: Connection) -> None:
        """Forget a watch, if it has joined."""
        watches = self._watches.get(connection, set())
        watches.discard(watch)
        if not watches:
            self._watches.pop(connection, None)
        if not self._watches and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        for watch in [watch for watches in self._watches.values() for watch in watches]:
            watch.tell()
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)


class _Watch:
    def __init__(self, health: HealthService, call: StreamCall) -> None:
        self._health = health
        self._call = call
        self._name: str | None = None
        self._told: int | None = None

    def message(self, message: bytes) -> None:
        if self._name is not None:
            raise InvalidArgumentError("the method takes one message; more came")
        self._name = _service(message)
        self._health.join(self, self._call.stream.connection)

    def ended(self) -> None:
        if self._name is None:
            raise InvalidArgumentError("the request ended before its message was complete")

    def drained(self) -> None: ...

    def gone(self) -> None:
        self._health.leave(self, self._call.stream.connection)

    def tell(self) -> None:
        """Send the state if it is another than the last one sent."""
        status = self._health.status(self._name or "")
        if status != self._told:
            self._told = status
            self._call.send(HealthCheckResponse(status=status).SerializeToString())


def _service(message: bytes) -> str:
    """The service asked for; of a name that is longer than any of ours no more is kept than tells that."""
    try:
        return str(HealthCheckRequest.FromString(message).service)[:_LONGEST_NAME]
    except DecodeError as error:
        raise InvalidArgumentError("the request is not a serialised HealthCheckRequest") from error
