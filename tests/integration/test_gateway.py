"""The gateway as a process, on a real broker protocol, with a real runner behind it."""

import asyncio
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from libs.inference.supervisor import RunnerProcess
from libs.inference.tokens import runner_token
from libs.messaging import cloudevents
from libs.messaging.admin import create_topics
from libs.messaging.kafka import KafkaBroker
from libs.settings import KafkaSettings
from schemas.base import Payload
from schemas.environment import VersionBuilt
from schemas.registry import Replica
from schemas.serving import DeploymentReady
from schemas.topics import TOPICS
from schemas.validation import Measurements, VersionInspected, VersionValidated
from tests.conftest import NOW, EmbeddedBroker, free_port
from tests.unit.gateway.conftest import KEY, LOCK
from tests.unit.runner.models import row_sums, spec

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
ROWS = [[0.1, 0.2, 0.3], [1e300, 1e-300, 3.0], [1 / 3, 2 / 3, 1 / 7]]


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.integration)])
async def kafka(request: pytest.FixtureRequest) -> AsyncIterator[KafkaSettings]:
    """A broker with the platform's topics."""
    if request.param == "kafka":
        settings: KafkaSettings = request.getfixturevalue("kafka_server").settings
        await create_topics(settings, TOPICS)
        yield settings
        return
    broker = EmbeddedBroker()
    for topic in TOPICS:
        broker.create_topic(topic.name)
    yield broker.settings
    broker.close()


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        (Path(folder) / "runner.key").write_bytes(KEY)
        yield Path(folder)


@asynccontextmanager
async def service(name: str, kafka: KafkaSettings, home: Path, **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A service in a process of its own, from ready to ended."""
    ready_file = home / f"{name}.ready"
    environment = {
        "PATH": os.environ["PATH"],
        "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "KAFKA_EMBEDDED": str(kafka.embedded).lower(),
        "ARTIFACTS_URL": (home / "artifacts").as_uri(),
        "RUNNER_KEY_FILE": str(home / "runner.key"),
        "MILLRACE_READY_FILE": str(ready_file),
        "GATEWAY_GRPC_PORT": "0",
        **variables,
    }
    with (home / f"{name}.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"services.{name}", cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    try:
        async with asyncio.timeout(90):
            while not ready_file.exists():
                assert process.returncode is None, (home / f"{name}.log").read_text()[-3000:]
                await asyncio.sleep(0.02)
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            async with asyncio.timeout(60):
                await process.wait()


async def publish(kafka: KafkaSettings, *payloads: Payload) -> None:
    producer = KafkaBroker(kafka).producer()
    await producer.start()
    await producer.send([cloudevents.write(cloudevents.new_event(payload, "/test", now=NOW)) for payload in payloads])
    await producer.stop()


async def until(http: httpx.AsyncClient, path: str, condition) -> dict:
    async with asyncio.timeout(60):
        while True:
            answer = await http.get(path)
            if answer.status_code == 200 and condition(answer.json()):
                return answer.json()
            await asyncio.sleep(0.02)


async def test_from_an_upload_to_predictions_that_survive_a_restart_of_the_gateway(kafka: KafkaSettings, home: Path) -> None:
    name = f"m{uuid.uuid4().hex[:8]}"
    port = free_port()
    async with (
        service("registry", kafka, home),
        service("gateway", kafka, home, GATEWAY_HTTP_PORT=str(port), GATEWAY_COMMAND_WAIT_S="60") as gateway,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http,
    ):
        artifact = (await http.post("/api/v1/artifacts", params={"filename": "m.pkl"}, content=b"some model")).json()
        answer = await http.post(f"/api/v1/models/{name}/versions", json={"artifact": artifact})
        assert (answer.status_code, answer.json()["version"]) == (201, 1), answer.text
        assert (await http.get(f"/api/v1/models/{name}/versions/1")).status_code == 200

        runner_spec = spec(row_sums(), home, runner_id="r1", token=runner_token(KEY, "r1"), address=f"unix:{home}/s")
        runner = await RunnerProcess.start(runner_spec)
        try:
            await publish(
                kafka,
                VersionInspected(model_name=name, version=1, format="sklearn", requirements=(), inferred=False),
                VersionBuilt(model_name=name, version=1, environment=LOCK, reused=False, resolve_s=0, install_s=0),
                VersionValidated(
                    model_name=name, version=1, signature=runner.signature, measurements=Measurements(load_s=0, peak_memory_bytes=0)
                ),
            )
            await until(http, f"/api/v1/models/{name}/versions/1", lambda view: view["status"] == "validated")
            assert (await http.post("/api/v1/endpoints", json={"name": name})).status_code == 201
            deployed = (await http.post(f"/api/v1/endpoints/{name}/deployments", json={"model": name})).json()
            replica = Replica(replica_id="r1", address=runner.address)
            places = {key: deployed[key] for key in ("endpoint_name", "deployment_id", "generation")}
            await publish(kafka, DeploymentReady(**places, replicas=(replica,)))
            await until(http, f"/v1/models/{name}", lambda view: view["ready"])

            expected = np.array(ROWS).sum(axis=1).tolist()
            answer = await http.post(f"/v1/models/{name}:predict", json={"instances": ROWS})
            assert answer.json() == {"predictions": expected}

            gateway.send_signal(signal.SIGKILL)
            await gateway.wait()
            (home / "gateway.ready").unlink()
            async with service("gateway", kafka, home, GATEWAY_HTTP_PORT=str(port)) as again:
                assert (await http.get("/healthz")).json() == {"status": "ok"}
                answer = await http.post(f"/v1/models/{name}:predict", json={"instances": ROWS})
                assert answer.json() == {"predictions": expected}
                again.terminate()
                assert await asyncio.wait_for(again.wait(), 60) == 0
        finally:
            await runner.stop()
    assert "Traceback" not in (home / "gateway.log").read_text()


async def test_a_broker_that_goes_away_costs_commands_and_not_predictions(home: Path) -> None:
    broker = EmbeddedBroker()
    for topic in TOPICS:
        broker.create_topic(topic.name)
    port = free_port()
    variables = {"GATEWAY_HTTP_PORT": str(port), "GATEWAY_BROKER_TIMEOUT_S": "5", "GATEWAY_COMMAND_WAIT_S": "1"}
    try:
        async with (
            service("gateway", broker.settings, home, **variables),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http,
        ):
            assert (await http.post("/api/v1/endpoints", json={"name": "e"})).status_code == 202
            broker.close()
            answer = await http.post("/api/v1/endpoints", json={"name": "e"})
            assert (answer.status_code, "operation_id" in answer.json()) == (202, True)  # it is sent when the broker is back
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.post("/v1/models/e:predict", json={"instances": [[1]]})).status_code == 404
    finally:
        broker.close()


async def test_a_gateway_that_others_could_reach_without_keys_refuses_to_start(home: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "GATEWAY_HOST": "0.0.0.0"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", cwd=ROOT, env=environment, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode().strip().splitlines() == [
        "gateway: listening on 0.0.0.0, which is not a loopback address, needs API keys: set GATEWAY_API_KEYS or GATEWAY_API_KEYS_FILE"
    ]
