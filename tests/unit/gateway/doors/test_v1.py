"""The V1 door: its routes, its bad bodies, its CloudEvents, and what becomes of a request when runners do not behave."""

import asyncio
import base64
import gzip
import json
import zlib
from datetime import datetime

import pytest

from libs.inference.requests import Span

EVENT = {"specversion": "1.0", "id": "e1", "source": "/tests", "type": "a.request"}


async def test_v1_predicts_and_says_which_version_answered(world):
    await world.deployed(0.5)
    answer = await world.predict([[1, 2], [3, 4.25]], headers={"x-request-id": "mine-1"})
    assert (answer.status_code, answer.json()) == (200, {"predictions": [3.5, 7.75]})
    assert answer.headers["x-millrace-model-version"] == "cancer@1"
    assert answer.headers["x-request-id"] == "mine-1"


async def test_a_version_is_chosen_by_number_and_by_label(world):
    await world.deployed(0.0)
    await world.http.put("/api/v1/models/cancer/aliases/champion", json={"version": 1})
    for path in ("versions/1", "labels/champion", "versions/champion"):
        answer = await world.http.post(f"/v1/models/cancer/{path}:predict", json={"instances": [[1, 2]]})
        assert (answer.status_code, answer.json()) == (200, {"predictions": [3.0]}), path
        assert (await world.http.get(f"/v1/models/cancer/{path}")).json()["ready"] is True
    for path in ("versions/9", "labels/nobody"):
        answer = await world.http.post(f"/v1/models/cancer/{path}:predict", json={"instances": [[1, 2]]})
        assert (answer.status_code, list(answer.json())) == (404, ["error"]), path
        assert (await world.http.get(f"/v1/models/cancer/{path}")).status_code == 404


@pytest.mark.parametrize("body", [{"instances": [[1, 2], [3, 4]]}, {"inputs": [[1, 2], [3, 4]]}, {"inputs": {"input": [[1, 2], [3, 4]]}}])
async def test_rows_and_tensors_are_taken(world, body):
    await world.deployed(0.0)
    assert (await world.http.post("/v1/models/cancer:predict", json=body)).json() == {"predictions": [3.0, 7.0]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'{"instances": [[NaN, 1]]}', "not valid JSON"),
        (b'{"instances": [[1e999, 1]]}', "not valid JSON"),
        (b'{"instances": [[1, 2]], "instances": [[3, 4]]}', "twice"),
        (b'{"instances": []}', "non-empty"),
        (b'{"instances": [[1, 2, 3]]}', "expects rows of 2 numbers"),
        (b'{"instances": [["a", 2]]}', "FP64"),
        (b'{"rows": [[1, 2]]}', "exactly one of"),
        (b'{"instances": [[1, 2]], "outputs": ["proba"]}', "no output 'proba'"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"instances": ' + b"[" * 900 + b"]" * 900 + b"}", "nested deeper"),
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
        {"x-request-timeout-ms": "3600001"},
        {"content-encoding": "br"},
        {"content-encoding": "gzip"},
        {"content-encoding": "deflate"},
    ):
        answer = await world.predict([[1, 2]], headers=headers)
        assert (answer.status_code, list(answer.json())) == (400, ["error"]), headers


async def test_compressed_requests_are_unpacked_and_what_is_broken_is_a_400(world):
    await world.deployed(0.0)
    body = json.dumps({"instances": [[1, 2]]}).encode()
    halves = gzip.compress(body[:7]) + gzip.compress(body[7:])
    for encoding, packed, status in (
        ("gzip", gzip.compress(body), 200),
        ("GZIP", gzip.compress(body), 200),
        ("gzip", halves, 200),
        ("deflate", zlib.compress(body), 200),
        ("identity", body, 200),
        ("gzip", gzip.compress(body)[:-3], 400),
        ("gzip", gzip.compress(body) + b"more", 400),
        ("gzip", b"", 400),
        ("gzip", gzip.compress(b"") + gzip.compress(body), 200),
        ("gzip", gzip.compress(b"") * 1000 + gzip.compress(body), 400),
        ("deflate", zlib.compress(body) + b"more", 400),
        ("deflate", gzip.compress(body), 400),
    ):
        answer = await world.http.post("/v1/models/cancer:predict", content=packed, headers={"content-encoding": encoding})
        assert answer.status_code == status, (encoding, packed, answer.text)


async def test_a_decompression_bomb_is_a_413(tmp_path, make):
    async with make(tmp_path, predict_max_bytes=100_000) as world:
        await world.deployed(0.0)
        for bomb in (gzip.compress(b" " * 1_000_000), gzip.compress(b" " * 60_000) * 2):
            answer = await world.http.post("/v1/models/cancer:predict", content=bomb, headers={"content-encoding": "gzip"})
            assert (answer.status_code, list(answer.json())) == (413, ["error"])
        assert (await world.http.post("/v1/models/cancer:predict", content=b" " * 100_001)).status_code == 413


async def test_large_answers_are_compressed_as_the_caller_likes(world):
    await world.deployed(0.0)
    rows = [[row, 0] for row in range(2000)]
    for accepted, encoding in (
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0.2, deflate;q=0.9", "deflate"),
        ("br, *;q=0.1", "gzip"),
        ("gzip;q=0, identity", None),
        ("identity, gzip;q=0.5", None),
        ("br", None),
    ):
        answer = await world.predict(rows, headers={"accept-encoding": accepted})
        assert answer.headers.get("content-encoding") == encoding, accepted
        assert answer.json() == {"predictions": [float(row) for row in range(2000)]}
    assert "content-encoding" not in (await world.predict([[1, 2]], headers={"accept-encoding": "gzip"})).headers


