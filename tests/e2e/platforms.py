"""A whole platform, run as its user runs it: by the command line, in a home of its own, on free ports."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import joblib
import numpy as np
import psutil
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from libs.local.home import Home

PATIENT_GATEWAY = {
    "GATEWAY_REPLICA_WAIT_MS": "60000",
    "GATEWAY_PREDICT_TIMEOUT_MS": "60000",
    "GATEWAY_QUEUE_MS": "60000",
    "GATEWAY_COMMAND_WAIT_S": "60",
}
"""Where it is not its limits that are tested: on a busy machine a model takes long to load, and a service to start again."""


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RunningPlatform:
    """A platform that ``millrace up --detach`` starts and ``millrace down`` stops."""

    def __init__(self, home: Path, broker: str, **environment: str) -> None:
        self.home = home
        self.broker = broker
        self.port = free_port()
        self.grpc_port = free_port()
        self.kafka_port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "MILLRACE_HOME": str(home),
            "MILLRACE_URL": self.url,
            "GATEWAY_HTTP_PORT": str(self.port),
            "GATEWAY_GRPC_PORT": str(self.grpc_port),
            "MILLRACE_KAFKA_PORT": str(self.kafka_port),
            **environment,
        }
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def cli(self, *arguments: str, check: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run ``millrace``; fails with what it said when its exit code is not 0."""
        done = subprocess.run(
            [sys.executable, "-m", "libs.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"millrace {' '.join(arguments)} → {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def up(self) -> None:
        self.cli("up", "--detach", "--broker", self.broker)

    def down(self) -> None:
        self.cli("down")

    def status(self) -> dict[str, Any]:
        return json.loads(self.cli("status", "--json", check=False).stdout)

    def pid_of(self, part: str, timeout_s: float = 120) -> int:
        """Process id of a part, at once, as the supervisor wrote it down; one that is being restarted is waited for."""
        home, end = Home.at(self.home), time.monotonic() + timeout_s
        while time.monotonic() < end:
            for row in home.read_state().get("parts", ()):
                if row["name"] == part and row["pid"] is not None:
                    return int(row["pid"])
            time.sleep(0.05)
        raise AssertionError(f"{part} has no process after {timeout_s} s")

    def processes(self) -> list[psutil.Process]:
        """Every process that carries this platform's home: in its environment, or, as runners do, in its command line."""
        found = []
        for process in psutil.process_iter():
            try:
                carries = process.environ().get("MILLRACE_HOME") == str(self.home) or str(self.home) in " ".join(process.cmdline())
                if process.pid != os.getpid() and carries:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def version(self, model: str, version: int = 1) -> dict[str, Any]:
        return self.http.get(f"/api/v1/models/{model}/versions/{version}").json()

    def version_when(self, model: str, *statuses: str, version: int = 1, timeout_s: float = 180) -> dict[str, Any]:
        """The version once it has one of these statuses."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                view = self.version(model, version)
            except httpx.TransportError:
                view = {}
            if view.get("status") in statuses:
                return view
            time.sleep(0.2)
        raise AssertionError(f"{model}@{version} is not one of {statuses} after {timeout_s} s: {view}")

    def runners(self, model: str) -> list[psutil.Process]:
        """The runners that serve a model's versions."""
        digests = {
            version["spec"]["artifact"]["sha256"] for version in self.http.get(f"/api/v1/models/{model}/versions").json()["versions"]
        }
        return [process for process in self.processes() if any(digest in " ".join(process.cmdline()) for digest in digests)]

    def artifact_of(self, model: str, version: int = 1) -> Path:
        """The file that runners of a version load."""
        digest: str = self.version(model, version)["spec"]["artifact"]["sha256"]
        return self.home / "cache" / "artifacts" / digest

    def replicas(self, endpoint: str) -> list[dict[str, Any]]:
        """Where an endpoint's deployments are answered for now."""
        deployments = self.http.get(f"/api/v1/endpoints/{endpoint}").json()["deployments"]
        return [replica for deployment in deployments for replica in deployment["replicas"]]

    def close(self) -> None:
        self.http.close()

    def upload(self, content: bytes, name: str, filename: str = "model.joblib", **body: Any) -> httpx.Response:
        artifact = self.http.post("/api/v1/artifacts", params={"filename": filename}, content=content)
        assert artifact.status_code == 201, artifact.text
        return self.http.post(f"/api/v1/models/{name}/versions", json={"artifact": artifact.json(), **body})

    def serve(self, name: str) -> None:
        """Deploy the newest validated version of a model to the endpoint of the same name and wait for it."""
        self.cli("endpoints", "create", name)
        self.cli("endpoints", "deploy", name, "--model", name, "--wait")

    def is_ready(self) -> bool:
        return self.http.get("/healthz").status_code == 200


def cancer_model(strength: float = 1.0) -> Any:
    """A real model on real data; ``strength`` makes its content another one."""
    features, labels = load_breast_cancer(return_X_y=True)
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(features, labels)


def samples() -> np.ndarray:
    """The features of every breast-cancer sample, shape (569, 30)."""
    return load_breast_cancer(return_X_y=True)[0]


def dumped(model: Any, path: Path) -> bytes:
    joblib.dump(model, path)
    return path.read_bytes()
