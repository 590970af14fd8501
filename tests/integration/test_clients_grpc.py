"""The gRPC sides of Triton's and KServe's client libraries, and gRPC's own tools, unmodified, against a real gateway with real runners."""

import asyncio
import hashlib
import json
import os
import tempfile
import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import joblib
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from benchmarks.peers.environments import Environment, built
from libs.inference.supervisor import RunnerProcess
from libs.inference.tokens import runner_token
from schemas.registry import Replica
from services.gateway.settings import GrpcSettings
from tests.integration.test_clients_oip import KSERVE, ROWS, TEXTS, TRITONCLIENT, deploy, iris, spam
from tests.unit.gateway import conftest
from tests.unit.gateway.conftest import World, make_world
from tests.unit.runner.models import spec
from tests.unit.runners import KEY

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """The endpoints ``iris`` and ``spam`` behind a gateway with a gRPC door."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        async with AsyncExitStack() as stack:
            made = await stack.enter_async_context(make_world(Path(folder), grpc=GrpcSettings(port=0)))
            for name, model in (("iris", iris()), ("spam", spam())):
                home = Path(folder) / name
                home.mkdir()
                joblib.dump(model, home / "model.joblib")
                token = runner_token(KEY, name)
                runner = await RunnerProcess.start(spec(home / "model.joblib", home, runner_id=name, token=token, address=f"unix:{home}/s"))
                stack.push_async_callback(runner.stop)
                monkeypatch.setattr(conftest, "SIGNATURE", runner.signature)
                await deploy(made, name, Replica(replica_id=name, address=runner.address))
            yield made


def address(world: World) -> str:
    assert world.gateway.grpc is not None
    return f"127.0.0.1:{world.gateway.grpc.port}"


async def run(environment: Environment, world: World, script: str) -> dict[str, Any]:
    """What a script leaves in ``out``; it finds the door's address in ``address`` and the rows in ``rows``."""
    python = await asyncio.to_thread(built, environment)
    head = "import json, sys\naddress, rows = sys.argv[1], json.loads(sys.argv[2])\nout = {}\n"
    source = f"{head}{textwrap.dedent(script)}\nprint(json.dumps(out))"
    process = await asyncio.create_subprocess_exec(
        python, "-W", "ignore", "-c", source, address(world), json.dumps(ROWS.tolist()),
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(120):
            told, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()[-4000:]
    return dict(json.loads(told.splitlines()[-1]))


TRITON = """
    import queue
    import numpy as np
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(address)
    rows = np.array(rows)

    def tensor(array=rows, name="input", datatype="FP64"):
        made = triton.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array)
        return made

    def told(call):
        try:
            call()
        except InferenceServerException as error:
            return [error.status(), error.message()]
"""


async def test_triton_s_client_predicts(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        TRITON
        + """
    def labels(**options):
        return client.infer("iris", [tensor()], **options).as_numpy("predict").tolist()

    result = client.infer("iris", [tensor()], request_id="q1", client_timeout=60)
    out["answer"] = [result.get_response().id, result.get_response().model_name, result.get_response().model_version]
    out["default"] = result.as_numpy("predict").tolist()
    out["version"] = labels(model_version="1")
    for encoding in ("gzip", "deflate"):
        out[encoding] = labels(compression_algorithm=encoding)
    wanted = [triton.InferRequestedOutput("predict_proba"), triton.InferRequestedOutput("predict")]
    both = client.infer("iris", [tensor()], outputs=wanted, parameters={"a": 1}, priority=1, headers={"x-request-id": "mine"})
    out["both"] = both.as_numpy("predict").tolist()
    out["probabilities"] = both.as_numpy("predict_proba").tolist()
    for datatype, dtype in (("FP32", np.float32), ("FP16", np.float16)):
        out[datatype] = client.infer("iris", [tensor(rows.astype(dtype), datatype=datatype)]).as_numpy("predict").tolist()
    answers = queue.Queue()
    for index in range(200):
        one = tensor(rows[index % 50 : index % 50 + 1])
        client.async_infer("iris", [one], lambda result, error, index=index: answers.put((index, result, error)))
    found = sorted((answers.get(timeout=60) for _ in range(200)), key=lambda each: each[0])
    out["errors"] = [str(error) for _, _, error in found if error is not None]
    out["concurrent"] = [int(result.as_numpy("predict")[0]) for _, result, _ in found]
    many = np.tile(rows, (1000, 1))
    out["many"] = client.infer("iris", [tensor(many)]).as_numpy("predict").tolist()[-50:]
    """,
    )
    expected = iris().predict(ROWS).tolist()
    assert out["answer"] == ["q1", "iris", "1"]
    for form in ("default", "version", "gzip", "deflate", "both", "FP32", "FP16", "many"):
        assert out[form] == expected, form
    assert np.array_equal(out["probabilities"], iris().predict_proba(ROWS))
    assert (out["errors"], out["concurrent"]) == ([], expected[:50] * 4)


async def test_triton_s_client_streams_and_a_bad_request_ends_nothing(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        TRITON
        + """
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for index in range(500):
        name = "nobody" if index % 100 == 99 else "iris"
        client.async_stream_infer(name, [tensor(rows[index % 50 : index % 50 + 1])], request_id=str(index))
    found = [answers.get(timeout=60) for _ in range(500)]
    client.stop_stream()
    out["labels"] = [None if error else int(result.as_numpy("predict")[0]) for result, error in found]
    out["ids"] = [result.get_response().id for result, error in found if not error]
    out["errors"] = [error.message() for _, error in found if error]
    """,
    )
    expected = iris().predict(ROWS).tolist()
    assert out["labels"] == [None if index % 100 == 99 else expected[index % 50] for index in range(500)]
    assert out["ids"] == [str(index) for index in range(500) if index % 100 != 99]
    assert out["errors"] == ["Request for unknown model: there is no endpoint 'nobody'"] * 5


async def test_triton_s_client_sends_and_gets_text(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        TRITON
        + f"""
    texts = np.array({TEXTS!r}, dtype=object)
    result = client.infer("spam", [tensor(texts, datatype="BYTES")])
    out["labels"] = [value.decode() for value in result.as_numpy("predict").tolist()]
    """,
    )
    assert out["labels"] == ["spam", "ham", "spam", "ham"]


async def test_triton_s_client_learns_what_there_is(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        TRITON
        + """
    out["live"] = [client.is_server_live(), client.is_server_ready()]
    out["ready"] = [client.is_model_ready("iris"), client.is_model_ready("iris", "1")]
    out["not_ready"] = [client.is_model_ready("iris", "9"), client.is_model_ready("nobody")]
    out["server"] = client.get_server_metadata(as_json=True)
    out["model"] = client.get_model_metadata("iris", as_json=True)
    out["index"] = client.get_model_repository_index(as_json=True)
    client.load_model("iris")
    out["load"] = told(lambda: client.load_model("nobody"))
    out["unload"] = told(lambda: client.unload_model("iris"))
    out["unknown"] = told(lambda: client.infer("nobody", [tensor()]))
    out["version"] = told(lambda: client.infer("iris", [tensor()], model_version="9"))
    out["name"] = told(lambda: client.infer("iris", [tensor(), tensor(name="x")]))
    out["shape"] = told(lambda: client.infer("iris", [tensor(rows[:, :3])]))
    out["output"] = told(lambda: client.infer("iris", [tensor()], outputs=[triton.InferRequestedOutput("x")]))
    out["config"] = client.get_model_config("iris", as_json=True)["config"]
    out["statistics"] = [client.get_inference_statistics(name, as_json=True) for name in ("", "iris")]
    out["shared_memory"] = told(lambda: client.get_system_shared_memory_status())
    """,
    )
    assert out["live"] == out["ready"] == [True, True]
    assert out["not_ready"] == [False, False]
    assert out["server"]["name"] == "millrace"
    assert out["model"]["inputs"] == [{"name": "input", "datatype": "FP64", "shape": ["-1", "4"]}]
    assert out["model"]["versions"] == ["1"]
    assert [(entry["name"], entry["state"]) for entry in out["index"]["models"]] == [("iris", "READY"), ("spam", "READY")]
    statuses = {name: out[name][0].removeprefix("StatusCode.") for name in ("load", "unload", "unknown", "version", "shared_memory")}
    assert statuses == {
        "load": "NOT_FOUND",
        "unload": "FAILED_PRECONDITION",
        "unknown": "NOT_FOUND",
        "version": "NOT_FOUND",
        "shared_memory": "UNIMPLEMENTED",
    }
    assert out["config"]["input"] == [{"name": "input", "data_type": "TYPE_FP64", "dims": ["4"]}]
    assert [[each["name"] for each in told["model_stats"]] for told in out["statistics"]] == [["iris", "spam"], ["iris"]]
    assert [out[name][0] for name in ("name", "shape", "output")] == ["StatusCode.INVALID_ARGUMENT"] * 3
    assert out["shape"][1] == "input 'input' expects shape [-1, 4], got [50, 3]"


async def test_kserve_s_client_predicts_typed_and_raw(world: World) -> None:
    out = await run(
        KSERVE,
        world,
        """
    import asyncio
    import numpy as np
    from grpc import RpcError
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    rows = np.array(rows)

    async def told(awaitable):
        try:
            await awaitable
        except RpcError as error:
            return [error.code().name, error.details()]

    async def main():
        async with InferenceGRPCClient(address) as client:
            out["live"] = [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready("iris")]
            typed = InferInput("input", list(rows.shape), "FP64", data=rows.reshape(-1).tolist())
            answer = await client.infer(InferRequest("iris", [typed], request_id="k1"))
            out["typed"] = [answer.outputs[0].data, answer.id, answer.model_version]
            raw = InferInput("input", list(rows.shape), "FP64")
            raw.set_data_from_numpy(rows, binary_data=True)
            answer = await client.infer(InferRequest("iris", [raw]), headers=[("x-request-id", "k2")])
            out["raw"] = [answer.outputs[0].as_numpy().tolist(), answer.id]
            text = InferInput("input", [2], "BYTES", data=[b"buy cheap", b"monday"])
            answer = await client.infer(InferRequest("spam", [text]))
            out["text"] = [value.decode() if isinstance(value, bytes) else value for value in answer.outputs[0].as_numpy().tolist()]
            out["unknown"] = await told(client.infer(InferRequest("nobody", [typed])))
            bad = InferInput("input", [1, 2], "FP64", data=[1.0, 2.0])
            out["bad"] = await told(client.infer(InferRequest("iris", [bad])))

    asyncio.run(main())
    """,
    )
    expected = iris().predict(ROWS).tolist()
    assert out["live"] == [True, True, True]
    assert out["typed"] == [expected, "k1", "1"]
    assert out["raw"] == [expected, "k2"]
    assert out["text"] == ["spam", "ham"]
    assert out["unknown"] == ["NOT_FOUND", "Request for unknown model: there is no endpoint 'nobody'"]
    assert out["bad"] == ["INVALID_ARGUMENT", "input 'input' expects shape [-1, 4], got [1, 2]"]


async def test_a_client_that_knows_nothing_beforehand_learns_the_messages_by_reflection(world: World) -> None:
    answer = await asyncio.to_thread(_by_reflection, address(world))
    assert answer == iris().predict(ROWS[:2]).tolist()


def _by_reflection(address: str) -> list[int]:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "inference.GRPCInferenceService" in database.get_services()
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
        request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        message = request(model_name="iris")
        tensor = message.inputs.add(name="input", datatype="FP64", shape=[2, 4])
        tensor.contents.fp64_contents.extend(ROWS[:2].reshape(-1).tolist())
        ask = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )
        return list(ask(message, timeout=60).outputs[0].contents.int64_contents)


async def test_grpc_s_own_health_client_is_answered(world: World) -> None:
    def check() -> int:
        with grpc.insecure_channel(address(world)) as channel:
            return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60).status

    assert await asyncio.to_thread(check) == health_pb2.HealthCheckResponse.SERVING


async def test_with_keys_a_client_sends_its_own_as_metadata(tmp_path: Path) -> None:
    key = "a key that is long enough"
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{hashlib.sha256(key.encode()).hexdigest()}\n")
    async with make_world(tmp_path, registry=False, grpc=GrpcSettings(port=0), api_keys_file=keys) as world:
        out = await run(
            TRITONCLIENT,
            world,
            TRITON
            + f"""
    out["without"] = told(lambda: client.get_server_metadata())
    out["with"] = client.get_server_metadata(headers={{"authorization": "Bearer {key}"}}, as_json=True)
    out["live"] = client.is_server_live()
    """,
        )
    assert out["without"][0] == "StatusCode.UNAUTHENTICATED"
    assert (out["with"]["name"], out["live"]) == ("millrace", True)
