"""``python -m tests.integration.real_gateway FOLDER``: a gateway on uvloop with real runners behind it, in a process of its own.

The log is in memory. Writes its port to standard output when all endpoints answer; SIGTERM ends it. The endpoints:

iris
    scikit-learn, four floats in a row, two replicas
mixed
    ONNX, inputs and outputs of FP32, INT64, BOOL and BYTES
join
    ONNX, adds two inputs, row by row
slow
    sleeps as many seconds as the first of a row's three numbers says, and gives their sum
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import joblib
import psutil
import uvloop
from onnx import TensorProto, helper
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from libs import telemetry
from libs.inference.tokens import runner_token
from libs.messaging.memory import MemoryBroker
from libs.messaging.records import Record
from libs.settings import TelemetrySettings
from schemas.environment import VersionBuilt
from schemas.registry import Replica
from schemas.topics import PREDICTIONS
from schemas.validation import Measurements, VersionInspected, VersionValidated
from tests.integration.test_batched_equals_unbatched import mixed_graph
from tests.unit.gateway.conftest import KEY, LOCK, World, make_world
from tests.unit.runner.models import STRICT, model, running

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 90.0
MAX_BODY_BYTES = 4 * 2**20
CAGE = replace(STRICT, cpu_s=600)


class ForgetfulBroker(MemoryBroker):
    """Keeps no predictions: only what the gateway keeps shall show in its memory."""

    async def append(self, records: Sequence[Record], offsets: Any = ()) -> None:
        await super().append([replace(each, value=b"") if each.topic == PREDICTIONS.name else each for each in records], offsets)


async def serve(folder: Path) -> None:
    """Run until told to stop."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with AsyncExitStack() as stack:
        changes = {"predict_max_bytes": MAX_BODY_BYTES, "batch_rows": 64, "replica_wait_ms": 2_000, "default_endpoint": "iris"}
        world = await stack.enter_async_context(make_world(folder, broker=ForgetfulBroker(), **changes))
        features, labels = load_iris(return_X_y=True)
        joblib.dump(LogisticRegression(max_iter=500).fit(features, labels), folder / "iris.joblib")
        (folder / "mixed.onnx").write_bytes(mixed_graph())
        await deploy(stack, world, "iris", folder / "iris.joblib", "sklearn", replicas=2)
        await deploy(stack, world, "mixed", folder / "mixed.onnx", "onnx")
        (folder / "join.onnx").write_bytes(join_graph())
        await deploy(stack, world, "join", folder / "join.onnx", "onnx")
        await deploy(stack, world, "slow", model("lambda X: (__import__('time').sleep(X[0][0]), X.sum(1))[1]"), "sklearn")
        print(world.gateway.server.port, flush=True)
        await stopping.wait()


def join_graph() -> bytes:
    """A graph whose inputs need as many rows as each other."""
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in names] for names in ("ab", "c"))
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "join", inputs, outputs)
    content: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return content


async def deploy(stack: AsyncExitStack, world: World, name: str, artifact: Any, format_name: str, replicas: int = 1) -> None:
    """An endpoint with a model of the same name."""
    registered = await world.http.post(f"/api/v1/models/{name}/versions", json={"artifact": await world.upload(name.encode())})
    runners = []
    for number in range(replicas):
        runner_id = f"{name}{number}"
        folder = world.directory / runner_id
        folder.mkdir()
        identity = {"runner_id": runner_id, "token": runner_token(KEY, runner_id)}
        runners.append(
            await stack.enter_async_context(running(artifact, folder, format=format_name, cage=CAGE, start_timeout_s=60.0, **identity))
        )
    places = {"model_name": name, "version": registered.json()["version"]}
    await world.publish(
        VersionInspected(**places, format=format_name, requirements=(), inferred=False),
        VersionBuilt(**places, environment=LOCK, reused=False, resolve_s=0, install_s=0),
        VersionValidated(**places, signature=runners[0].signature, measurements=Measurements(load_s=0, peak_memory_bytes=0)),
    )
    await world.until(f"/api/v1/models/{name}/versions/1", lambda view: view["status"] == "validated")
    await world.http.post("/api/v1/endpoints", json={"name": name})
    deployed = await world.http.post(f"/api/v1/endpoints/{name}/deployments", json={"model": name, "min_replicas": replicas})
    await world.ready(deployed.json(), [Replica(replica_id=f"{name}{number}", address=each.address) for number, each in enumerate(runners)])
    await world.until(f"/v1/models/{name}", lambda view: bool(view["ready"]))


@dataclass(frozen=True)
class RealGateway:
    """The process, from outside."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def memory_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=30).text
        found = (re.fullmatch(r"([a-z_]+)(?:\{(.*)\})? (\S+)", line) for line in text.splitlines())
        return sum(float(each[3]) for each in found if each and each[1] == name and labels.items() <= _labels(each[2]).items())

    def until(self, name: str, value: float, **labels: str) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + 30
        while (now := self.metric(name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}, not {value}"
            time.sleep(0.02)


def _labels(text: str | None) -> Mapping[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', text or ""))


@contextmanager
def real_gateway(folder: Path) -> Iterator[RealGateway]:
    """A running gateway; its log is in the folder, whose path must be short."""
    log = folder / "gateway.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOG_FORMAT": "text"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.real_gateway", str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=output,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()[-3_000:]
        yield RealGateway(process, int(line), log)
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    telemetry.configure("gateway", TelemetrySettings())
    uvloop.run(serve(Path(sys.argv[1])))
