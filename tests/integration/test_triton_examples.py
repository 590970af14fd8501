"""What Triton's published Python examples ask, of endpoints with the models that they are written for.

The scripts here make the calls of ``simple_http_infer_client.py``, ``simple_grpc_infer_client.py`` and their siblings for text. With
``TRITON_EXAMPLES`` set to the folder ``src/python/examples`` of Triton's client repository the files themselves are run as they are.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from benchmarks.peers.environments import built
from libs.inference.supervisor import RunnerProcess
from libs.inference.tokens import runner_token
from schemas.registry import Replica
from services.gateway.settings import GrpcSettings
from tests.integration.test_clients_grpc import address
from tests.integration.test_clients_oip import TRITONCLIENT, deploy, run
from tests.unit.gateway import conftest
from tests.unit.gateway.conftest import World, make_world
from tests.unit.runner.models import spec
from tests.unit.runners import KEY

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

HTTP_EXAMPLES = (
    "simple_http_infer_client.py",
    "simple_http_infer_client.py --request-compression-algorithm gzip --response-compression-algorithm gzip",
    "simple_http_async_infer_client.py",
    "simple_http_aio_infer_client.py",
    "simple_http_string_infer_client.py",
)
GRPC_EXAMPLES = (
    "simple_grpc_infer_client.py",
    "simple_grpc_async_infer_client.py",
    "simple_grpc_aio_infer_client.py",
    "simple_grpc_string_infer_client.py",
    "simple_grpc_keepalive_client.py",
    "simple_grpc_custom_args_client.py",
)


def graph(nodes: list[object], inputs: list[str], outputs: list[str], kind: int) -> bytes:
    """A model whose inputs and outputs are rows of any length."""
    values = [
        [helper.make_tensor_value_info(name, kind, [None, width]) for name in names] for names, width in ((inputs, 16), (outputs, 16))
    ]
    made = helper.make_graph(nodes, "g", *values)
    content: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return content


def sums(kind: int) -> bytes:
    """OUTPUT0 is the sum of the inputs and OUTPUT1 the difference; of text those of the numbers that it shows."""
    names, is_text = ["INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1"], kind == TensorProto.STRING
    a, b, x, y = [f"{name}_number" for name in names] if is_text else names
    nodes = [helper.make_node("Add", [a, b], [x]), helper.make_node("Sub", [a, b], [y])]
    if is_text:
        before = [helper.make_node("Cast", [name], [number], to=TensorProto.INT32) for name, number in zip(names[:2], (a, b), strict=True)]
        after = [helper.make_node("Cast", [number], [name], to=kind) for name, number in zip(names[2:], (x, y), strict=True)]
        nodes = [*before, *nodes, *after]
    return graph(nodes, names[:2], names[2:], kind)


MODELS = {
    "simple": sums(TensorProto.INT32),
    "simple_string": sums(TensorProto.STRING),
    "simple_identity": graph([helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])], ["INPUT0"], ["OUTPUT0"], TensorProto.STRING),
}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """An endpoint for each of the models."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        async with AsyncExitStack() as stack:
            made = await stack.enter_async_context(make_world(Path(folder), grpc=GrpcSettings(port=0)))
            for name, content in MODELS.items():
                home = Path(folder) / name
                home.mkdir()
                (home / "model.onnx").write_bytes(content)
                place = {"runner_id": name, "token": runner_token(KEY, name), "address": f"unix:{home}/s", "start_timeout_s": 120.0}
                runner = await RunnerProcess.start(spec(home / "model.onnx", home, format="onnx", **place))
                stack.push_async_callback(runner.stop)
                monkeypatch.setattr(conftest, "SIGNATURE", runner.signature)
                await deploy(made, name, Replica(replica_id=name, address=runner.address))
            yield made


COMMON = """
    import numpy as np
    from tritonclient.utils import InferenceServerException

    numbers, ones = np.arange(16, dtype=np.int32).reshape(1, 16), np.ones((1, 16), np.int32)

    def text(array):
        return np.array([str(value).encode() for value in array.reshape(-1)], dtype=object).reshape(array.shape)

    def shown(result):
        return [result.as_numpy(name).astype(int).tolist() for name in ("OUTPUT0", "OUTPUT1")]

    out["expected"] = [(numbers + ones).tolist(), (numbers - ones).tolist()]
    blobs = [np.array([value] * 16, dtype=kind).reshape(1, 16) for value, kind in ((b"he\\0llo", object), (b"\\0\\1\\2\\3", np.bytes_))]
"""


