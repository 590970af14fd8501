"""The gRPC server as a component: one socket, its connections, and the services that are spoken over them."""

import asyncio
import contextlib
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from grpc_health.v1 import health_pb2

from libs.errors import DeadlineExceededError, MillraceError
from libs.inference.oip_proto import open_inference_pb2
from services.gateway.access import AccessControl
from services.gateway.health import Health
from services.gateway.http.connections import client_key
from services.gateway.listening import listener
from services.gateway.predictions import Handler
from services.gateway.refusals import Refused, nobody
from services.gateway.routes import Door, HttpRoute, Permission
from services.gateway.rpc import health, inference, reflection
from services.gateway.rpc.calls import Budget, CallLimits, Method, Open, Router, StreamCall, UnaryCall, streaming, told, unary
from services.gateway.rpc.framing import PREFIX
from services.gateway.rpc.health import HealthService
from services.gateway.rpc.http2 import Connection, Limits
from services.gateway.rpc.inference import DataPlane, InferenceService
from services.gateway.rpc.reflection import Reflection
from services.gateway.settings import GrpcSettings
from services.gateway.tracing import Tracing

_SWEEP_S = 1.0
_BACKLOG = 1024

if sys.platform == "darwin":
    _KEEPIDLE = socket.TCP_KEEPALIVE
else:
    _KEEPIDLE = socket.TCP_KEEPIDLE
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, _KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""A peer that vanished without a word is found out after two minutes: 60 s, and four times 15. Nothing else tells, because a call that is
open may be silent for longer."""

_SMALL_BYTES = 65_536
_SMALL_BUFFERED_BYTES = 16 * 2**20
"""Largest message of a method that takes no tensors, and memory for all of those that are not complete. Some need no key: who has none may
not use up the memory that predictions are received in."""


def methods(
    dataplane: DataPlane, told_by_rest: Mapping[tuple[str, str], Handler], state: Health, refused: Refused = nobody
) -> list[Method]:
    """Every method of the gRPC door, with the permission that a caller needs for it; None: it is public."""
    service = InferenceService(dataplane, told_by_rest, refused)
    healthy = HealthService(state, (inference.SERVICE,))
    reflected = Reflection((open_inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR))
    predict, small = Permission.PREDICT, CallLimits(_SMALL_BYTES, Budget(_SMALL_BUFFERED_BYTES))
    return [
        _method(inference.SERVICE, "ModelInfer", predict, unary(service.infer, service.refuse), refused=service.refuse),
        _method(inference.SERVICE, "ModelStreamInfer", predict, streaming(service.infer_stream), refused=service.refuse),
        _method(inference.SERVICE, "ServerLive", None, told(service.server_live), small),
        _method(inference.SERVICE, "ServerReady", None, told(service.server_ready), small),
        _method(inference.SERVICE, "ServerMetadata", predict, told(service.server_metadata), small),
        _method(inference.SERVICE, "ModelReady", predict, told(service.model_ready), small),
        _method(inference.SERVICE, "ModelMetadata", predict, told(service.model_metadata), small),
        _method(inference.SERVICE, "ModelConfig", predict, told(service.model_config), small),
        _method(inference.SERVICE, "ModelStatistics", predict, told(service.statistics), small),
        _method(inference.SERVICE, "RepositoryIndex", predict, told(service.index), small),
        _method(inference.SERVICE, "RepositoryModelLoad", predict, told(service.load), small),
        _method(inference.SERVICE, "RepositoryModelUnload", predict, told(service.unload), small),
        _method(health.SERVICE, "Check", None, unary(healthy.check), small),
        _method(health.SERVICE, "Watch", None, streaming(healthy.watch), small),
        *(_method(name, "ServerReflectionInfo", predict, streaming(reflected.open), small) for name in reflection.SERVICES),
    ]


def _method(
    service: str,
    name: str,
    permission: Permission | None,
    begin: Open,
    limits: CallLimits | None = None,
    refused: Callable[[MillraceError], None] | None = None,
) -> Method:
    return Method(HttpRoute("POST", f"/{service}/{name}", permission, Door.PLAIN), begin, limits, refused)


class GrpcServer:
    """Serves the methods.

    ``stop`` takes no new connections and calls, lets calls in flight end for up to ``drain_timeout_s``, and then cuts them.

    Parameters
    ----------
    message_bytes
        Largest message, before and after decompression.
    reuse_port
        Whether other processes listen on the port too.

    Attributes
    ----------
    port
        The port listened on, once started.
    """

    def __init__(
        self,
        access: AccessControl,
        methods: Sequence[Method],
        settings: GrpcSettings,
        host: str,
        tracing: Tracing,
        *,
        message_bytes: int,
        drain_timeout_s: float,
        reuse_port: bool = False,
    ) -> None:
        self._settings = settings
        self._host = host
        self._drain_timeout_s = drain_timeout_s
        self._reuse_port = reuse_port
        self._router = Router(access, methods, CallLimits(message_bytes, Budget(max(settings.max_buffered_bytes, message_bytes))), tracing)
        self._limits = Limits(
            streams=settings.max_streams,
            stream_window_bytes=min(message_bytes + PREFIX.size + 2**16, 2**31 - 1),
            header_block_bytes=settings.max_metadata_bytes,
            first_request_s=settings.header_timeout_s,
            block_s=settings.header_timeout_s,
            idle_s=settings.idle_timeout_s,
            body_s=settings.body_timeout_s,
            write_s=settings.write_timeout_s,
        )
        self._connections: set[Connection] = set()
        self._per_client: Counter[str] = Counter()
        self._server: asyncio.Server | None = None
        self._drained: asyncio.Event | None = None
        self.port = settings.port

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    async def start(self) -> None:
        opened = listener(
            self._host,
            self.port,
            ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *_KEEPALIVE),
            handed_over=self._settings.sockets,
            reuse_port=self._reuse_port,
            variable="GATEWAY_GRPC_PORT",
        )
        self.port = opened.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(self._connection, sock=opened, backlog=_BACKLOG)

    async def run(self) -> None:
        """Close what is stalled or idle."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.sweep(loop.time())

    def sweep(self, now_s: float) -> None:
        """Look after all connections once."""
        for connection in list(self._connections):
            for stream in connection.late(now_s):
                if isinstance(stream.receiver, UnaryCall | StreamCall):
                    stream.receiver.expire(
                        DeadlineExceededError(f"the message was not complete after {self._settings.body_timeout_s:.0f} s")
                    )
            connection.sweep(now_s)

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.leave()
        if self._connections:
            self._drained = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), self._drain_timeout_s)
        for connection in list(self._connections):
            connection.abort()

    def _connection(self) -> Connection:
        return Connection(asyncio.get_running_loop(), self._router.accept, self._limits, self._made, self._lost)

    def _made(self, connection: Connection) -> bool:
        """Count a connection; the value is whether it may stay."""
        self._connections.add(connection)
        key = client_key(connection.client)
        if key is not None:
            self._per_client[key] += 1
        return len(self._connections) <= self._settings.max_connections and (
            key is None or self._per_client[key] <= self._settings.max_connections_per_client
        )

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        key = client_key(connection.client)
        if key is not None:
            self._per_client[key] -= 1
            if not self._per_client[key]:
                del self._per_client[key]
        if self._drained is not None and not self._connections:
            self._drained.set()
