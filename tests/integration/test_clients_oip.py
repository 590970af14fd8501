"""The clients of Triton, KServe and MLServer, unmodified, against a real gateway with real runners behind it."""

import asyncio
import json
import os
import tempfile
import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from benchmarks.peers.environments import Environment, built
from benchmarks.peers.kserve import KServe
from benchmarks.peers.mlserver import MLServer
from libs.inference.supervisor import RunnerProcess
from libs.inference.tokens import runner_token
from schemas.registry import Replica
from tests.unit.gateway import conftest
from tests.unit.gateway.conftest import World, make_world
from tests.unit.runner.models import spec
from tests.unit.runners import KEY

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

TRITONCLIENT = Environment("tritonclient", ("tritonclient[http,grpc]==2.73.0",))
KSERVE = KServe.environment
MLSERVER = MLServer.environment

ROWS = load_iris(return_X_y=True)[0][::3]
TEXTS = ["cheap pills, buy now", "the meeting is on monday", "buy cheap", "monday it is"]


def iris() -> Any:
    return LogisticRegression(max_iter=1000).fit(*load_iris(return_X_y=True))


def spam() -> Any:
    """A model of text, whose labels are text too."""
    return make_pipeline(CountVectorizer(), LogisticRegression()).fit(TEXTS, ["spam", "ham", "spam", "ham"])


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """The endpoints ``iris`` and ``spam``."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        async with AsyncExitStack() as stack:
            made = await stack.enter_async_context(make_world(Path(folder)))
            for name, model in (("iris", iris()), ("spam", spam())):
                home = Path(folder) / name
                home.mkdir()
                joblib.dump(model, home / "model.joblib")
                token = runner_token(KEY, name)
                place = {"runner_id": name, "token": token, "address": f"unix:{home}/s", "start_timeout_s": 120.0}
                runner = await RunnerProcess.start(spec(home / "model.joblib", home, **place))
                stack.push_async_callback(runner.stop)
                monkeypatch.setattr(conftest, "SIGNATURE", runner.signature)
                await deploy(made, name, Replica(replica_id=name, address=runner.address))
            yield made


async def deploy(world: World, name: str, replica: Replica) -> None:
    version = await world.validated(name, name.encode())
    await world.http.post("/api/v1/endpoints", json={"name": name})
    deployment = await world.http.post(f"/api/v1/endpoints/{name}/deployments", json={"model": name, "version": version["version"]})
    await world.ready(deployment.json(), [replica])


async def run(environment: Environment, world: World, script: str) -> dict[str, Any]:
    """What a script leaves in ``out``; it finds the gateway's address in ``url`` and the rows in ``rows``."""
    python = await asyncio.to_thread(built, environment)
    source = (
        f"import json, sys\nurl, rows = sys.argv[1], json.loads(sys.argv[2])\nout = {{}}\n{textwrap.dedent(script)}\nprint(json.dumps(out))"
    )
    variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        python, "-W", "ignore", "-c", source, str(world.http.base_url).rstrip("/"), json.dumps(ROWS.tolist()),
        env=variables, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(300):
            told, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()[-4000:]
    return dict(json.loads(told.splitlines()[-1]))


TRITON = """
    import ml_dtypes
    import numpy as np
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(url.removeprefix("http://"), concurrency=8)
    rows = np.array(rows)

    def tensor(array=rows, name="input", datatype="FP64", **options):
        made = triton.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array, **options)
        return made

    def told(call):
        try:
            call()
        except InferenceServerException as error:
            return [error.status(), error.message()]
"""


