"""A real Ray head, a real Serve, real runners: what is deployed answers, comes back when killed, and leaves nothing behind."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import psutil
import pytest
import pytest_asyncio
from sklearn.linear_model import LogisticRegression

from libs.environments import make_lock
from libs.inference.client import RunnerClient
from libs.inference.tokens import runner_token
from libs.local import ray_head
from schemas.inference import Datatype, Signature, TensorSpec
from schemas.registry import ArtifactFormat
from services.serving.reconcile import ActualDeployment, AppStatus
from services.serving.spec import Places, ReplicaSpec
from tests.integration.artifact_gate import held_back

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.asyncio(loop_scope="module"),
]

KEY = b"0123456789abcdef" * 4
PATIENCE_S = 120.0
"""Generous: only what never happens takes so long."""

POINTS = np.array([[0.0, 0.0], [1.0, 1.0], [0.2, 0.9]])


DEPLOYS = """
import asyncio, sys
from services.serving.adapters import RayServe
from services.serving.replica import ModelReplica
from services.serving.spec import ReplicaSpec

async def main():
    serve = RayServe(sys.argv[1], ModelReplica)
    await serve.start()
    await serve.apply(ReplicaSpec.model_validate_json(sys.argv[2]), 1, 1)
    print("deployed", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Head:
    """A head of its own home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.process = subprocess.Popen([sys.executable, "-m", "libs.local.ray_head", "--home", str(home)], stdin=subprocess.DEVNULL)
        wait_until(lambda: ray_head.address_path(home).exists() or self.process.poll() is not None)
        self.address: str = json.loads(ray_head.address_path(home).read_text())["address"]
        self.directory = Path((home / "run" / "ray.session").read_text())

    def processes(self) -> list[psutil.Process]:
        """The launcher and everything below it, whatever session it is in."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(PATIENCE_S) == 0


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def listeners(processes: list[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        if not is_gone(process):
            found |= {each.laddr.ip for each in process.net_connections(kind="inet") if each.status == psutil.CONN_LISTEN}
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("ray"))
    before = dict(os.environ)
    os.environ.update(ray_head.client_environment(head.home))
    yield head
    os.environ.clear()
    os.environ.update(before)
    processes = head.processes()
    head.stop()
    assert all(is_gone(process) for process in processes)
    assert not head.directory.exists()


@pytest.fixture(scope="module")
def spec(head: Head) -> ReplicaSpec:
    """A model, stored, and an environment that is this process's own."""
    home = head.home
    model = home / "model.joblib"
    joblib.dump(LogisticRegression().fit(POINTS[:2], [0, 1]), model)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    place = home / "artifacts" / "sha256" / digest[:2]
    place.mkdir(parents=True)
    model.rename(place / digest[2:])
    lock = make_lock("")
    (home / "environments").mkdir()
    (home / "environments" / lock.environment_id).symlink_to(sys.prefix)
    key = home / "secrets" / "runner.key"
    key.write_bytes(KEY)
    places = Places(
        artifacts_url=f"file://{home / 'artifacts'}",
        artifact_cache_dir=home / "cache",
        environments_dir=home / "environments",
        runner_key_file=key,
    )
    return ReplicaSpec(
        deployment_id="shop.iris.1",
        model_name="iris",
        version=1,
        artifact_sha256=digest,
        format=ArtifactFormat.SKLEARN,
        environment=lock,
        signature=Signature(
            inputs=(TensorSpec(name="input", datatype=Datatype.FP64, shape=(-1, POINTS.shape[1])),),
            outputs=(TensorSpec(name="predict", datatype=Datatype.INT64, shape=(-1,)),),
        ),
        places=places,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serve(head: Head, spec: ReplicaSpec) -> AsyncIterator[Any]:
    from services.serving.adapters import RayServe
    from services.serving.replica import ModelReplica

    serve = RayServe(head.address, ModelReplica, keeps_warm=True)
    await serve.start()
    await serve.apply(spec, generation=1, replicas=1)
    yield serve
    await serve.stop()


async def until(serve: Any, condition: Callable[[dict[str, ActualDeployment]], bool]) -> dict[str, ActualDeployment]:
    async with asyncio.timeout(PATIENCE_S):
        while not condition(status := await serve.status()):  # noqa: ASYNC110 (Serve is asked; it does not tell)
            await asyncio.sleep(0.05)
    return status


async def ready(serve: Any, deployment_id: str, replicas: int = 1) -> ActualDeployment:
    def is_ready(status: dict[str, ActualDeployment]) -> bool:
        actual = status.get(deployment_id)
        return actual is not None and actual.status is AppStatus.RUNNING and len(actual.replicas) == replicas

    return (await until(serve, is_ready))[deployment_id]


async def predict(actual: ActualDeployment) -> list[int]:
    replica = actual.replicas[0]
    client = RunnerClient(replica.address, runner_token(KEY, replica.replica_id))
    try:
        answer = await client.infer({"input": POINTS}, timeout_s=PATIENCE_S)
    finally:
        await client.close()
    return [int(value) for value in answer.outputs["predict"]]


def runners(head: Head) -> list[psutil.Process]:
    return [process for process in head.processes() if not is_gone(process) and str(Path("libs", "runner")) in " ".join(process.cmdline())]


async def test_a_deployed_model_answers(serve: Any, spec: ReplicaSpec) -> None:
    assert await predict(await ready(serve, spec.deployment_id)) == [0, 1, 1]


async def test_every_port_is_on_loopback(serve: Any, head: Head, spec: ReplicaSpec) -> None:
    await ready(serve, spec.deployment_id)
    assert listeners([*head.processes(), psutil.Process()]) <= {"127.0.0.1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize("token", [None, "0" * 64])
async def test_without_the_token_nobody_gets_in(serve: Any, head: Head, token: str | None) -> None:
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(head.address) as channel:
        nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            nodes.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), metadata=metadata, timeout=PATIENCE_S)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_killed_runner_is_withdrawn_and_replaced(serve: Any, head: Head, spec: ReplicaSpec) -> None:
    before = await ready(serve, spec.deployment_id)
    (runner,) = runners(head)
    with held_back(spec.places.artifact_cache_dir / spec.artifact_sha256):
        runner.kill()
        withdrawn = (await until(serve, lambda status: not status[spec.deployment_id].replicas))[spec.deployment_id]
        assert "SIGKILL" in withdrawn.message
    after = await ready(serve, spec.deployment_id)
    assert [replica.replica_id for replica in after.replicas] == [replica.replica_id for replica in before.replicas]
    assert await predict(after) == [0, 1, 1]


async def test_a_killed_replica_takes_its_runner_along_and_is_replaced(serve: Any, head: Head, spec: ReplicaSpec) -> None:
    before = await ready(serve, spec.deployment_id)
    (runner,) = runners(head)
    (replica,) = [process for process in head.processes() if "ray::ServeReplica" in " ".join(process.cmdline())]
    replica.kill()
    wait_until(lambda: is_gone(runner))
    after = await until(serve, lambda status: {*status[spec.deployment_id].replicas}.isdisjoint(before.replicas))
    assert {*after[spec.deployment_id].replicas}.isdisjoint(before.replicas)
    assert await predict(await ready(serve, spec.deployment_id)) == [0, 1, 1]


async def test_scaling_restarts_nothing(serve: Any, spec: ReplicaSpec) -> None:
    (one,) = (await ready(serve, spec.deployment_id)).replicas
    await serve.scale(spec.deployment_id, generation=2, replicas=2)
    two = await ready(serve, spec.deployment_id, replicas=2)
    assert one in two.replicas
    assert two.generation == 2
    await serve.scale(spec.deployment_id, generation=3, replicas=1)
    await ready(serve, spec.deployment_id, replicas=1)


async def test_a_new_client_finds_what_runs_and_restarts_nothing(serve: Any, head: Head, spec: ReplicaSpec) -> None:
    before = await ready(serve, spec.deployment_id)
    await serve.stop()
    await serve.start()
    await serve.apply(spec, generation=4, replicas=1)
    after = await ready(serve, spec.deployment_id)
    assert (after.replicas, after.digest, after.generation) == (before.replicas, spec.digest, 4)


async def test_what_a_killed_process_deployed_goes_on_running(serve: Any, head: Head, spec: ReplicaSpec) -> None:
    other = spec.model_copy(update={"deployment_id": "shop.other.1"})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DEPLOYS, head.address, other.model_dump_json(), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readuntil(b"deployed\n"), PATIENCE_S)
    process.kill()
    await process.wait()
    assert await predict(await ready(serve, other.deployment_id)) == [0, 1, 1]
    await serve.delete(other.deployment_id)
    await until(serve, lambda status: other.deployment_id not in status)


async def test_what_cannot_start_fails_with_its_reason_and_can_be_deleted(serve: Any, spec: ReplicaSpec) -> None:
    bad = spec.model_copy(update={"deployment_id": "shop.missing.1", "artifact_sha256": "0" * 64})
    await serve.apply(bad, generation=1, replicas=1)
    status = await until(serve, lambda status: status[bad.deployment_id].status is AppStatus.FAILED)
    assert "no artifact" in status[bad.deployment_id].message
    await serve.delete(bad.deployment_id)
    await until(serve, lambda status: bad.deployment_id not in status)
    await serve.delete(bad.deployment_id)


async def test_deleting_ends_the_runner(serve: Any, head: Head, spec: ReplicaSpec) -> None:
    await ready(serve, spec.deployment_id)
    running = runners(head)
    await serve.delete(spec.deployment_id)
    await until(serve, lambda status: spec.deployment_id not in status)
    wait_until(lambda: all(is_gone(runner) for runner in running))


@pytest.mark.parametrize("victim", ["launcher", "keeper"])
async def test_killing_the_head_leaves_nothing(tmp_path: Path, victim: str) -> None:
    head = Head(tmp_path)
    processes = head.processes()
    assert listeners(processes) == {"127.0.0.1", "::ffff:127.0.0.1"}
    os.kill(processes[0 if victim == "launcher" else 1].pid, signal.SIGKILL)
    head.process.wait(PATIENCE_S)
    wait_until(lambda: all(is_gone(process) for process in processes), timeout_s=30)  # Ray itself would notice after 60 s
    wait_until(lambda: not head.directory.exists())
