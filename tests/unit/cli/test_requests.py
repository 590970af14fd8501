"""``millrace requests audit`` and ``millrace predictions tail`` over a log that a real recorder wrote."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from libs.messaging.records import Record
from libs.metrics.exposition import of
from libs.predictions import records
from schemas.topics import PREDICTIONS
from services.gateway.predictions import Outcome
from tests.unit.cli.conftest import Run
from tests.unit.cli.gateway import FakeGateway
from tests.unit.gateway.recording import recording

AUDIT = ("requests", "audit")


class Log:
    """Stands in for Kafka: the records, and what was asked of it."""

    def __init__(self, written: list[Record]) -> None:
        self.written = written
        self.asked: list[Any] = []

    def __call__(self, bootstrap_servers: str, *, is_embedded: bool = False) -> "Log":
        self.asked.append(bootstrap_servers)
        return self

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def until_now(self, since: Any) -> Any:
        self.asked.append(since)
        return iter(self.written)

    def from_now(self) -> Any:
        return iter(self.written)


@pytest.fixture
def told(tmp_path, monkeypatch, gateway: FakeGateway) -> Log:
    """What a gateway has logged that runs still, and its metrics."""

    async def write() -> tuple[list[Record], str]:
        async with recording(tmp_path) as world:
            world.answer("first", "second")
            world.end(world.accept("third"), Outcome.EXPIRED)
            await world.written()
            text = of(world.metrics).render("")[0].decode()
            return list(world.broker.records(PREDICTIONS.name)), text

    written, text = asyncio.run(write())
    log = Log(written)
    gateway.on("GET", "/metrics", lambda _: (200, text.encode()))
    monkeypatch.setattr("libs.cli.log_reader.LogReader", log)
    monkeypatch.setattr("libs.cli.requests._PAUSE_S", 0.0)
    return log


def batches(log: Log) -> list[int]:
    return [place for place, record in enumerate(log.written) if isinstance(records.read(record), records.PredictionBatch)]


def test_an_account_that_adds_up_exits_with_0(run: Run, told: Log):
    done = run(*AUDIT)
    assert (done.exit_code, done.err) == (0, "every one of 3 accepted requests is accounted for\n")
    _, row = done.out.splitlines()
    assert row.split()[1:6] == ["live", "3", "2", "0", "1"]
    assert row.endswith("adds up")


def test_the_account_is_also_json(run: Run, told: Log):
    found = json.loads(run(*AUDIT, "--json").out)
    assert found["is_sound"]
    assert found["instances"][0]["ended"] == {"completed": 2, "failed": 0, "expired": 1}


def test_a_record_that_was_removed_exits_with_1_and_says_so(run: Run, told: Log):
    del told.written[batches(told)[0]]
    done = run(*AUDIT)
    assert done.exit_code == 1
    assert "the account of requests does not add up" in done.err
    assert "1 of its records are missing: 1" in done.out
    assert "DOES NOT ADD UP" in done.out


def test_a_record_that_was_changed_exits_with_1(run: Run, told: Log):
    place = batches(told)[-1]
    record = told.written[place]
    told.written[place] = replace(record, value=record.value.replace(b'"accepted":3', b'"accepted":2'))
    assert run(*AUDIT).exit_code == 1


def test_metrics_that_say_otherwise_exit_with_1(run: Run, told: Log, gateway: FakeGateway):
    text = gateway._handlers["GET", "/metrics"](None)[1].decode()
    lied = text.replace('outcome="completed",protocol="v1"} 2.0', 'outcome="completed",protocol="v1"} 5.0')
    assert lied != text
    gateway.on("GET", "/metrics", lambda _: (200, lied.encode()))
    done = run(*AUDIT)
    assert done.exit_code == 1
    assert "the log says 2 completed, its metrics 5" in done.err


def test_a_gateway_that_is_gone_unsettled_exits_with_1(run: Run, told: Log, gateway: FakeGateway):
    gateway.on("GET", "/metrics", {"error": "gone"}, status=503)
    done = run(*AUDIT)
    assert done.exit_code == 1
    assert "nobody has settled its account" in done.err


def test_the_time_to_begin_from_is_handed_on(run: Run, told: Log):
    assert run(*AUDIT, "--since", "2026-01-01T00:00:00Z", "--bootstrap-servers", "kafka:9092").exit_code == 0
    assert told.asked[0] == "kafka:9092"
    assert told.asked[1].isoformat() == "2026-01-01T00:00:00+00:00"


def test_a_time_that_is_none_is_refused(run: Run, told: Log):
    done = run(*AUDIT, "--since", "yesterday")
    assert done.exit_code == 2
    assert "'yesterday' is no time" in done.err


def test_requests_are_printed_one_per_line(run: Run, told: Log):
    done = run("predictions", "tail", "e", "--no-follow")
    ends = {line.split()[2]: line.split()[3] for line in done.out.splitlines()}
    assert ends == {"first": "completed", "second": "completed", "third": "expired"}
    assert run("predictions", "tail", "other", "--no-follow").out == ""


def test_requests_are_printed_with_their_inputs_as_json(run: Run, told: Log):
    lines = [json.loads(line) for line in run("predictions", "tail", "e", "--no-follow", "--json").out.splitlines()]
    first = next(line for line in lines if line["request_id"] == "first")
    assert (first["model_name"], first["model_version"], first["outcome"]) == ("m", "1", "completed")
    assert (first["inputs"], first["outputs"]) == ({"input": [[1.0, 1.0]]}, {"predict": [10.0]})
    third = next(line for line in lines if line["request_id"] == "third")
    assert third["queue_s"] is None
    assert "inputs" not in third


def test_an_endpoints_log_is_shown_and_changed_in_part(run: Run, gateway: FakeGateway):
    settings = {"mode": "best_effort", "sample_percent": 100.0, "max_rows_per_s": 10_000}
    gateway.on("GET", "/api/v1/endpoints/e", {"endpoint_name": "e", "prediction_log": settings})
    assert "best_effort" in run("endpoints", "log", "e").out
    changed = {**settings, "mode": "required", "sample_percent": 5.0}
    gateway.on("PUT", "/api/v1/endpoints/e/prediction-log", {"endpoint_name": "e", "prediction_log": changed})
    assert "required" in run("endpoints", "log", "e", "--mode", "required", "--sample", "5").out
    assert gateway.sent("PUT", "/api/v1/endpoints/e/prediction-log").json == changed
