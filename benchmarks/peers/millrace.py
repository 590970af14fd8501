"""Millrace itself, as its user runs it: ``millrace up --detach`` in a home of its own, with what production has switched on.

Authentication by an API key, validation against the signature, metrics, the prediction log on a real Kafka, and traces of one request in a
hundred. The home lasts from round to round: models are uploaded and deployed once.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
import psutil

from benchmarks.peers import bodies
from benchmarks.peers.models import another_version
from benchmarks.peers.peer import Form, Peer, PeerError, Place, Request
from benchmarks.platform import Platform, platform

SPLIT = "split"
"""An endpoint with two versions of ``cancer``, half of the traffic each."""


@dataclass(frozen=True)
class Features:
    """What is switched on beside serving."""

    prediction_log: bool = True
    sampled: float = 0.01
    workers: int = 1


class Millrace(Peer):
    """V1 and V2 over REST, V2 over gRPC.

    Parameters
    ----------
    collector
        Where traces go: base URL of OTLP over HTTP.
    deployed
        Models of the place to deploy, each to an endpoint of its name, and ``split``.
    """

    name = "millrace"
    title = "Millrace"
    forms = frozenset(Form)

    def __init__(
        self, collector: str, features: Features | None = None, deployed: Sequence[str] = ("iris", "cancer", "boosted", "table", SPLIT)
    ) -> None:
        self._collector = collector
        self._features = features or Features()
        self._deployed = tuple(deployed)
        self._key = secrets.token_urlsafe(24)
        self.platform: Platform | None = None

    @property
    def models(self) -> frozenset[str]:  # type: ignore[override]
        """What is deployed."""
        return frozenset(self._deployed)

    @property
    def headers(self) -> dict[str, str]:
        """What each request needs."""
        return {"authorization": f"Bearer {self._key}"}

    def install(self) -> None:
        """It is here."""

    def request(self, place: Place, model: str, rows: np.ndarray, form: Form) -> Request:
        if form is Form.GRPC:
            return Request(f"127.0.0.1:{place.grpc_port}", bodies.v2_protobuf(model, rows, "input"), self.headers)
        if form is Form.BINARY:
            body, headers = bodies.v2_binary(rows, "input")
            return Request(f"{self.url}/v2/models/{model}/infer", body, {**headers, **self.headers})
        headers = {"content-type": bodies.JSON_TYPE, **self.headers}
        return Request(f"{self.url}/v1/models/{model}:predict", bodies.instances(rows), headers)

    def labels(self, answer: bytes, headers: Mapping[str, str], form: Form) -> list[int]:
        return bodies.predictions(answer) if form is Form.JSON else bodies.v2_binary_labels(answer, headers)

    @property
    def url(self) -> str:
        """Base URL of the running platform."""
        return self._running().url

    @contextmanager
    def running(self, place: Place) -> Iterator[None]:
        home = place.scratch / "home"
        with platform(home, **self._variables(place)) as (started, _):
            self.platform = started
            try:
                self._deploy(place)
                yield
            finally:
                self.platform = None

    def gateway(self) -> list[psutil.Process]:
        """The processes of the gateway; raises ``PeerError`` when it has none at the moment."""
        parts = json.loads(self._running().run("status", "--json"))["parts"]
        (pid,) = [part["pid"] for part in parts if part["name"] == "gateway"]
        if pid is None:
            raise PeerError("the gateway is being restarted")
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]

    def scale(self, model: str, replicas: int) -> None:
        """Serve a model with so many replicas, and wait for them."""
        options = ["--min-replicas", str(replicas), "--max-replicas", str(replicas), "--wait"]
        self._running().run("endpoints", "deploy", model, "--model", model, *options)

    def _running(self) -> Platform:
        if self.platform is None:
            raise PeerError("the platform is not running")
        return self.platform

    def _variables(self, place: Place) -> dict[str, str]:
        features = self._features
        return {
            "GATEWAY_API_KEYS": f"benchmark:{self._key}",
            "MILLRACE_API_KEY": self._key,
            "GATEWAY_GRPC_PORT": str(place.grpc_port),
            "GATEWAY_WORKERS": str(features.workers),
            "OTEL_TRACES_SAMPLER_ARG": str(features.sampled),
            **({"OTEL_EXPORTER_OTLP_ENDPOINT": self._collector} if features.sampled else {}),
        }

    def _deploy(self, place: Place) -> None:
        run = self._running().run
        there = {endpoint["endpoint_name"] for endpoint in self._get("/api/v1/endpoints")["endpoints"]}
        for name in self._deployed:
            if name in there:
                continue
            source = "cancer" if name == SPLIT else name
            if not self._knows(source):
                run(
                    "models",
                    "upload",
                    str(place.models / f"{source}.joblib"),
                    "--name",
                    source,
                    "--example",
                    str(place.models / f"{source}.example.json"),
                    "--wait",
                )
            run("endpoints", "create", name)
            run("endpoints", "deploy", name, "--model", f"{source}@1", "--wait")
            if name == SPLIT:
                self._split(place)
        for name in self._deployed:
            self._set_prediction_log(name)

    def _split(self, place: Place) -> None:
        run = self._running().run
        second = another_version(place.scratch)
        run("models", "upload", str(second), "--name", "cancer", "--example", str(second.with_suffix(".example.json")), "--wait")
        run("endpoints", "deploy", SPLIT, "--model", "cancer@2", "--wait")
        run("endpoints", "traffic", SPLIT, "1=50", "2=50")

    def _set_prediction_log(self, endpoint: str) -> None:
        mode = "best_effort" if self._features.prediction_log else "off"
        answer = httpx.put(f"{self.url}/api/v1/endpoints/{endpoint}/prediction-log", json={"mode": mode}, headers=self.headers, timeout=30)
        if answer.status_code not in (200, 202, 404):
            raise PeerError(f"the prediction log of {endpoint} cannot be set: {answer.text[:200]}")

    def _knows(self, model: str) -> bool:
        return any(each["model_name"] == model for each in self._get("/api/v1/models")["models"])

    def _get(self, path: str) -> dict[str, list[dict[str, object]]]:
        answer = httpx.get(self.url + path, headers=self.headers, timeout=30)
        return dict(answer.raise_for_status().json())
