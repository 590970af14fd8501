"""Triton's statistics: what is counted of a deployment, by one process and by several together."""

import time

import grpc
import numpy as np
import pytest

from libs.errors import NotFoundError
from libs.inference.oip_proto import open_inference_pb2 as oip
from libs.metrics import PROCESS
from services.gateway.metrics import SharedMetrics
from services.gateway.prediction_log import ROW_TYPE
from services.gateway.predictions import Outcome
from services.gateway.settings import GrpcSettings
from services.gateway.statistics import MOST_SIZES, Statistics, together
from tests.unit.gateway.conftest import make_world
from tests.unit.gateway.recording import recording

PARTS = ("compute_input", "queue", "compute_infer", "compute_output")


def row(outcome, accepted_s, queued_s, sent_s, ended_s, model_s, rows=1):
    made = np.zeros(1, ROW_TYPE)
    made["outcome"], made["rows"] = outcome, rows
    for name, value in (("accepted_s", accepted_s), ("queued_s", queued_s), ("sent_s", sent_s), ("ended_s", ended_s), ("model_s", model_s)):
        made[name] = value
    return made


def test_the_parts_of_a_request_make_its_time():
    statistics = Statistics()
    rows = np.concatenate([row(0, 10, 10.25, 10.5, 12, 1, rows=3), row(0, 11, 11, 11.5, 11.75, 0.125), row(1, 12, 12, 0, 12.5, 0)])
    statistics.count_requests(rows, 1000.0)
    told = together([statistics.document()])
    stats = told["inference_stats"]
    assert (told["inference_count"], told["last_inference"]) == (4, 1_012_000)
    assert stats["success"] == {"count": 2, "ns": 2_750_000_000}
    assert stats["fail"] == {"count": 1, "ns": 500_000_000}
    assert [stats[part] for part in PARTS] == [{"count": 2, "ns": ns} for ns in (250_000_000, 750_000_000, 1_125_000_000, 625_000_000)]
    assert stats["cache_hit"] == stats["cache_miss"] == {"count": 0, "ns": 0}


def test_executions_are_counted_by_their_size_and_the_sizes_are_bounded():
    statistics = Statistics()
    statistics.count_executions(np.array([2.0, 1.0, 2.0]), np.array([0.5, 0.25, 0.125]))
    other = Statistics()
    other.count_executions(np.array([2.0]), np.array([1.0]))
    told = together([statistics.document(), other.document(), None])
    assert told["execution_count"] == 4
    assert [(batch["batch_size"], batch["compute_infer"]) for batch in told["batch_stats"]] == [
        (1, {"count": 1, "ns": 250_000_000}),
        (2, {"count": 3, "ns": 1_625_000_000}),
    ]
    sizes = np.arange(1.0, MOST_SIZES + 11)
    statistics.count_executions(sizes, np.ones(len(sizes)))
    told = together([statistics.document()])
    assert (told["execution_count"], len(told["batch_stats"])) == (3 + len(sizes), MOST_SIZES)


async def stats(world, path):
    answer = await world.http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()["model_stats"]


