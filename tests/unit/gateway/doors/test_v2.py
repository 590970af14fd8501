"""The REST door of the Open Inference Protocol."""

import gzip
import json
import struct
import zlib

import numpy as np
import pytest

from schemas.inference import Signature, TensorSpec
from tests.unit.gateway import conftest

TENSOR = struct.pack("<2d", 1.5, 2.0)


def binary(**members: object) -> tuple[bytes, dict[str, str]]:
    """A body with one row as raw bytes, and its header."""
    item = {"name": "input", "shape": [1, 2], "datatype": "FP64", "parameters": {"binary_data_size": len(TENSOR)}}
    head = json.dumps({"inputs": [item], **members}).encode()
    return head + TENSOR, {"inference-header-content-length": str(len(head))}


def plain(**members: object) -> dict[str, object]:
    return {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}], **members}


async def test_v2_predicts_in_json_and_echoes_the_id(world):
    await world.deployed(0.0)
    answer = await world.http.post("/v2/models/cancer/versions/1/infer", json=plain(id="q7"))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-millrace-model-version"] == "cancer@1"
    assert answer.json() == {
        "model_name": "cancer",
        "model_version": "1",
        "id": "q7",
        "outputs": [{"name": "predict", "datatype": "FP64", "shape": [1], "data": [3.0]}],
    }


async def test_without_an_id_the_answer_has_the_requests(world):
    await world.deployed(0.0)
    answer = await world.http.post("/v2/models/cancer/infer", json=plain(), headers={"x-request-id": "mine"})
    assert answer.json()["id"] == answer.headers["x-request-id"] == "mine"
    answer = await world.http.post("/v2/models/cancer/infer", json=plain())
    assert answer.json()["id"] == answer.headers["x-request-id"]


async def test_an_alias_stands_for_a_version(world):
    await world.deployed(0.0)
    await world.http.put("/api/v1/models/cancer/aliases/champion", json={"version": 1})
    answer = await world.http.post("/v2/models/cancer/versions/champion/infer", json=plain())
    assert answer.json()["model_version"] == "1"
    assert (await world.http.get("/v2/models/cancer/versions/champion/ready")).status_code == 200


async def test_v2_predicts_in_raw_bytes_also_compressed(world):
    await world.deployed(0.0)
    body, headers = binary(id="b", parameters={"binary_data_output": True})
    packed = [
        ({}, body),
        ({"content-encoding": "gzip"}, gzip.compress(body)),
        ({"content-encoding": "deflate"}, zlib.compress(body)),
    ]
    for encoding, content in packed:
        answer = await world.http.post("/v2/models/cancer/infer", content=content, headers={**headers, **encoding})
        length = int(answer.headers["inference-header-content-length"])
        assert answer.headers["content-type"] == "application/octet-stream"
        assert json.loads(answer.content[:length])["outputs"] == [
            {"name": "predict", "datatype": "FP64", "shape": [1], "parameters": {"binary_data_size": 8}}
        ]
        assert np.frombuffer(answer.content[length:]).tolist() == [3.5]


async def test_an_output_is_binary_only_if_asked(world):
    await world.deployed(0.0)
    for members, is_binary in (
        ({}, False),
        ({"outputs": [{"name": "predict", "parameters": {"binary_data": True}}]}, True),
        ({"outputs": [{"name": "predict", "parameters": {"binary_data": False}}], "parameters": {"binary_data_output": True}}, False),
    ):
        body, headers = binary(**members)
        answer = await world.http.post("/v2/models/cancer/infer", content=body, headers=headers)
        assert ("inference-header-content-length" in answer.headers) is is_binary, members


@pytest.mark.parametrize("length", ["", "-1", "many", "0", "1", "99999", "99999999999999999999", "1_0"])
async def test_a_head_length_that_is_wrong_is_a_400(world, length):
    await world.deployed(0.0)
    body, _ = binary()
    answer = await world.http.post("/v2/models/cancer/infer", content=body, headers={"inference-header-content-length": length})
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "'inputs' must be a non-empty list"),
        ({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}] * 2}, "no input 'x'"),
        ({"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP63", "data": [1, 2]}]}, "datatype 'FP63'"),
        ({"inputs": [{"name": "input", "shape": [2, 2], "datatype": "FP64", "data": [1, 2]}]}, "has 2 elements"),
        ({"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP64", "parameters": {"binary_data_size": 16}}]}, "0 are left"),
        (plain(outputs=[{"name": "nothing"}]), "no output 'nothing'"),
        (plain(id=7), "'id' must be a string"),
    ],
)
async def test_a_bad_body_is_a_400_that_says_why(world, body, says):
    await world.deployed(0.0)
    answer = await world.http.post("/v2/models/cancer/infer", json=body)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert says in answer.json()["error"]


async def test_server_and_model_tell_about_themselves(world):
    await world.deployed(0.0)
    get = world.http.get
    server = (await get("/v2")).json()
    assert server["name"] == "millrace"
    assert "binary_tensor_data" in server["extensions"]
    assert (await get("/v2/")).json() == server
    tensors = {
        "inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 2]}],
        "outputs": [{"name": "predict", "datatype": "FP64", "shape": [-1]}],
    }
    for path in ("/v2/models/cancer", "/v2/models/cancer/versions/1"):
        assert (await get(path)).json() == {"name": "cancer", "versions": ["1"], "platform": "sklearn", **tensors}
    assert (await get("/v2/models")).json() == {"models": ["cancer"]}
    for path in ("/v2/models/cancer/config", "/v2/models/cancer/versions/1/config"):
        config = (await get(path)).json()
        assert config["input"] == [{"name": "input", "data_type": "TYPE_FP64", "dims": [2]}]
        assert config["max_batch_size"] == 16_384
    for path in ("/v2/models/nowhere", "/v2/models/cancer/versions/9", "/v2/models/nowhere/config"):
        assert (await get(path)).status_code == 404


