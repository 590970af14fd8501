"""Where a benchmark's traces go: a Jaeger if one is built, else something that accepts them."""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.integration.servers import JAEGER, run_jaeger


@contextmanager
def collector() -> Iterator[tuple[str, str]]:
    """OTLP over HTTP; yields its base URL and what it is."""
    if JAEGER.path.exists():
        with tempfile.TemporaryDirectory(prefix="mr-jaeger-") as folder, run_jaeger(Path(folder)) as jaeger:
            yield jaeger.otlp_http, f"Jaeger {JAEGER.version}"
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", "a sink that accepts and forgets"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""