async def test_triton_s_client_predicts_in_every_form_it_has(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        TRITON
        + """
    def labels(**options):
        return client.infer("iris", [tensor()], **options).as_numpy("predict").tolist()

    result = client.infer("iris", [tensor()], request_id="q1")
    out["answer"] = {name: result.get_response()[name] for name in ("id", "model_name", "model_version")}
    out["dtype"] = str(result.as_numpy("predict").dtype)
    out["default"] = result.as_numpy("predict").tolist()
    out["version"] = labels(model_version="1")
    out["json"] = client.infer(
        "iris", [tensor(binary_data=False)], outputs=[triton.InferRequestedOutput("predict", binary_data=False)]
    ).as_numpy("predict").tolist()
    out["json_to_binary"] = client.infer("iris", [tensor(binary_data=False)]).as_numpy("predict").tolist()
    for encoding in ("gzip", "deflate"):
        out["sent_" + encoding] = labels(request_compression_algorithm=encoding)
        out["got_" + encoding] = labels(response_compression_algorithm=encoding)
    out["both"] = labels(request_compression_algorithm="gzip", response_compression_algorithm="deflate", timeout=1_000_000, priority=1)
    wanted = [triton.InferRequestedOutput("predict_proba"), triton.InferRequestedOutput("predict", binary_data=False)]
    mixed = client.infer("iris", [tensor()], outputs=wanted)
    out["mixed"] = mixed.as_numpy("predict").tolist()
    out["probabilities"] = mixed.as_numpy("predict_proba").tolist()
    single, half = rows.astype(np.float32), rows.astype(np.float16)
    out["FP32"] = client.infer("iris", [tensor(single, datatype="FP32")]).as_numpy("predict").tolist()
    out["FP16"] = client.infer("iris", [tensor(half, datatype="FP16")]).as_numpy("predict").tolist()
    out["BF16"] = client.infer("iris", [tensor(rows.astype(ml_dtypes.bfloat16), datatype="BF16")]).as_numpy("predict").tolist()
    out["rounded"] = rows.astype(ml_dtypes.bfloat16).astype(float).tolist()
    pending = [client.async_infer("iris", [tensor(rows[index % 50 : index % 50 + 1])]) for index in range(200)]
    out["concurrent"] = [int(one.get_result().as_numpy("predict")[0]) for one in pending]
    """,
    )
    expected = iris().predict(ROWS).tolist()
    assert out["answer"] == {"id": "q1", "model_name": "iris", "model_version": "1"}
    assert out["dtype"] == "int64"
    forms = ("default", "version", "json", "json_to_binary", "mixed", "both", "sent_gzip", "sent_deflate", "got_gzip", "got_deflate")
    for form in (*forms, "FP32", "FP16"):
        assert out[form] == expected, form
    assert out["BF16"] == iris().predict(np.array(out["rounded"])).tolist()
    assert np.array_equal(out["probabilities"], iris().predict_proba(ROWS))
    assert out["concurrent"] == expected[:50] * 4


async def test_triton_s_client_sends_and_gets_text(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        TRITON
        + f"""
    texts = np.array({TEXTS!r}, dtype=object)
    for name, binary in (("binary", True), ("json", False)):
        outputs = [triton.InferRequestedOutput("predict", binary_data=binary)]
        result = client.infer("spam", [tensor(texts, datatype="BYTES", binary_data=binary)], outputs=outputs)
        out[name] = [value.decode() if isinstance(value, bytes) else value for value in result.as_numpy("predict").tolist()]
    """,
    )
    assert out["binary"] == out["json"] == ["spam", "ham", "spam", "ham"]


async def test_triton_s_client_learns_what_there_is(world: World) -> None:
    out = await run(
        TRITONCLIENT,
        world,
        TRITON
        + """
    out["live"] = [client.is_server_live(), client.is_server_ready()]
    out["ready"] = [client.is_model_ready("iris"), client.is_model_ready("iris", "1")]
    out["not_ready"] = [client.is_model_ready("iris", "9"), client.is_model_ready("nobody")]
    out["server"] = client.get_server_metadata()
    out["model"] = client.get_model_metadata("iris")
    out["config"] = client.get_model_config("iris", "1")
    out["index"] = client.get_model_repository_index()
    client.load_model("iris")
    out["load"] = told(lambda: client.load_model("nobody"))
    out["unload"] = told(lambda: client.unload_model("iris"))
    out["unknown"] = told(lambda: client.infer("nobody", [tensor()]))
    out["version"] = told(lambda: client.infer("iris", [tensor()], model_version="9"))
    out["name"] = told(lambda: client.infer("iris", [tensor(), tensor(name="x")]))
    out["shape"] = told(lambda: client.infer("iris", [tensor(rows[:, :3])]))
    out["datatype"] = told(lambda: client.infer("iris", [tensor(rows.astype(object).astype(str).astype(object), datatype="BYTES")]))
    out["output"] = told(lambda: client.infer("iris", [tensor()], outputs=[triton.InferRequestedOutput("x")]))
    """,
    )
    assert out["live"] == out["ready"] == [True, True]
    assert out["not_ready"] == [False, False]
    assert "binary_tensor_data" in out["server"]["extensions"]
    assert out["model"]["inputs"] == [{"name": "input", "datatype": "FP64", "shape": [-1, 4]}]
    assert out["model"]["versions"] == ["1"]
    assert out["config"]["input"] == [{"name": "input", "data_type": "TYPE_FP64", "dims": [4]}]
    assert [(entry["name"], entry["state"]) for entry in out["index"]] == [("iris", "READY"), ("spam", "READY")]
    assert [out[name][0] for name in ("load", "unknown", "version")] == ["404"] * 3
    assert [out[name][0] for name in ("name", "shape", "datatype", "output")] == ["400"] * 4
    assert out["unload"][0] == "409"
    assert "DELETE /api/v1/endpoints/iris/deployments/iris.iris.1" in out["unload"][1]
    assert out["shape"][1] == "input 'input' expects shape [-1, 4], got [50, 3]"


KSERVE_CLIENT = """
    import asyncio
    import numpy as np
    from httpx import HTTPStatusError
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from kserve.protocol.infer_type import RequestedOutput

    rows = np.array(rows)

    async def told(awaitable):
        try:
            await awaitable
        except HTTPStatusError as error:
            return [error.response.status_code, str(error)]
"""