async def test_health_and_readiness(world):
    await world.deployed(0.0)
    await world.http.post("/api/v1/endpoints", json={"name": "empty"})
    get = world.http.get
    assert (await get("/healthz")).json() == {"status": "ok"}
    assert (await get("/v2/health/live")).json() == {"live": True}
    assert (await get("/v2/health/ready")).json() == {"ready": True}
    assert (await get("/v2/models/cancer/ready")).json() == {"name": "cancer", "ready": True}
    for path, status in (
        ("/v2/models/cancer/versions/1/ready", 200),
        ("/v2/models/cancer/versions/2/ready", 404),
        ("/v2/models/nowhere/ready", 404),
        ("/v2/models/empty/ready", 503),
        ("/v2/models/empty", 503),
    ):
        answer = await get(path)
        assert answer.status_code == status, path
        assert status == 200 or "error" in answer.json()
    answer = await world.http.post("/v2/models/empty/infer", json=plain())
    assert (answer.status_code, list(answer.json())) == (503, ["error"])


async def test_the_repository_lists_what_is_deployed(world):
    await world.deployed(0.0)
    await world.validated("other")
    await world.http.post("/api/v1/endpoints", json={"name": "waiting"})
    await world.http.post("/api/v1/endpoints/waiting/deployments", json={"model": "other"})
    ready = {"name": "cancer", "version": "1", "state": "READY", "reason": ""}
    post = world.http.post
    assert (await post("/v2/repository/index", json={"ready": True})).json() == [ready]
    for body in (b"", b"{}", b'{"ready": false}'):
        index = (await post("/v2/repository/index", content=body)).json()
        assert [(entry["name"], entry["state"]) for entry in index] == [("cancer", "READY"), ("waiting", "LOADING")]
    assert (await post("/v2/repository/index", json={"ready": "yes"})).status_code == 400
    assert (await post("/v2/repository/index", content=b"[")).status_code == 400


async def test_load_asks_whether_it_is_deployed_and_unload_says_how_to_undeploy(world):
    await world.deployed(0.0)
    await world.http.post("/api/v1/endpoints", json={"name": "empty"})
    for name, action, status in (
        ("cancer", "load", 200),
        ("nowhere", "load", 404),
        ("empty", "load", 503),
        ("nowhere", "unload", 404),
        ("empty", "unload", 200),
        ("cancer", "unload", 409),
    ):
        answer = await world.http.post(f"/v2/repository/models/{name}/{action}")
        assert answer.status_code == status, (name, action)
    assert "DELETE /api/v1/endpoints/cancer/deployments/cancer.cancer.1" in answer.json()["error"]
    assert (await world.http.post("/v2/models/cancer/infer", json=plain())).status_code == 200


async def test_a_large_binary_answer_is_compressed_whole(world):
    await world.deployed(0.0)
    rows = np.zeros((500, 2))
    item = {"name": "input", "shape": [500, 2], "datatype": "FP64", "parameters": {"binary_data_size": rows.nbytes}}
    head = json.dumps({"inputs": [item], "parameters": {"binary_data_output": True}}).encode()
    headers = {"inference-header-content-length": str(len(head)), "accept-encoding": "gzip"}
    answer = await world.http.post("/v2/models/cancer/infer", content=head + rows.tobytes(), headers=headers)
    assert answer.headers["content-encoding"] == "gzip"
    length = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 4000}
    assert answer.content[length:] == bytes(4000)


async def test_bytes_are_taken_and_what_is_plainly_something_else_is_a_415(world):
    await world.deployed(0.0)
    body, headers = binary()
    url = "/v2/models/cancer/infer"
    for content, head in ((body, headers), (json.dumps(plain()).encode(), {})):
        answer = await world.http.post(url, content=content, headers={**head, "content-type": "application/octet-stream"})
        assert answer.status_code == 200
        for content_type in ("image/jpeg", "application/x-msgpack", "application/x-pickle", "multipart/mixed"):
            answer = await world.http.post(url, content=content, headers={**head, "content-type": content_type})
            assert (answer.status_code, list(answer.json())) == (415, ["error"])


async def test_metadata_speaks_of_columns(world, monkeypatch):
    city = TensorSpec(name="city", datatype="BYTES", shape=(-1,), dtype="object", optional=True)
    age = TensorSpec(name="age", datatype="FP64", shape=(-1,), dtype="float64")
    monkeypatch.setattr(conftest, "SIGNATURE", Signature(inputs=(city, age), outputs=conftest.SIGNATURE.outputs))
    await world.deployed(0.0)
    assert (await world.http.get("/v2/models/cancer")).json()["inputs"] == [
        {"name": "city", "datatype": "BYTES", "shape": [-1], "parameters": {"dtype": "object", "optional": True}},
        {"name": "age", "datatype": "FP64", "shape": [-1], "parameters": {"dtype": "float64"}},
    ]
    assert (await world.http.get("/v2/models/cancer/config")).json()["input"] == [
        {"name": "city", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
        {"name": "age", "data_type": "TYPE_FP64", "dims": [1]},
    ]


async def test_metadata_names_the_columns_of_a_matrix(world, monkeypatch):
    monkeypatch.setattr(conftest, "SIGNATURE", conftest.SIGNATURE.model_copy(update={"feature_names": ("a", "b")}))
    await world.deployed(0.0)
    (matrix,) = (await world.http.get("/v2/models/cancer")).json()["inputs"]
    assert matrix == {"name": "input", "datatype": "FP64", "shape": [-1, 2], "parameters": {"columns": ["a", "b"]}}