async def test_requests_and_executions_are_counted_over_rest_and_grpc(tmp_path):
    async with make_world(tmp_path, grpc=GrpcSettings(port=0)) as world:
        await world.deployed(0.5)
        await world.http.post("/api/v1/endpoints", json={"name": "empty"})
        (before,) = await stats(world, "/v2/models/cancer/stats")
        assert (before["last_inference"], before["execution_count"], before["batch_stats"]) == (0, 0, [])
        assert before["inference_stats"]["success"] == {"count": 0, "ns": 0}
        begun_ms, world.runners[0].model_s = time.time() * 1000, 0.001
        for rows in ([[1, 2]], [[1, 2], [3, 4]], [[5, 6]]):
            assert (await world.predict(rows)).status_code == 200
        world.runners[0].behave = lambda _: ("model_error", "no")
        assert (await world.predict([[1, 2]])).status_code == 500
        assert (await world.predict([[1, 2, 3]])).status_code == 400
        (told,) = await stats(world, "/v2/models/cancer/stats")
        assert (told["name"], told["version"], told["inference_count"], told["execution_count"]) == ("cancer", "1", 4, 3)
        assert begun_ms - 1 <= told["last_inference"] <= time.time() * 1000 + 1
        parts = told["inference_stats"]
        assert (parts["success"]["count"], parts["fail"]["count"]) == (3, 2)
        assert [parts[part]["count"] for part in PARTS] == [3] * 4
        assert parts["compute_infer"]["ns"] == 3_000_000
        assert all(parts[part]["ns"] > 0 for part in ("success", "fail", "queue", "compute_input"))
        assert [(each["batch_size"], each["compute_infer"]) for each in told["batch_stats"]] == [
            (1, {"count": 2, "ns": 2_000_000}),
            (2, {"count": 1, "ns": 1_000_000}),
        ]
        assert await stats(world, "/v2/models/cancer/versions/1/stats") == await stats(world, "/v2/models/stats") == [told]
        assert await stats(world, "/v2/models/empty/stats") == []
        for path in ("/v2/models/nowhere/stats", "/v2/models/cancer/versions/9/stats"):
            assert (await world.http.get(path)).status_code == 404
        async with grpc.aio.insecure_channel(f"127.0.0.1:{world.gateway.grpc.port}") as channel:
            ask = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelStatistics",
                request_serializer=oip.ModelStatisticsRequest.SerializeToString,
                response_deserializer=oip.ModelStatisticsResponse.FromString,
            )
            for asked in ({}, {"name": "cancer"}, {"name": "cancer", "version": "1"}):
                (over_grpc,) = (await ask(oip.ModelStatisticsRequest(**asked))).model_stats
                assert (over_grpc.name, over_grpc.inference_count, over_grpc.last_inference) == ("cancer", 4, told["last_inference"])
                assert over_grpc.inference_stats.success.ns == parts["success"]["ns"]
                assert [batch.batch_size for batch in over_grpc.batch_stats] == [1, 2]
            for asked, status in (({"name": "nowhere"}, "NOT_FOUND"), ({"version": "1"}, "INVALID_ARGUMENT")):
                call = ask(oip.ModelStatisticsRequest(**asked))
                assert (await call.code()).name == status


async def test_an_unknown_endpoint_is_told_as_triton_tells_it(world):
    says = "Request for unknown model: there is no endpoint 'nowhere'"
    for path in ("/v2/models/nowhere", "/v2/models/nowhere/stats", "/v2/models/nowhere/config"):
        answer = await world.http.get(path)
        assert (answer.status_code, answer.json()) == (404, {"error": says})
    assert (await world.http.get("/v1/models/nowhere")).json() == {"error": "there is no endpoint 'nowhere'"}
    with pytest.raises(NotFoundError, match="^there is no endpoint 'nowhere'$"):
        world.gateway.dataplane._catalog.endpoint("nowhere")


async def test_workers_are_counted_together(tmp_path, monkeypatch):
    documents = []
    for number, ended in ((1, ("a", "b")), (0, ("c",))):
        monkeypatch.setattr(PROCESS, "worker", str(number))
        async with recording(tmp_path / str(number)) as world:
            for request_id in ended:
                members = world.accept(request_id)
                world.recorder.batch_sent(batch := world.batch(members))
                world.end(members, Outcome.COMPLETED)
                batch.answered_s, batch.model_s = 100.5, 0.25
                world.recorder.batch_ended(batch, None)
            shared = SharedMetrics(tmp_path, world.recorder.instance, world.metrics, world.recorder.statistics)
            await shared.start()
            documents = [world.recorder.statistics(), *shared.others_statistics()]
    told = together([document.get("e.m.1") for document in documents])
    assert (told["inference_count"], told["execution_count"]) == (3, 3)
    assert told["inference_stats"]["success"] == {"count": 3, "ns": 1_500_000_000}
    assert told["batch_stats"][0]["compute_infer"] == {"count": 3, "ns": 750_000_000}