async def test_the_calls_of_the_http_examples_are_answered(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        COMMON
        + """
    import tritonclient.http as triton

    client = triton.InferenceServerClient(url.removeprefix("http://"))

    def inputs(first, second, datatype):
        made = [triton.InferInput(name, [1, 16], datatype) for name in ("INPUT0", "INPUT1")]
        made[0].set_data_from_numpy(first, binary_data=datatype == "BYTES")
        made[1].set_data_from_numpy(second, binary_data=datatype != "BYTES")
        return made

    wanted = [triton.InferRequestedOutput("OUTPUT0", binary_data=True), triton.InferRequestedOutput("OUTPUT1", binary_data=False)]
    given = inputs(numbers, ones, "INT32")
    out["named"] = shown(client.infer("simple", given, outputs=wanted, query_params={"test_1": 1, "test_2": 2}))
    statistics = client.get_inference_statistics(model_name="simple")["model_stats"]
    out["all"] = shown(client.infer("simple", given, outputs=None, request_compression_algorithm="gzip"))
    out["text"] = shown(client.infer("simple_string", inputs(text(numbers), text(ones), "BYTES"), outputs=wanted))
    out["statistics"] = [[each["name"], each["version"], each["inference_count"], each["execution_count"]] for each in statistics]
    out["everything"] = sorted(each["name"] for each in client.get_inference_statistics()["model_stats"])
    out["same"] = []
    for blob in blobs:
        for binary in (True, False):
            tensor = triton.InferInput("INPUT0", blob.shape, "BYTES")
            tensor.set_data_from_numpy(blob, binary_data=binary)
            result = client.infer("simple_identity", [tensor], outputs=[triton.InferRequestedOutput("OUTPUT0", binary_data=binary)])
            told = [value if isinstance(value, bytes) else value.encode() for value in result.as_numpy("OUTPUT0").reshape(-1).tolist()]
            out["same"].append(told == blob.reshape(-1).tolist())
    try:
        client.infer("wrong_model_name", given)
    except InferenceServerException as error:
        out["wrong"] = error.message()
    """,
    )
    assert out["named"] == out["all"] == out["text"] == out["expected"]
    assert out["statistics"] == [["simple", "1", 1, 1]]
    assert out["everything"] == sorted(MODELS)
    assert out["same"] == [True] * 4
    assert out["wrong"].startswith("Request for unknown model")


async def test_the_calls_of_the_grpc_examples_are_answered(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        f"    address = {address(world)!r}\n"
        + COMMON
        + """
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(address)

    def inputs(first, second, datatype):
        made = [triton.InferInput(name, [1, 16], datatype) for name in ("INPUT0", "INPUT1")]
        made[0].set_data_from_numpy(first)
        made[1].set_data_from_numpy(second)
        return made

    wanted = [triton.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
    given = inputs(numbers, ones, "INT32")
    out["named"] = shown(client.infer("simple", given, outputs=wanted, headers={"test": "1"}))
    (statistics,) = client.get_inference_statistics(model_name="simple").model_stats
    out["all"] = shown(client.infer("simple", given, outputs=None, compression_algorithm="gzip"))
    out["text"] = shown(client.infer("simple_string", inputs(text(numbers), text(ones), "BYTES"), outputs=wanted))
    out["statistics"] = [statistics.name, statistics.version, statistics.inference_count, statistics.execution_count]
    out["success"] = [statistics.inference_stats.success.count, statistics.inference_stats.success.ns > 0]
    out["config"] = client.get_model_config("simple").config.name
    out["same"] = []
    for blob in blobs:
        tensor = triton.InferInput("INPUT0", blob.shape, "BYTES")
        tensor.set_data_from_numpy(blob)
        result = client.infer("simple_identity", [tensor], outputs=[triton.InferRequestedOutput("OUTPUT0")])
        out["same"].append(result.as_numpy("OUTPUT0").reshape(-1).tolist() == blob.reshape(-1).tolist())
    """,
    )
    assert out["named"] == out["all"] == out["text"] == out["expected"]
    assert (out["statistics"], out["success"], out["config"]) == (["simple", "1", 1, 1], [1, True], "simple")
    assert out["same"] == [True] * 2


@pytest.mark.skipif("TRITON_EXAMPLES" not in os.environ, reason="TRITON_EXAMPLES names no folder with Triton's examples")
async def test_the_published_examples_run_as_they_are(world: World) -> None:
    python = await asyncio.to_thread(built, TRITONCLIENT)
    places = ((HTTP_EXAMPLES, world.http.base_url.netloc.decode()), (GRPC_EXAMPLES, address(world)))
    failed = {}
    for examples, where in places:
        for example in examples:
            name, *options = example.split()
            path = Path(os.environ["TRITON_EXAMPLES"]) / name
            process = await asyncio.create_subprocess_exec(
                python, path, "-u", where, *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            async with asyncio.timeout(120):
                said, _ = await process.communicate()
            if process.returncode:
                failed[example] = said.decode()[-1000:]
    assert failed == {}
