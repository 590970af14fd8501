"""The platform's own figures: start, upload to first prediction, equality of the answers, idle cost.

``python -m benchmarks.platform`` starts a platform in a temporary home (real Kafka; package caches warm after the first run), measures, and
stops it. Times are what a user waits for: from the command's start to its answer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import joblib
import numpy as np
import psutil
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.brokers import free_port
from benchmarks.tables import show


@dataclass(frozen=True)
class Platform:
    """A platform that was started for the benchmark."""

    home: Path
    url: str
    environment: dict[str, str]

    def run(self, *arguments: str) -> str:
        """Run the ``millrace`` command line; its standard output."""
        command = [sys.executable, "-m", "libs.cli", *arguments]
        return subprocess.run(command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def platform(home: Path, **variables: str) -> Iterator[tuple[Platform, float]]:
    """Start a platform; yields it with the seconds ``up --detach`` took, and stops it at the end.

    ``variables`` are environment variables of all its processes and of the command line, beside those that are inherited.
    """
    port = free_port()
    environment = {
        **os.environ,
        "MILLRACE_HOME": str(home),
        "GATEWAY_HTTP_PORT": str(port),
        "GATEWAY_GRPC_PORT": str(free_port()),
        "MILLRACE_KAFKA_PORT": str(free_port()),
        "MILLRACE_URL": f"http://127.0.0.1:{port}",
        **variables,
    }
    started = Platform(home, f"http://127.0.0.1:{port}", environment)
    begin = time.perf_counter()
    started.run("up", "--detach", "--broker", "kafka")
    took_s = time.perf_counter() - begin
    try:
        yield started, took_s
    finally:
        started.run("down")


def train(folder: Path, strength: float) -> tuple[Path, object, np.ndarray]:
    """Train a model on breast cancer data; ``strength`` makes its content differ from the others'."""
    features, labels = load_breast_cancer(return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(features, labels)
    path = folder / "model.joblib"
    joblib.dump(model, path)
    return path, model, features


def upload_to_prediction(target: Platform, folder: Path, name: str, strength: float) -> tuple[float, bool]:
    """Seconds from the start of the upload to the first HTTP prediction, and whether all answers equal the local model's."""
    path, model, features = train(folder, strength)
    example = folder / "example.json"
    example.write_text(json.dumps({"instances": features[:2].tolist()}))
    begin = time.perf_counter()
    target.run("models", "upload", str(path), "--name", name, "--example", str(example), "--wait")
    target.run("endpoints", "create", name)
    target.run("endpoints", "deploy", name, "--model", name, "--wait")
    body = {
        "inputs": [{"name": "input", "datatype": "FP64", "shape": list(features.shape), "data": features.ravel().tolist()}],
        "outputs": [{"name": "predict"}, {"name": "predict_proba"}],
    }
    answer = httpx.post(f"{target.url}/v2/models/{name}/infer", json=body, timeout=30).raise_for_status().json()
    took_s = time.perf_counter() - begin
    outputs = {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer["outputs"]}
    equal = np.array_equal(outputs["predict"], model.predict(features)) and np.array_equal(
        outputs["predict_proba"], model.predict_proba(features)
    )
    return took_s, equal


def processes(home: Path) -> list[psutil.Process]:
    """Every process that belongs to a home's platform: by its environment, or, as runners do, by its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            carries = process.environ().get("MILLRACE_HOME") == str(home) or str(home) in " ".join(process.cmdline())
            if carries and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def idle_cost(home: Path, settle_s: float, window_s: float) -> list[tuple[str, int, float]]:
    """Per process: what it is, proportional memory in bytes, percent of one core over the window."""
    time.sleep(settle_s)
    before = {process: sum(process.cpu_times()[:2]) for process in processes(home)}
    time.sleep(window_s)
    rows = []
    for process, cpu_s in before.items():
        try:
            spent_s = sum(process.cpu_times()[:2]) - cpu_s
            rows.append((_title(process), process.memory_full_info().pss, 100 * spent_s / window_s))
        except psutil.NoSuchProcess:
            continue
    return sorted(rows, key=lambda row: -row[1])


def _title(process: psutil.Process) -> str:
    command = process.cmdline()
    if "-m" in command:
        return command[command.index("-m") + 1]
    return " ".join(Path(part).name for part in command[:2])[:48]


def measure(runs: int, settle_s: float) -> None:
    """Measure and print the tables."""
    starts: list[float] = []
    fresh: list[float] = []
    known: list[float] = []
    equal: list[bool] = []
    idle: Sequence[tuple[str, int, float]] = ()
    for run in range(runs):
        with tempfile.TemporaryDirectory(prefix="mr-bench-") as directory:
            home = Path(directory) / "home"
            with platform(home) as (target, took_s):
                starts.append(took_s)
                if run == runs - 1:
                    idle = idle_cost(home, settle_s, 30)
                for name, times in (("fresh", fresh), ("known", known), ("again", known)):
                    seconds, same = upload_to_prediction(target, Path(directory), name, 1.0 + run + 10 * len(known) + 100 * len(fresh))
                    times.append(seconds)
                    equal.append(same)
    show(
        "The platform (real Kafka, warm package cache)",
        ("what", "runs", "median", "min", "max", "to reach"),
        [
            ("up → all ready", len(starts), *_spread(starts), "≤ 25 s"),
            ("upload → first HTTP prediction, new environment", len(fresh), *_spread(fresh), "≤ 12 s"),
            ("upload → first HTTP prediction, known environment", len(known), *_spread(known), "≤ 5 s"),
            ("answers equal to the local model's, bit for bit", len(equal), f"{sum(equal)} of {len(equal)}", "", "", "all"),
        ],
    )
    memory = sum(row[1] for row in idle) / 2**20
    cpu = sum(row[2] for row in idle)
    show(
        f"Idle platform after {settle_s:.0f} s, over 30 s",
        ("process", "memory (PSS, MiB)", "% of one core"),
        [(name, f"{size / 2**20:.0f}", f"{percent:.1f}") for name, size, percent in idle]
        + [("all (to reach: ≤ 2 500 MB, ≤ 15 %)", f"{memory:.0f}", f"{cpu:.1f}")],
    )


def _spread(values: Sequence[float]) -> tuple[str, str, str]:
    return f"{statistics.median(values):.1f} s", f"{min(values):.1f} s", f"{max(values):.1f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--settle", type=float, default=60.0, help="seconds of idleness before the idle measurement")
    options = parser.parse_args(arguments)
    measure(options.runs, options.settle)


if __name__ == "__main__":
    main()