async def test_kserve_s_client_predicts_over_v1(world: World) -> None:
    out = await run(
        KSERVE,
        world,
        KSERVE_CLIENT
        + """
    async def main():
        async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
            out["live"] = await client.is_server_live(url)
            out["ready"] = await client.is_model_ready(url, "iris")
            out["not_ready"] = await told(client.is_model_ready(url, "nobody"))
            headers = {}
            out["predictions"] = await client.infer(url, {"instances": rows.tolist()}, model_name="iris", response_headers=headers)
            out["version"] = headers["x-millrace-model-version"]
            out["text"] = await client.infer(url, {"instances": ["buy cheap", "monday"]}, model_name="spam")
            out["unknown"] = await told(client.infer(url, {"instances": rows.tolist()}, model_name="nobody"))
            out["bad"] = await told(client.infer(url, {"instances": [[1, 2]]}, model_name="iris"))

    asyncio.run(main())
    """,
    )
    assert out["live"] is out["ready"] is True
    assert out["not_ready"][0] == 404
    assert out["predictions"] == {"predictions": iris().predict(ROWS).tolist()}
    assert out["version"] == "iris@1"
    assert out["text"] == {"predictions": ["spam", "ham"]}
    assert out["unknown"][0] == 404
    assert "there is no endpoint 'nobody'" in out["unknown"][1]
    assert out["bad"][0] == 400
    assert "expects rows of 4 numbers" in out["bad"][1]


async def test_kserve_s_client_predicts_over_v2(world: World) -> None:
    out = await run(
        KSERVE,
        world,
        KSERVE_CLIENT
        + """
    def request(model, array, datatype, binary, outputs=None, **options):
        tensor = InferInput("input", list(array.shape), datatype)
        tensor.set_data_from_numpy(array, binary_data=binary)
        return InferRequest(model_name=model, infer_inputs=[tensor], request_outputs=outputs, **options)

    async def main():
        async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
            out["live"] = [await client.is_server_live(url), await client.is_server_ready(url)]
            out["ready"] = [await client.is_model_ready(url, "iris"), await client.is_model_ready(url, "iris/versions/1")]
            for name, binary in (("json", False), ("binary", True)):
                answer = await client.infer(url, request("iris", rows, "FP64", binary, request_id="q"), model_name="iris")
                out[name] = [answer.id, answer.model_name, answer.outputs[0].as_numpy().tolist()]
            asked = request("iris", rows, "FP64", True, parameters={"binary_data_output": True})
            out["all_binary"] = (await client.infer(url, asked, model_name="iris")).outputs[0].as_numpy().tolist()
            wanted = [RequestedOutput("predict_proba", parameters={"binary_data": True}), RequestedOutput("predict")]
            answer = await client.infer(url, request("iris", rows, "FP64", True, wanted), model_name="iris")
            out["probabilities"], out["mixed"] = (output.as_numpy().tolist() for output in answer.outputs)
            half = request("iris", rows.astype(np.float16), "FP16", True)
            out["half"] = (await client.infer(url, half, model_name="iris")).outputs[0].as_numpy().tolist()
            texts = np.array([b"buy cheap", b"monday"], dtype=object)
            for name, binary in (("text", False), ("binary_text", True)):
                answer = await client.infer(url, request("spam", texts, "BYTES", binary), model_name="spam")
                out[name] = answer.outputs[0].data
            out["unknown"] = await told(client.infer(url, asked, model_name="nobody"))
            out["bad"] = await told(client.infer(url, request("iris", rows[:, :2], "FP64", True), model_name="iris"))

    asyncio.run(main())
    """,
    )
    expected = iris().predict(ROWS).tolist()
    assert out["live"] == out["ready"] == [True, True]
    assert out["json"] == out["binary"] == ["q", "iris", expected]
    assert out["all_binary"] == out["mixed"] == out["half"] == expected
    assert np.array_equal(out["probabilities"], iris().predict_proba(ROWS))
    assert out["text"] == out["binary_text"] == ["spam", "ham"]
    assert (out["unknown"][0], out["bad"][0]) == (404, 400)
    assert "expects shape [-1, 4], got [50, 2]" in out["bad"][1]


async def test_mlserver_s_command_line_predicts_a_file(world: World, tmp_path: Path) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    rows = [{"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP64", "data": row}]} for row in ROWS[:10].tolist()]
    requests.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    python = await asyncio.to_thread(built, MLSERVER)
    process = await asyncio.create_subprocess_exec(
        python.with_name("mlserver"), "infer", "-u", world.http.base_url.netloc.decode(), "-m", "iris", "-w", "2",
        "-i", requests, "-o", answers, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(300):
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()[-4000:]
    told = sorted((json.loads(line) for line in answers.read_text().splitlines()), key=lambda answer: answer["parameters"]["batch_index"])
    assert [answer["outputs"][0]["data"] for answer in told] == [[label] for label in iris().predict(ROWS[:10]).tolist()]
