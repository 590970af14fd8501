"""KServe's model server."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.peers import bodies
from benchmarks.peers.environments import Environment
from benchmarks.peers.peer import SERVERS, Form, Peer, Place, Request


class KServe(Peer):
    """V1 for JSON, V2 with binary tensors, V2 over gRPC."""

    name = "kserve"
    title = "KServe 0.21"
    environment = Environment("kserve", ("kserve==0.21.0", "scikit-learn==1.9.1", "joblib==1.5.3"))
    forms = frozenset(Form)
    ready_path = "/v2/health/ready"

    def command(self, python: Path, place: Place) -> list[str]:
        options = [f"--http_port={place.port}", f"--grpc_port={place.grpc_port}", "--workers=1", "--enable_latency_logging=false"]
        return [str(python), str(SERVERS / "kserve_server.py"), str(place.models), *options]

    def request(self, place: Place, model: str, rows: np.ndarray, form: Form) -> Request:
        if form is Form.JSON:
            return Request(f"{place.url}/v1/models/{model}:predict", bodies.instances(rows))
        if form is Form.GRPC:
            return Request(f"127.0.0.1:{place.grpc_port}", bodies.v2_protobuf(model, rows, "input-0", None), {})
        return Request(f"{place.url}/v2/models/{model}/infer", *bodies.v2_binary(rows, "input-0", None))

    def labels(self, answer: bytes, headers: Mapping[str, str], form: Form) -> list[int]:
        return bodies.predictions(answer) if form is Form.JSON else bodies.v2_binary_labels(answer, headers)
