"""A gateway of a few lines on a loopback port: answers are set by the test, requests are kept."""

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class Request:
    """A request as it arrived; ``path`` is without the query, still percent-encoded."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]
Handler = Callable[[Request], Answer]

END = object()


class FakeGateway:
    """Answers what it was told to answer; anything else is a 404 as the real one words it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._handlers: dict[tuple[str, str], Handler] = {}
        self._subscribers: list[queue.SimpleQueue[Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def on(self, method: str, path: str, answer: Any = None, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer a request with a fixed body, or with what a function of the request returns."""
        self._handlers[method, path] = answer if callable(answer) else lambda _: (status, answer, headers or {})

    def publish(self, *events: dict[str, Any]) -> None:
        """Send events to everyone who follows them."""
        for subscriber in self._subscribers:
            for event in events:
                subscriber.put(event)

    def sent(self, method: str, path: str) -> Request:
        """The last request of that method and path."""
        return next(request for request in reversed(self.requests) if (request.method, request.path) == (method, path))

    def close(self) -> None:
        for subscriber in self._subscribers:
            subscriber.put(END)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        handler = self._handlers.get((request.method, request.path))
        return handler(request) if handler else (404, {"error": f"there is nothing at {request.path}"})

    def follow(self) -> "queue.SimpleQueue[Any]":
        subscriber: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._subscribers.append(subscriber)
        return subscriber

    def _handler_class(gateway) -> type[BaseHTTPRequestHandler]:
        class _Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, parts.path, dict(parse_qsl(parts.query)), headers, body)
                if parts.path == "/api/v1/events" and request.query.get("follow") == "true":
                    self._stream(gateway.follow())
                    return
                status, answer, *more = gateway.answer(request)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in (more[0] if more else {}).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _stream(self, events: "queue.SimpleQueue[Any]") -> None:
                self.close_connection = True
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(b": subscribed\n\n")
                while (event := events.get()) is not END:
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

            do_GET = do_POST = do_PUT = do_DELETE = _serve

            def log_message(self, *_: Any) -> None:
                pass

        return _Handler
