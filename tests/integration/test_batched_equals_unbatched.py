"""Random traffic, answered in batches, against the same requests answered one at a time, by real runners."""

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import onnx
import orjson
import pytest
from onnx import TensorProto, helper
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from libs.errors import MillraceError
from libs.inference import v2
from libs.inference.pool import RunnerPool
from libs.inference.routing import Route
from libs.inference.spans import RunnerSpans
from libs.inference.tokens import runner_token
from schemas.registry import Replica
from services.gateway.batching import Batch, BatchLimits
from services.gateway.changes import Changes
from services.gateway.dataplane import DataPlane, DataPlaneLimits
from services.gateway.exchange import Outgoing
from services.gateway.predictions import Ask, Caller, Protocol, Target
from tests.unit.gateway.conftest import KEY
from tests.unit.runner.models import running

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


class Recorder:
    """Remembers how large the batches were."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def batch_sent(self, batch: Batch) -> None:
        self.batches.append(len(batch.members))

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


def mixed_graph() -> bytes:
    """A graph over every kind of number and text, whose rows may have any width: each output is one row per row."""
    inputs = [
        helper.make_tensor_value_info("wide", TensorProto.FLOAT, [None, None]),
        helper.make_tensor_value_info("count", TensorProto.INT64, [None]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, [None]),
        helper.make_tensor_value_info("text", TensorProto.STRING, [None]),
    ]
    outputs = [
        helper.make_tensor_value_info("sum", TensorProto.FLOAT, [None]),
        helper.make_tensor_value_info("double", TensorProto.INT64, [None]),
        helper.make_tensor_value_info("not", TensorProto.BOOL, [None]),
        helper.make_tensor_value_info("same", TensorProto.STRING, [None]),
    ]
    nodes = [
        helper.make_node("ReduceSum", ["wide", "one"], ["sum"], keepdims=0),
        helper.make_node("Add", ["count", "count"], ["double"]),
        helper.make_node("Not", ["flag"], ["not"]),
        helper.make_node("Identity", ["text"], ["same"]),
    ]
    axis = onnx.numpy_helper.from_array(np.array([1], dtype=np.int64), "one")
    model = helper.make_model(
        helper.make_graph(nodes, "mixed", inputs, outputs, [axis]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    content: bytes = model.SerializeToString()
    return content


def iris_document(rng: random.Random) -> dict[str, Any]:
    rows = rng.choice([1, 1, 1, 2, 7])
    width = rng.choices([4, 3], [19, 1])[0]
    data: list[Any] = [round(rng.uniform(0, 8), 3) for _ in range(rows * width)]
    if rng.random() < 0.1:
        data[rng.randrange(len(data))] = rng.choice([None, "text", 1e400])
    datatype = rng.choice(["FP64", "FP32", "FP64"])
    document: dict[str, Any] = {"inputs": [{"name": "input", "shape": [rows, width], "datatype": datatype, "data": data}]}
    wanted = rng.choice([None, ["predict"], ["predict_proba"], ["predict_proba", "predict"], ["nonsense"]])
    if wanted is not None:
        document["outputs"] = [{"name": name} for name in wanted]
    return document


def mixed_document(rng: random.Random) -> dict[str, Any]:
    rows, width = rng.choice([1, 1, 3]), rng.choice([2, 2, 5])
    inputs = [
        {"name": "wide", "shape": [rows, width], "datatype": "FP32", "data": [rng.randrange(100) / 4 for _ in range(rows * width)]},
        {"name": "count", "shape": [rows], "datatype": "INT64", "data": [rng.randrange(-(2**61), 2**61) for _ in range(rows)]},
        {"name": "flag", "shape": [rows], "datatype": "BOOL", "data": [rng.random() < 0.5 for _ in range(rows)]},
        {"name": "text", "shape": [rows], "datatype": "BYTES", "data": [rng.choice(["a", "ü", "", "long " * 9]) for _ in range(rows)]},
    ]
    if rng.random() < 0.1:
        inputs.pop(rng.randrange(4))
    rng.shuffle(inputs)
    document: dict[str, Any] = {"inputs": inputs}
    if rng.random() < 0.7:
        document["outputs"] = [{"name": name} for name in rng.sample(["sum", "double", "not", "same"], rng.randint(1, 4))]
    return document


def ask_of(name: str, document: dict[str, Any]) -> Ask:
    body = orjson.dumps(document).replace(b"null", b"null")

    def write(prediction: Any) -> Outgoing:
        head, _ = v2.render(prediction.response, prediction.request, name, str(prediction.route.version))
        return Outgoing(bytes(head))

    return Ask(Target(name), Protocol.V2, lambda signature: v2.parse(body, signature), write)


async def answer_of(plane: DataPlane, name: str, document: dict[str, Any]) -> Any:
    try:
        return orjson.loads((await plane.infer(ask_of(name, document), Caller("r"))).body)["outputs"]
    except MillraceError as error:
        return type(error).__name__


def same(one: Any, other: Any) -> bool:
    """Equal, floats to the last few bits: a library may sum the rows of a larger matrix in another order."""
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    return len(one) == len(other) and all(
        a["name"] == b["name"]
        and a["shape"] == b["shape"]
        and a["datatype"] == b["datatype"]
        and (np.allclose(a["data"], b["data"], rtol=1e-12, atol=1e-15) if a["datatype"].startswith("FP") else a["data"] == b["data"])
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("seed", [1, 2])
async def test_batched_answers_equal_those_given_one_at_a_time(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    features, labels = load_iris(return_X_y=True)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(features, labels)
    forest = RandomForestClassifier(5, random_state=0).fit(features, labels)
    (tmp_path / "key").write_bytes(KEY)
    async with AsyncExitStack() as stack:
        routes: dict[str, list[Route]] = {}

        async def serve(name: str, version: int, path: Path, format_name: str) -> None:
            folder = tmp_path / f"{name}{version}"
            folder.mkdir()
            runner_id = f"{name}-{version}"
            runner = await stack.enter_async_context(
                running(path, folder, format=format_name, runner_id=runner_id, token=runner_token(KEY, runner_id))
            )
            replica = Replica(replica_id=runner_id, address=runner.address)
            routes.setdefault(name, []).append(Route(name, f"{name}.{name}.{version}", name, version, runner.signature, (replica,)))

        for version, model in enumerate((linear, forest), 1):
            path = tmp_path / f"iris{version}.joblib"
            joblib.dump(model, path)
            await serve("iris", version, path, "sklearn")
        graph = tmp_path / "mixed.onnx"
        graph.write_bytes(mixed_graph())
        await serve("mixed", 1, graph, "onnx")

        documents = [(name, make(rng)) for _ in range(600) for name, make in (("iris", iris_document), ("mixed", mixed_document))]
        versions = [rng.randrange(len(routes[name])) for name, _ in documents]
        turn = iter(())

        def choose(name: str, *_: Any, random: float) -> Route:
            return routes[name][next(turn)]

        catalog: Any = SimpleNamespace(routing=SimpleNamespace(choose=choose), changes=Changes(), deployments={})
        recorder = Recorder()
        limits = DataPlaneLimits(batch=BatchLimits(rows=64, queued=5_000))
        plane = DataPlane(catalog, RunnerPool(tmp_path / "key", RunnerSpans(None)), recorder, limits)
        await plane.start()
        try:
            turn = iter(versions)
            alone = [await answer_of(plane, name, document) for name, document in documents]
            assert set(recorder.batches) == {1}
            recorder.batches.clear()
            turn = iter(versions)
            together = await asyncio.gather(*(answer_of(plane, name, document) for name, document in documents))
        finally:
            await plane.stop()
    assert max(recorder.batches) > 10
    assert sum(isinstance(answer, str) for answer in alone) > 50
    assert sum(not isinstance(answer, str) for answer in alone) > 500
    different = [index for index, (one, other) in enumerate(zip(alone, together, strict=True)) if not same(one, other)]
    assert different == [], (documents[different[0]], alone[different[0]], together[different[0]])
