"""What a whole gateway shows of itself: ``/metrics``, and the prediction log of its endpoints."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from libs.cli.requests import parse_metrics
from libs.metrics import PROCESS
from libs.metrics.exposition import Exposition
from libs.predictions import records
from libs.predictions.records import PredictionBatch
from schemas.predictions import PredictionLogMode
from schemas.topics import PREDICTIONS
from services.gateway.metrics import SharedMetrics
from tests.unit.gateway.recording import recording

LOG = "/api/v1/endpoints/cancer/prediction-log"


async def metrics(world, **headers):
    answer = await world.http.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def values(text, name):
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


async def logged(world):
    """The rows in the log, once there are some."""
    async with asyncio.timeout(5):
        while True:
            said = [records.read(record) for record in world.broker.records(PREDICTIONS.name)]
            rows = [row for batch in said if isinstance(batch, PredictionBatch) for row in batch.rows()]
            if rows:
                return rows
            await asyncio.sleep(0.01)


async def test_metrics_and_log_tell_of_a_prediction(world):
    await world.deployed(0.5)
    answer = await world.predict([[1.0, 2.0]], headers={"x-request-id": "order-1"})
    assert answer.status_code == 200, answer.text
    shown = await metrics(world)
    assert shown.headers["content-type"].startswith("text/plain; version=0.0.4")
    labels = {"endpoint": "cancer", "model_name": "cancer", "model_version": "1", "outcome": "completed", "protocol": "v1"}
    assert values(shown.text, "millrace_requests_total") == {tuple(sorted(labels.items())): 1.0}
    (sent,) = values(shown.text, "millrace_response_bytes_total").values()
    assert sent == len(answer.content)
    (row,) = await logged(world)
    assert (row["request_id"], row["outcome"], row["response_bytes"]) == ("order-1", "completed", len(answer.content))


async def test_what_the_http_server_refuses_by_itself_is_counted(world):
    async def refused():
        return values((await metrics(world)).text, "millrace_http_refused_total").get((("status", "501"),), 0)

    before = await refused()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.gateway.server.port)
    writer.write(b"BREW / HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await reader.read()
    writer.close()
    await writer.wait_closed()
    assert await refused() == before + 1


async def test_openmetrics_is_spoken(world):
    shown = await metrics(world, accept="application/openmetrics-text; version=1.0.0")
    assert shown.headers["content-type"].startswith("application/openmetrics-text")
    assert shown.text.endswith("# EOF\n")


async def test_metrics_need_a_key_where_there_are_keys(tmp_path, make):
    async with make(tmp_path, api_keys="ops:0123456789abcdef") as world:
        assert (await world.http.get("/metrics")).status_code == 401
        assert (await world.http.get("/metrics", headers={"authorization": "Bearer 0123456789abcdef"})).status_code == 200


async def test_the_way_of_logging_is_set_and_shown(world):
    await world.http.post("/api/v1/endpoints", json={"name": "cancer"})
    answer = await world.http.put(LOG, json={"mode": "required", "sample_percent": 12.5})
    assert answer.status_code == 200, answer.text
    assert answer.json()["prediction_log"] == {"mode": "required", "sample_percent": 12.5, "max_rows_per_s": 10_000}
    shown = (await world.http.get("/api/v1/endpoints/cancer")).json()
    assert shown["prediction_log"]["mode"] == PredictionLogMode.REQUIRED
    again = await world.http.put(LOG, json={"mode": "required", "sample_percent": 12.5})
    assert again.status_code == 200


async def test_an_endpoint_is_created_with_its_way_of_logging(world):
    body = {"name": "cancer", "prediction_log": {"mode": "off"}}
    answer = await world.http.post("/api/v1/endpoints", json=body)
    assert answer.status_code == 201, answer.text
    assert answer.json()["prediction_log"]["mode"] == "off"
    assert (await world.http.post("/api/v1/endpoints", json=body)).status_code == 201
    other = await world.http.post("/api/v1/endpoints", json={"name": "cancer", "prediction_log": {"mode": "required"}})
    assert other.status_code == 409
    assert "another prediction log" in other.json()["error"]


@pytest.mark.parametrize("body", [{"mode": "sometimes"}, {"sample_percent": 101}, {"max_rows_per_s": -1}, {"sampling": 1}])
async def test_a_way_of_logging_that_makes_no_sense_is_refused(world, body):
    await world.http.post("/api/v1/endpoints", json={"name": "cancer"})
    assert (await world.http.put(LOG, json=body)).status_code == 400


async def test_no_log_no_endpoint(world):
    assert (await world.http.put(LOG, json={"mode": "off"})).status_code == 404


async def predicted(world, status):
    """The first answer of that status."""
    for _ in range(500):
        answer = await world.predict([[1.0, 2.0]])
        if answer.status_code == status:
            return answer
        await asyncio.sleep(0.02)
    raise AssertionError(f"no answer {status}, but {answer.status_code}: {answer.text}")


async def test_requests_are_refused_while_a_required_log_cannot_be_written(world):
    await world.deployed(0.5)
    await world.http.put(LOG, json={"mode": "required"})
    await world.until("/api/v1/endpoints/cancer", lambda view: view["prediction_log"]["mode"] == "required")
    world.broker.is_away = True
    answer = await predicted(world, 503)
    assert "requires its prediction log" in answer.json()["error"]
    assert answer.headers["retry-after"]
    refused = values((await metrics(world)).text, "millrace_requests_refused_total")
    assert sum(refused.values()) >= 1
    world.broker.is_away = False
    await predicted(world, 200)


@asynccontextmanager
async def worker(number, directory, monkeypatch):
    """A worker that shows its numbers, and what it shows of all."""
    monkeypatch.setattr(PROCESS, "worker", str(number))
    async with recording(directory / str(number)) as world:
        shared = SharedMetrics(directory, world.recorder.instance, world.metrics)
        await shared.start()
        yield world, shared, Exposition(world.metrics.samples, shared.others)


async def test_workers_show_each_others_numbers(tmp_path, monkeypatch):
    async with worker(1, tmp_path, monkeypatch) as (other, others_shared, _), worker(0, tmp_path, monkeypatch) as (one, shared, shown):
        one.answer("a")
        other.answer("b", "c")
        others_shared.write()
        text = shown.render("")[0].decode()
        accepted = values(text, "millrace_requests_accepted_total")
        assert {dict(labels)["worker"]: value for labels, value in accepted.items()} == {"0": 1, "1": 2}
        counted = parse_metrics(text)
        assert counted.ended == {"accepted": 3, "completed": 3}
        assert len(counted.instances) == 2
        await others_shared.stop()
        assert list(shared.others()) == []
        await shared.stop()


async def test_no_counter_goes_down_from_one_worker_s_answer_to_the_next(tmp_path, monkeypatch):
    async with worker(1, tmp_path, monkeypatch) as (_, _, next_shown), worker(0, tmp_path, monkeypatch) as (one, _, shown):
        one.answer("a", "b")
        accepted = [values(each.render("")[0].decode(), "millrace_requests_accepted_total") for each in (shown, next_shown)]
        assert [list(each.values()) for each in accepted] == [[2], [2]]


async def test_a_worker_takes_the_place_of_the_one_that_died(tmp_path, monkeypatch):
    async with worker(1, tmp_path, monkeypatch) as (dead, its_shared, _):
        dead.answer("a", "b")
        its_shared.write()
    async with worker(1, tmp_path, monkeypatch), worker(0, tmp_path, monkeypatch) as (_, _, shown):
        text = shown.render("")[0].decode()
        assert values(text, "millrace_requests_accepted_total") == {}
        assert sorted(dict(labels)["worker"] for labels in values(text, "millrace_gateway_instance_info")) == ["0", "1"]


async def test_requests_that_never_reach_the_data_plane_are_counted(tmp_path, make):
    key = {"authorization": "Bearer 0123456789abcdef"}
    async with make(tmp_path, api_keys="ops:0123456789abcdef", predict_max_bytes=2_000) as world:
        body = {"instances": [[1.0, 2.0]]}
        assert (await world.http.post("/v1/models/cancer:predict", json=body)).status_code == 401
        assert (await world.http.post("/v2/models/cancer/infer", content=b" " * 3_000, headers=key)).status_code == 413
        bad = {**key, "x-request-timeout-ms": "soon"}
        assert (await world.http.post("/endpoints/cancer/invocations", json=body, headers=bad)).status_code == 400
        assert (await world.http.post("/v1/models/cancer:predict", json=body, headers=key)).status_code == 404
        refused = values((await metrics(world, **key)).text, "millrace_requests_refused_total")
        assert {(dict(labels)["protocol"], dict(labels)["reason"]) for labels in refused} == {
            ("v1", "unauthenticated"),
            ("v2", "too_large"),
            ("invocations", "invalid"),
            ("v1", "not_found"),
        }
        assert {dict(labels)["endpoint"] for labels in refused} == {""}
