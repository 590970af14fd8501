"""Ray Serve by itself."""

from pathlib import Path

from benchmarks.peers.environments import Environment
from benchmarks.peers.models import SCIKIT_LEARN
from benchmarks.peers.peer import SERVERS, Peer, Place


class RayServe(Peer):
    """Its Python proxy, ``@serve.batch``, one replica a model, and the switch it has for throughput."""

    name = "ray-serve"
    title = "Ray Serve 2.60, alone"
    environment = Environment("ray-serve", ("ray[serve]==2.60.0", *SCIKIT_LEARN))
    ready_path = "/-/healthz"

    def command(self, python: Path, place: Place) -> list[str]:
        return [str(python), str(SERVERS / "ray_serve.py"), str(place.models), str(place.port)]

    def variables(self, place: Place) -> dict[str, str]:  # noqa: ARG002
        return {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
