"""A bare ASGI application that answers what it was sent: no model, no parsing, the ceiling of a Python server."""

from pathlib import Path

from benchmarks.peers.fastapi_joblib import ENVIRONMENT
from benchmarks.peers.peer import SERVERS, Form, Peer, Place


class AsgiEcho(Peer):
    """The request's body comes back."""

    name = "asgi"
    title = "bare ASGI echo (no model): the ceiling"
    environment = ENVIRONMENT
    forms = frozenset({Form.JSON, Form.BINARY})
    models = frozenset()

    def command(self, python: Path, place: Place) -> list[str]:
        return [str(python), str(SERVERS / "asgi_echo.py"), str(place.port)]
