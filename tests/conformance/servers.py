"""The servers of the table, each started with the same model: Millrace from this tree, MLServer and KServe's from their packages.

MLServer and KServe live in environments of their own (``benchmarks/peers/environments.py``), installed when first needed.
"""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import joblib
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from benchmarks.peers.kserve import KServe
from benchmarks.peers.mlserver import MLServer
from benchmarks.peers.peer import Peer, Place
from tests.conftest import free_port
from tests.e2e.platforms import RunningPlatform

MODEL = "iris"
_OUTPUTS = (("predict", "INT64", [-1, 1]), ("predict_proba", "FP64", [-1, 3]))


@dataclass(frozen=True)
class Address:
    """Where a started server is asked for the model."""

    url: str
    grpc: str
    version: str | None = None


@dataclass(frozen=True)
class Server:
    """A column of the table; ``running`` starts it and ends it."""

    title: str
    about: str
    running: Callable[[], AbstractContextManager[Address]]


@contextmanager
def millrace() -> Iterator[Address]:
    """The whole platform, as ``millrace up`` starts it, with the model uploaded and deployed."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        grpc_port = free_port()
        platform = RunningPlatform(Path(folder), "embedded", GATEWAY_GRPC_PORT=str(grpc_port))
        try:
            platform.up()
            file = io.BytesIO()
            joblib.dump(_estimator(), file)
            answer = platform.upload(file.getvalue(), MODEL)
            assert answer.status_code == 201, answer.text
            platform.version_when(MODEL, "validated")
            platform.serve(MODEL)
            yield Address(platform.url, f"127.0.0.1:{grpc_port}", "1")
        finally:
            platform.down()
            platform.close()


class _MLServer(MLServer):
    """MLServer, told what its scikit-learn runtime takes and gives: it does not find out by itself."""

    def command(self, python: Path, place: Place) -> list[str]:
        command = super().command(python, place)
        path = place.scratch / "mlserver" / MODEL / "model-settings.json"
        settings = json.loads(path.read_text())
        settings["parameters"]["version"] = "1"
        settings["inputs"] = [{"name": "input", "datatype": "FP64", "shape": [-1, 4]}]
        settings["outputs"] = [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in _OUTPUTS]
        path.write_text(json.dumps(settings))
        return command


class _KServe(KServe):
    """KServe's server, with a model that says what it takes and gives."""

    def command(self, python: Path, place: Place) -> list[str]:
        command = super().command(python, place)
        command[1] = str(Path(__file__).with_name("kserve_server.py"))
        return command


def _peer(peer: Peer, version: str | None) -> Callable[[], AbstractContextManager[Address]]:
    @contextmanager
    def running() -> Iterator[Address]:
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            models = Path(folder) / "models"
            models.mkdir()
            joblib.dump(_estimator(), models / f"{MODEL}.joblib")
            place = Place(models, Path(folder), free_port(), free_port())
            with peer.running(place):
                yield Address(place.url, f"127.0.0.1:{place.grpc_port}", version)

    return running


def _estimator() -> LogisticRegression:
    return LogisticRegression(max_iter=1000).fit(*load_iris(return_X_y=True))


SERVERS = (
    Server("Millrace", f"millrace {metadata.version('millrace')}, from this tree", millrace),
    Server("MLServer", ", ".join(MLServer.environment.requirements), _peer(_MLServer(), "1")),
    Server("KServe", ", ".join(KServe.environment.requirements), _peer(_KServe(), None)),
)
