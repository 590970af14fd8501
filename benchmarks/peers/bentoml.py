"""BentoML."""

from collections.abc import Mapping
from pathlib import Path

import orjson

from benchmarks.peers.environments import Environment
from benchmarks.peers.models import SCIKIT_LEARN
from benchmarks.peers.peer import SERVERS, Form, Peer, Place


class BentoML(Peer):
    """One worker; arrays in JSON in and out."""

    name = "bentoml"
    title = "BentoML 1.4"
    environment = Environment("bentoml", ("bentoml==1.4.39", *SCIKIT_LEARN))
    ready_path = "/readyz"

    def command(self, python: Path, place: Place) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(place.port), "--working-dir", str(SERVERS)]
        return [str(python), "-m", "bentoml", "serve", "bentoml_service:Service", *options]

    def variables(self, place: Place) -> dict[str, str]:
        return {"MODELS": str(place.models), "BENTOML_HOME": str(place.scratch / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}

    def labels(self, answer: bytes, headers: Mapping[str, str], form: Form) -> list[int]:  # noqa: ARG002
        return list(orjson.loads(answer))
