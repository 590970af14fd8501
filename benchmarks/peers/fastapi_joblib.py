"""FastAPI, pandas and joblib, written by hand, in one process."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.peers import bodies
from benchmarks.peers.environments import Environment
from benchmarks.peers.models import SCIKIT_LEARN
from benchmarks.peers.peer import SERVERS, Form, Peer, Place, Request

ENVIRONMENT = Environment("fastapi", ("fastapi==0.165.0", "uvicorn==0.54.0", "httptools==0.9.0", "uvloop==0.23.0", *SCIKIT_LEARN))


class FastApiJoblib(Peer):
    """Its binary form is the hand's own: bare doubles in, bare integers out."""

    name = "fastapi"
    title = "FastAPI + joblib, by hand"
    environment = ENVIRONMENT
    forms = frozenset({Form.JSON, Form.BINARY})
    models = frozenset({*Peer.models, "table"})
    ready_path = "/openapi.json"

    def command(self, python: Path, place: Place) -> list[str]:
        return [str(python), str(SERVERS / "fastapi_joblib.py"), str(place.models), str(place.port)]

    def request(self, place: Place, model: str, rows: np.ndarray, form: Form) -> Request:
        if form is Form.JSON:
            return Request(f"{place.url}/{model}:predict", bodies.instances(rows))
        return Request(f"{place.url}/{model}:raw", bodies.raw_doubles(rows), {"content-type": bodies.BINARY_TYPE})

    def labels(self, answer: bytes, headers: Mapping[str, str], form: Form) -> list[int]:  # noqa: ARG002
        return bodies.predictions(answer) if form is Form.JSON else bodies.raw_labels(answer)
