"""The health-checking service of gRPC (``grpc.health.v1``): the whole server, and each of its services by name.

References
----------
gRPC, "GRPC Health Checking Protocol".
"""

import asyncio
from collections.abc import Collection

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from libs.errors import InvalidArgumentError, NotFoundError
from services.gateway.health import Health
from services.gateway.rpc.calls import StreamCall, UnaryCall

SERVICE = "grpc.health.v1.Health"
_LOOK_S = 0.5


class HealthService:
    """Tells whether the gateway takes requests; ``services`` are the names that may be asked for."""

    def __init__(self, health: Health, services: Collection[str]) -> None:
        self._health = health
        self._services = frozenset(("", *services))

    def check(self, call: UnaryCall, message: bytes) -> None:
        """The state now."""
        name = _service(message)
        if name not in self._services:
            raise NotFoundError(f"there is no service {name[:200]!r}")
        call.reply(HealthCheckResponse(status=self.status(name)).SerializeToString())

    def watch(self, call: StreamCall) -> "_Watch":
        """The state now, and again whenever it has changed."""
        return _Watch(self, call)

    def status(self, name: str) -> int:
        """The state of a service."""
        if name not in self._services:
            return int(HealthCheckResponse.SERVICE_UNKNOWN)
        return int(HealthCheckResponse.SERVING if self._health.is_ready else HealthCheckResponse.NOT_SERVING)


class _Watch:
    def __init__(self, health: HealthService, call: StreamCall) -> None:
        self._health = health
        self._call = call
        self._name: str | None = None
        self._told: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    def message(self, message: bytes) -> None:
        if self._name is not None:
            raise InvalidArgumentError("the method takes one message; more came")
        self._name = _service(message)
        self._look()

    def ended(self) -> None:
        if self._name is None:
            raise InvalidArgumentError("the request ended before its message was complete")

    def drained(self) -> None: ...

    def gone(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        status = self._health.status(self._name or "")
        if status != self._told:
            self._told = status
            self._call.send(HealthCheckResponse(status=status).SerializeToString())
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)


def _service(message: bytes) -> str:
    try:
        return str(HealthCheckRequest.FromString(message).service)
    except DecodeError as error:
        raise InvalidArgumentError("the request is not a serialised HealthCheckRequest") from error
