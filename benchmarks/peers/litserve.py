"""LitServe."""

from pathlib import Path

from benchmarks.peers.environments import Environment
from benchmarks.peers.models import SCIKIT_LEARN
from benchmarks.peers.peer import SERVERS, Peer, Place


class LitServe(Peer):
    """Batches of up to 64 requests, and its faster queue."""

    name = "litserve"
    title = "LitServe 0.2"
    environment = Environment("litserve", ("litserve==0.2.19", *SCIKIT_LEARN))
    ready_path = "/health"

    def command(self, python: Path, place: Place) -> list[str]:
        return [str(python), str(SERVERS / "litserve_server.py"), str(place.models), str(place.port)]
