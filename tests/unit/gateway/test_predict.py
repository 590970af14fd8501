"""The predict doors, against runners on real sockets."""

import asyncio
import gzip
import json
import struct
import zlib

import numpy as np
import pytest

from libs.inference.requests import Span


async def test_v1_predicts_and_says_which_version_answered(world):
    await world.deployed(0.5)
    answer = await world.predict([[1, 2], [3, 4.25]], headers={"x-request-id": "mine-1"})
    assert (answer.status_code, answer.json()) == (200, {"predictions": [3.5, 7.75]})
    assert answer.headers["x-millrace-model-version"] == "cancer@1"
    assert answer.headers["x-request-id"] == "mine-1"


async def test_v2_predicts_in_json_and_echoes_the_id(world):
    await world.deployed(0.0)
    body = {"id": "q7", "inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}
    answer = await world.http.post("/v2/models/cancer/versions/1/infer", json=body)
    assert answer.json() == {
        "model_name": "cancer",
        "model_version": "1",
        "id": "q7",
        "outputs": [{"name": "predict", "datatype": "FP64", "shape": [1], "data": [3.0]}],
    }


async def test_v2_predicts_in_raw_bytes_also_compressed(world):
    await world.deployed(0.0)
    tensor = struct.pack("<2d", 1.5, 2.0)
    head = json.dumps(
        {
            "inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP64", "parameters": {"binary_data_size": len(tensor)}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"inference-header-content-length": str(len(head))}
    plain = await world.http.post("/v2/models/cancer/infer", content=head + tensor, headers=headers)
    length = int(plain.headers["inference-header-content-length"])
    assert plain.headers["content-type"] == "application/octet-stream"
    assert np.frombuffer(plain.content[length:]).tolist() == [3.5]
    for encoding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        packed = await world.http.post(
            "/v2/models/cancer/infer", content=compress(head + tensor), headers={**headers, "content-encoding": encoding}
        )
        assert packed.content == plain.content


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'{"instances": [[NaN, 1]]}', "not valid JSON"),
        (b'{"instances": []}', "non-empty"),
        (b'{"instances": [[1, 2, 3]]}', "expects rows of 2 numbers"),
        (b'{"instances": [["a", 2]]}', "FP64"),
        (b'{"rows": [[1, 2]]}', "exactly one of"),
        (b'{"instances": [[1, 2]], "outputs": ["proba"]}', "no output 'proba'"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
)
async def test_a_bad_body_is_a_400_that_says_why(world, body, says):
    await world.deployed(0.0)
    answer = await world.http.post("/v1/models/cancer:predict", content=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert not world.runners[0].asked


async def test_bad_headers_are_a_400(world):
    await world.deployed(0.0)
    for headers in (
        {"x-request-timeout-ms": "soon"},
        {"x-request-timeout-ms": "0"},
        {"content-encoding": "br"},
        {"content-encoding": "gzip"},
    ):
        answer = await world.predict([[1, 2]], headers=headers)
        assert (answer.status_code, list(answer.json())) == (400, ["error"]), headers
    answer = await world.http.post(
        "/v2/models/cancer/infer", json={"inputs": []}, headers={"inference-header-content-length": "99999999999999999999"}
    )
    assert answer.status_code == 400


async def test_a_decompression_bomb_is_a_413(tmp_path, make):
    async with make(tmp_path, predict_max_bytes=100_000) as world:
        await world.deployed(0.0)
        bomb = gzip.compress(b" " * 1_000_000)
        answer = await world.http.post("/v1/models/cancer:predict", content=bomb, headers={"content-encoding": "gzip"})
        assert answer.status_code == 413
        assert (await world.http.post("/v1/models/cancer:predict", content=b" " * 100_001)).status_code == 413


async def test_unknown_endpoint_and_version_are_404(world):
    await world.deployed(0.0)
    answer = await world.predict([[1, 2]], endpoint="nowhere")
    assert (answer.status_code, answer.json()) == (404, {"error": "there is no endpoint 'nowhere'"})
    answer = await world.http.post("/v2/models/cancer/versions/9/infer", json={})
    assert answer.status_code == 404
    assert "deployed: cancer@1" in answer.json()["error"]


async def test_an_endpoint_without_deployment_is_503_at_once(world):
    await world.http.post("/api/v1/endpoints", json={"name": "empty"})
    answer = await world.predict([[1, 2]], endpoint="empty")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json() == {"error": "nothing is deployed to endpoint 'empty'"}


async def test_what_the_model_says_reaches_the_caller_with_the_right_status(world):
    await world.deployed(0.0)
    for kind, status in (("invalid_input", 400), ("model_error", 500)):
        world.runners[0].behave = lambda _, kind=kind: (kind, f"because {kind}")
        answer = await world.predict([[1, 2]])
        assert (answer.status_code, answer.json()) == (status, {"error": f"because {kind}"})


async def test_a_model_that_hangs_is_a_504_after_the_callers_deadline(world):
    await world.deployed(0.0)
    world.runners[0].behave = lambda _: "hang"
    answer = await world.predict([[1, 2]], headers={"x-request-timeout-ms": "30"})
    assert (answer.status_code, answer.json()) == (504, {"error": "endpoint 'cancer' did not answer within 30 ms"})


async def test_a_runner_that_dies_over_a_request_is_replaced_by_another_replica(world):
    await world.deployed(0.0, 100.0)
    world.runners[0].behave = lambda _: "drop"
    answers = [(await world.predict([[1, 2]])).json()["predictions"] for _ in range(4)]
    assert answers == [[103.0]] * 4
    assert world.runners[0].asked


async def test_a_request_runs_at_most_twice(world):
    await world.deployed(0.0, 0.0)
    for runner in world.runners:
        runner.behave = lambda _: "drop"
    answer = await world.predict([[1, 2]])
    assert answer.status_code == 503
    assert "lost two runners" in answer.json()["error"]
    assert sum(len(runner.asked) for runner in world.runners) == 2


async def test_a_request_waits_for_a_replica_that_is_being_restarted(world):
    deployment = await world.deployed(0.0)
    await world.changed(deployment, [])
    await world.until("/api/v1/endpoints/cancer", lambda view: not view["deployments"][0]["replicas"])
    asked = asyncio.create_task(world.predict([[1, 2]]))
    await asyncio.sleep(0)
    await world.changed(deployment, [(await world.runner(7.0)).replica])
    assert (await asked).json() == {"predictions": [10.0]}


async def test_without_a_replica_for_too_long_it_is_a_503(world):
    deployment = await world.deployed(0.0)
    await world.changed(deployment, [])
    await world.until("/api/v1/endpoints/cancer", lambda view: not view["deployments"][0]["replicas"])
    answer = await world.predict([[1, 2]])
    assert answer.status_code == 503
    assert "cancer@1 is without a live replica" in answer.json()["error"]


async def test_a_runner_that_came_back_at_its_address_is_asked_again(world):
    await world.deployed(0.0)
    assert (await world.predict([[1, 2]])).status_code == 200
    await world.runners[0].stop()
    asked = asyncio.create_task(world.predict([[1, 2]]))
    await asyncio.sleep(0.02)
    await world.runners[0].start()
    assert (await asked).status_code == 200


async def test_a_runner_that_does_not_know_our_key_is_a_503_and_not_a_401(world):
    deployment = await world.deployed(0.0)
    stranger = await world.runner()
    stranger.replica = stranger.replica.model_copy(update={"replica_id": "another"})
    known_as = stranger.replica.model_copy(update={"replica_id": "r1"})
    await world.changed(deployment, [known_as])
    await world.until("/api/v1/endpoints/cancer", lambda view: view["deployments"][0]["replicas"][0]["replica_id"] == "r1")
    assert (await world.predict([[1, 2]])).status_code == 503


async def test_metadata_and_readiness_in_both_protocols(world):
    await world.deployed(0.0)
    get = world.http.get
    assert (await get("/v1/models")).json() == {"models": ["cancer"]}
    assert (await get("/v1/models/cancer")).json() == {"name": "cancer", "ready": True}
    assert (await get("/v2")).json()["extensions"] == ["binary_tensor_data"]
    assert (await get("/v2/models/cancer")).json() == {
        "name": "cancer",
        "versions": ["1"],
        "platform": "sklearn",
        "inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 2]}],
        "outputs": [{"name": "predict", "datatype": "FP64", "shape": [-1]}],
    }
    assert (await get("/v2/models/cancer/versions/1/ready")).status_code == 200
    assert (await get("/v2/models/cancer/versions/2/ready")).status_code == 404
    assert (await get("/v2/models/nowhere")).status_code == 404
    assert (await get("/v1/models/nowhere")).status_code == 404
    assert (await get("/")).json() == {"status": "alive"}
    assert (await get("/v2/health/live")).json() == {"live": True}
    assert (await get("/v2/health/ready")).json() == {"ready": True}
    assert (await get("/healthz")).json() == {"status": "ok"}
    await world.http.post("/api/v1/endpoints", json={"name": "empty"})
    assert (await get("/v1/models/empty")).status_code == 503
    assert (await get("/v2/models/empty/ready")).status_code == 503


async def test_the_runners_span_is_exported_as_the_child_of_the_request(tmp_path, make, exported):
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from libs.inference.spans import RunnerSpans

    async with make(tmp_path, spans=RunnerSpans(SimpleSpanProcessor(exported))) as world:
        await world.deployed(0.0)
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        await world.predict([[1, 2]], headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-03"})
        spans = {span.name: span for span in exported.get_finished_spans()}
        runner, server = spans["infer cancer"], spans["POST /v1/models/{model}:predict"]
        assert f"{server.context.trace_id:032x}" == f"{runner.context.trace_id:032x}" == trace_id
        assert f"{server.parent.span_id:016x}" == "b7ad6b7169203331"
        assert runner.parent.span_id == server.context.span_id
        assert f"{runner.context.span_id:016x}" == "00000000000000aa"
        assert runner.resource.attributes["service.name"] == "millrace-runner"
        assert server.attributes["http.response.status_code"] == 200
        assert world.runners[0].asked[0]["traceparent"].startswith(f"00-{trace_id}-{server.context.span_id:016x}")


def test_a_runner_span_goes_nowhere_without_a_collector(tmp_path):
    from libs.inference.spans import runner_spans
    from tests.unit.gateway.conftest import make_settings

    runner_spans(make_settings(tmp_path).telemetry).export(Span("aa", 1, 2), None, None, "r")  # type: ignore[arg-type]
