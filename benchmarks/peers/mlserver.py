"""MLServer with its scikit-learn runtime."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.peers import bodies
from benchmarks.peers.environments import Environment
from benchmarks.peers.peer import Form, Peer, Place, Request

_BATCHED = ("iris", "boosted")


class MLServer(Peer):
    """V2 in JSON over REST, and with raw contents over gRPC; it has no binary tensors over REST.

    Inference is in the server's own process: its worker processes do not start with the uvloop of its environment. Its batching is on
    where it helped (one row a request) and off where it did not (many rows).
    """

    name = "mlserver"
    title = "MLServer 1.7"
    environment = Environment("mlserver", ("mlserver==1.7.1", "mlserver-sklearn==1.7.1", "scikit-learn==1.9.1"))
    forms = frozenset({Form.JSON, Form.GRPC})
    ready_path = "/v2/health/ready"

    def command(self, python: Path, place: Place) -> list[str]:
        settings = {
            "host": "127.0.0.1",
            "http_port": place.port,
            "grpc_port": place.grpc_port,
            "metrics_endpoint": None,
            "parallel_workers": 0,
            "debug": False,
        }
        folder = place.scratch / "mlserver"
        folder.mkdir(exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings))
        for model in place.models.glob("*.joblib"):
            described = {"name": model.stem, "implementation": "mlserver_sklearn.SKLearnModel", "parameters": {"uri": str(model)}}
            if model.stem in _BATCHED:
                described |= {"max_batch_size": 64, "max_batch_time": 0.001}
            (folder / model.stem).mkdir(exist_ok=True)
            (folder / model.stem / "model-settings.json").write_text(json.dumps(described))
        return [str(python.with_name("mlserver")), "start", str(folder)]

    def request(self, place: Place, model: str, rows: np.ndarray, form: Form) -> Request:
        if form is Form.GRPC:
            return Request(f"127.0.0.1:{place.grpc_port}", bodies.v2_protobuf(model, rows, "input"), {})
        return Request(f"{place.url}/v2/models/{model}/infer", bodies.v2_json(rows, "input"))

    def labels(self, answer: bytes, headers: Mapping[str, str], form: Form) -> list[int]:  # noqa: ARG002
        return bodies.v2_labels(answer)