async def test_a_cloudevent_in_binary_mode_is_answered_by_one(world):
    await world.deployed(0.0)
    headers = {f"ce-{name}": value for name, value in EVENT.items()}
    answers = [await world.predict([[1, 2]], headers=headers) for _ in range(2)]
    answer = answers[0]
    assert (answer.status_code, answer.json()) == (200, {"predictions": [3.0]})
    assert answer.headers["content-type"] == "application/json"
    attributes = {name[3:]: value for name, value in answer.headers.items() if name.startswith("ce-")}
    assert datetime.fromisoformat(attributes.pop("time")).tzinfo is not None
    assert attributes.pop("id") == answers[1].headers["ce-id"] != "e1"
    assert attributes == {
        "specversion": "1.0",
        "source": "io.kserve.inference.cancer",
        "type": "io.kserve.inference.response",
        "correlationid": "e1",
    }


@pytest.mark.parametrize(
    "data",
    [
        {"data": {"instances": [[1, 2]]}},
        {"data_base64": base64.b64encode(b'{"instances": [[1, 2]]}').decode()},
    ],
)
async def test_a_cloudevent_in_structured_mode_is_answered_by_one(world, data):
    await world.deployed(0.0)
    headers = {"content-type": "application/cloudevents+json; charset=utf-8"}
    answer = await world.http.post("/v1/models/cancer:predict", content=json.dumps({**EVENT, **data}), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/cloudevents+json"
    event = answer.json()
    assert event["data"] == {"predictions": [3.0]}
    assert (event["specversion"], event["source"], event["correlationid"]) == ("1.0", "io.kserve.inference.cancer", "e1")
    assert answer.headers["x-millrace-model-version"] == "cancer@1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": None}, "has no id"),
        ({"source": 7}, "has no source"),
        ({"specversion": "9.9"}, "specversion"),
        ({"data": "text"}, "must be a JSON object"),
        ({"data_base64": "§"}, "not base64"),
        ({"data": {"instances": []}}, "non-empty"),
    ],
)
async def test_a_bad_cloudevent_is_a_400(world, change, says):
    await world.deployed(0.0)
    event = {**EVENT, "data": {"instances": [[1, 2]]}, **change}
    headers = {"content-type": "application/cloudevents+json"}
    answer = await world.http.post("/v1/models/cancer:predict", content=json.dumps(event), headers=headers)
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert (await world.predict([[1, 2]], headers={"ce-specversion": "1.0", "ce-id": "1"})).status_code == 400


async def test_what_there_is_and_whether_it_answers(world):
    await world.deployed(0.0)
    get = world.http.get
    assert (await get("/")).json() == {"status": "alive"}
    assert (await get("/v1/models")).json() == {"models": ["cancer"]}
    available = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert (await get("/v1/models/cancer")).json() == {"name": "cancer", "ready": True, "model_version_status": [available]}
    assert (await get("/v1/models/nowhere")).status_code == 404
    await world.http.post("/api/v1/endpoints", json={"name": "empty"})
    answer = await get("/v1/models/empty")
    assert answer.status_code == 503
    assert answer.json()["ready"] is False
    assert "nothing is deployed" in answer.json()["error"]


async def test_unknown_endpoint_and_version_are_404(world):
    await world.deployed(0.0)
    answer = await world.predict([[1, 2]], endpoint="nowhere")
    assert (answer.status_code, answer.json()) == (404, {"error": "there is no endpoint 'nowhere'"})
    answer = await world.http.post("/v1/models/cancer/versions/9:predict", json={})
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


async def test_a_request_waits_for_a_replica_that_is_being_restarted(world):
    deployment = await world.deployed(0.0)
    await world.changed(deployment, [])
    await world.until("/api/v1/endpoints/cancer", lambda view: not view["deployments"][0]["replicas"])
    asked = asyncio.create_task(world.predict([[1, 2]]))
    await asyncio.sleep(0)
    await world.changed(deployment, [(await world.runner(7.0)).replica])
    assert (await asked).json() == {"predictions": [10.0]}


async def test_a_runner_that_came_back_at_its_address_is_asked_again(world):
    await world.deployed(0.0)
    assert (await world.predict([[1, 2]])).status_code == 200
    await world.runners[0].stop()
    asked = asyncio.create_task(world.predict([[1, 2]]))
    await asyncio.sleep(0)
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


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "Application/X-Pickle", "application/octet-stream", "application/msgpack;v=1", "multipart/form-data; boundary=x"],
)
async def test_a_body_that_is_plainly_something_else_is_a_415(world, content_type):
    await world.deployed(0.0)
    answer = await world.predict([[1, 2]], headers={"content-type": content_type})
    assert (answer.status_code, list(answer.json())) == (415, ["error"])
    assert content_type.split(";", maxsplit=1)[0].lower() in answer.json()["error"]
    event = {f"ce-{name}": value for name, value in EVENT.items()}
    assert (await world.predict([[1, 2]], headers={**event, "content-type": content_type})).status_code == 415


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "text/json", "application/vnd.api+json; charset=utf-8"]
)
async def test_what_clients_say_without_thinking_is_taken(world, content_type):
    await world.deployed(0.0)
    headers = {} if content_type is None else {"content-type": content_type}
    answer = await world.http.post("/v1/models/cancer:predict", content=b'{"instances": [[1, 2]]}', headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"predictions": [3.0]})
