"""``/metrics`` and ``/readyz`` of a service that has no HTTP door of its own."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from libs.metrics.exposition import Exposition

log = logging.getLogger(__name__)

PATH = "/metrics"
READY_PATH = "/readyz"

_MAX_CONNECTIONS = 8
_HEAD_BYTES = 8_192
_HEAD_TIMEOUT_S = 5.0
_WRITE_TIMEOUT_S = 10.0


class MetricsServer:
    """Answers ``GET /metrics``, and ``GET /readyz`` of a service that can tell, one request per connection.

    A port that is taken does not keep the service from starting: its numbers are missing then, and its log says so.

    Parameters
    ----------
    port
        0: no server.
    is_ready
        Whether the service can do its work; None: it cannot tell.

    Attributes
    ----------
    bound_port
        The port listened on, once started; 0 when there is none.
    """

    def __init__(self, exposition: Exposition, host: str, port: int, is_ready: Callable[[], bool] | None = None) -> None:
        self._exposition = exposition
        self._is_ready = is_ready
        self._host = host
        self._port = port
        self.bound_port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        if self._port == 0:
            return
        try:
            self._server = await asyncio.start_server(self._accept, self._host, self._port, limit=_HEAD_BYTES)
        except OSError as error:
            log.warning("metrics are not served: %s:%d cannot be listened on: %s", self._host, self._port, error.strerror)
            return
        self.bound_port = self._server.sockets[0].getsockname()[1]

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= _MAX_CONNECTIONS:
            writer.close()
            return
        connection = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEAD_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
            writer.write(self._answer(head))
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return
        finally:
            writer.close()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_WRITE_TIMEOUT_S):
                    await writer.wait_closed()

    def _answer(self, head: bytes) -> bytes:
        request, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path != PATH and (path != READY_PATH or self._is_ready is None):
            return _response("404 Not Found", b'{"error": "there is nothing here but /metrics"}', "application/json")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", f'{{"error": "{path} takes GET"}}'.encode(), "application/json", "allow: GET\r\n")
        if path == READY_PATH and self._is_ready is not None:
            status, body = ("200 OK", b'{"ready": true}') if self._is_ready() else ("503 Service Unavailable", b'{"ready": false}')
            return _response(status, body, "application/json", with_body=method == "GET")
        accept = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("accept:")), "")
        body, content_type = self._exposition.render(accept)
        return _response("200 OK", body, content_type, with_body=method == "GET")


def _response(status: str, body: bytes, content_type: str, headers: str = "", *, with_body: bool = True) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n{headers}connection: close\r\n\r\n"
    return head.encode("latin-1") + (body if with_body else b"")
