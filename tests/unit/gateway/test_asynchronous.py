"""Asynchronous predictions, over HTTP: accepted, carried out, kept, cancelled, expired, and told to a webhook."""

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import json
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from libs.messaging import cloudevents, consumer
from libs.messaging.retry import Retry
from schemas.operations import Content, PredictionAccepted, PredictionEnded
from schemas.topics import DLQ, OPERATIONS
from tests.unit.gateway.conftest import NOW

ASYNC = {"prefer": "respond-async"}
ROWS = {"instances": [[1, 2], [3, 4.25]]}


async def accepted(world, body=ROWS, path="/v1/models/cancer:predict", **headers):
    answer = await world.http.post(path, json=body, headers={**ASYNC, **headers})
    assert answer.status_code == 202, answer.text
    return answer


async def ended(world, url):
    return await world.until(url, lambda view: view["done"])


async def test_an_accepted_request_is_carried_out_and_its_answer_is_what_a_synchronous_one_gets(world):
    await world.deployed(0.5)
    answer = await accepted(world)
    url = answer.headers["location"]
    assert answer.json()["operation_url"] == url
    assert answer.headers["preference-applied"] == "respond-async"
    view = await ended(world, url)
    assert (view["status"], view["http_status"]) == ("completed", 200)
    result = await world.http.get(view["result_url"])
    now = await world.predict(ROWS["instances"])
    assert (result.status_code, result.content) == (200, now.content)
    assert result.headers["x-millrace-model-version"] == "cancer@1"


@pytest.mark.parametrize(
    ("path", "body", "member"),
    [
        ("/v2/models/cancer/infer", {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}, "outputs"),
        ("/v1/projects/p/locations/l/endpoints/cancer:predict", ROWS, "deployedModelId"),
        ("/endpoints/cancer/invocations", ROWS, "predictions"),
    ],
)
async def test_every_predict_route_takes_the_preference(world, path, body, member):
    await world.deployed(0.0)
    url = (await accepted(world, body, path)).headers["location"]
    await ended(world, url)
    assert member in (await world.http.get(f"{url}/result")).json()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/models/nobody:predict", ROWS, 404),
        ("/v1/models/cancer:predict", {"instances": [[1, 2, 3]]}, 400),
        ("/v1/models/cancer/versions/7:predict", ROWS, 404),
    ],
)
async def test_what_can_never_be_answered_is_not_accepted(world, path, body, status):
    await world.deployed(0.0)
    answer = await world.http.post(path, json=body, headers=ASYNC)
    assert answer.status_code == status, answer.text


async def test_a_request_waits_for_a_replica_much_longer_than_a_client_would(world):
    deployment = await world.deployed(0.0)
    await world.changed(deployment, [])
    await world.until("/api/v1/endpoints/cancer", lambda view: not any(d["replicas"] for d in view["deployments"]))
    url = (await accepted(world)).headers["location"]
    assert (await world.http.get(f"{url}/result")).status_code == 202
    await world.changed(deployment, [(await world.runner(0.0)).replica])
    assert (await ended(world, url))["status"] == "completed"


async def without_replica(world, endpoint="stuck"):
    """An endpoint whose only replica has gone."""
    deployment = await world.deployed(0.0, model=endpoint, endpoint=endpoint)
    await world.changed(deployment, [])
    await world.until(f"/api/v1/endpoints/{endpoint}", lambda view: not any(d["replicas"] for d in view["deployments"]))
    return deployment


async def test_requests_that_wait_for_a_replica_hold_nobody_up(tmp_path, make):
    async with make(tmp_path, async_concurrency=2) as world:
        await world.deployed(0.0)
        deployment = await without_replica(world)
        stuck = [(await accepted(world, path="/v1/models/stuck:predict")).headers["location"] for _ in range(5)]
        assert (await ended(world, (await accepted(world)).headers["location"]))["status"] == "completed"
        assert {(await world.http.get(url)).json()["status"] for url in stuck} == {"pending"}
        await world.changed(deployment, [(await world.runner(0.0)).replica])
        assert {(await ended(world, url))["status"] for url in stuck} == {"completed"}


async def test_requests_that_a_model_does_not_answer_hold_nobody_up(tmp_path, make):
    async with make(tmp_path, async_concurrency=2) as world:
        await world.deployed(0.0, model="stuck", endpoint="stuck")
        world.runners[0].behave = lambda _: "hang"
        await world.deployed(0.0)
        stuck = [(await accepted(world, path="/v1/models/stuck:predict")).headers["location"] for _ in range(3)]
        assert (await ended(world, (await accepted(world)).headers["location"]))["status"] == "completed"
        assert {(await world.http.get(url)).json()["status"] for url in stuck} == {"pending"}


async def test_a_request_that_waits_outlives_the_gateway(tmp_path, make):
    async with make(tmp_path) as world:
        await world.deployed(0.0)
        await without_replica(world)
        stuck = (await accepted(world, path="/v1/models/stuck:predict")).headers["location"]
        await ended(world, (await accepted(world)).headers["location"])
        deployments = (await world.http.get("/api/v1/endpoints/stuck")).json()["deployments"]
    async with make(tmp_path, broker=world.broker, store=world.store) as again:
        await again.changed({**deployments[0], "endpoint_name": "stuck"}, [(await again.runner(0.0)).replica])
        assert (await ended(again, stuck))["status"] == "completed"


async def test_a_request_whose_body_is_lost_fails(world):
    await world.deployed(0.0)
    await without_replica(world)
    await world.publish(request(body=Content(sha256="a" * 64, size_bytes=20_000)))
    assert (await ended(world, "/api/v1/predictions/a"))["status"] == "failed"


def request(**changes):
    """An accepted request as it stands in the log."""
    body = json.dumps(ROWS).encode()
    about = {
        "operation_id": "a",
        "endpoint_name": "cancer",
        "principal": "local",
        "path": "/v1/models/cancer:predict",
        "body": Content(base64=base64.b64encode(body).decode(), size_bytes=len(body)),
        "accepted_at": NOW,
        "expires_at": NOW + timedelta(days=1),
    }
    return PredictionAccepted(**{**about, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"headers": {"content-type": "text/\u017ej"}},
        {"query": "\u017e"},
        {"body": Content(base64="YQ=a", size_bytes=1)},
    ],
)
async def test_a_request_that_cannot_be_carried_out_fails_alone(world, changes):
    await world.deployed(0.0)
    await world.publish(request(path="/v1/projects/p/locations/l/endpoints/cancer:predict", **changes))
    view = await ended(world, "/api/v1/predictions/a")
    assert (view["status"], view["http_status"]) == ("failed", 500)
    assert (await world.http.get("/api/v1/predictions/a/result")).json()["error"]["status"] == "INTERNAL"
    await ended(world, (await accepted(world)).headers["location"])


async def test_a_record_that_cannot_be_read_is_dead_lettered_once(world):
    await world.deployed(0.0)
    good = json.loads(request().model_dump_json())
    await world.publish(request(operation_id="b"))
    (record,) = (record for record in world.broker.records(OPERATIONS.name) if record.key == b"b")
    local = json.dumps({**good, "operation_id": "c", "expires_at": "2026-01-02T00:00:00"}).encode()
    far = json.dumps({**good, "operation_id": "d", "expires_at": "9999-12-31T23:59:59Z"}).encode()
    await world.broker.append([dataclasses.replace(record, value=value) for value in (b"{}", local, far)])
    await ended(world, "/api/v1/predictions/d")
    assert len(world.broker.records(DLQ.name)) == 2


async def test_a_request_that_expired_before_it_was_answered_ends_once(tmp_path, make):
    async def expired(world, name):
        await world.publish(request(operation_id=name, expires_at=NOW - timedelta(hours=1)))
        async with asyncio.timeout(10):
            while name not in [end.operation_id for end in ends(world)]:  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0.002)

    def ends(world):
        events = [cloudevents.read(record).data for record in world.broker.records(OPERATIONS.name)]
        return [event for event in events if isinstance(event, PredictionEnded)]

    async with make(tmp_path) as world:
        await expired(world, "a")
    world.broker._committed.clear()
    async with make(tmp_path, broker=world.broker, store=world.store) as again:
        await expired(again, "b")
    assert [(end.operation_id, end.outcome, end.status) for end in ends(world)] == [("a", "expired", 504), ("b", "expired", 504)]


async def test_an_event_is_answered_by_an_event_and_the_callers_id_is_kept(world):
    await world.deployed(0.0)
    event = {"ce-specversion": "1.0", "ce-id": "7", "ce-source": "/here", "ce-type": "ask"}
    url = (await accepted(world, **event)).headers["location"]
    await ended(world, url)
    assert (await world.http.get(f"{url}/result")).headers["ce-correlationid"] == "7"
    body = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}
    answer = await accepted(world, body, "/v2/models/cancer/infer", **{"x-request-id": "mine"})
    await ended(world, answer.headers["location"])
    assert answer.headers["x-request-id"] == "mine"
    assert (await world.http.get(answer.json()["result_url"])).json()["id"] == "mine"


async def test_the_trace_of_a_request_goes_on_when_it_is_carried_out(world, exported):
    await world.deployed(0.0)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    answer = await accepted(world, traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
    await ended(world, answer.headers["location"])
    (asked,) = world.runners[0].asked
    operation_id = answer.json()["operation_id"]
    spans = [span for span in exported.get_finished_spans() if span.attributes.get("millrace.entity") == operation_id]
    (process,) = (span for span in spans if span.name.startswith("process"))
    assert asked["traceparent"] == f"00-{trace_id}-{process.context.span_id:016x}-01"


async def test_a_cancelled_request_is_not_answered(world):
    deployment = await world.deployed(0.0)
    await world.changed(deployment, [])
    await world.until("/api/v1/endpoints/cancer", lambda view: not any(d["replicas"] for d in view["deployments"]))
    url = (await accepted(world)).headers["location"]
    view = (await world.http.post(f"{url}:cancel")).json()
    assert view["status"] == "cancelled"
    result = await world.http.get(f"{url}/result")
    assert (result.status_code, "cancelled" in result.text) == (404, True)
    assert (await world.http.post(f"{url}:cancel")).json()["status"] == "cancelled"


async def test_an_operation_of_somebody_else_does_not_exist(tmp_path, make):
    one, other = "k" * 20, "q" * 20
    async with make(tmp_path, api_keys=f"one:{one},other:{other}") as world:
        world.http.headers["authorization"] = f"Bearer {one}"
        await world.deployed(0.0)
        url = (await accepted(world)).headers["location"]
        await ended(world, url)
        answer = await world.http.get(url, headers={"authorization": f"Bearer {other}"})
        assert answer.status_code == 404


@pytest.mark.parametrize("value", ["0", "-1", "soon", "999999999", "9" * 30])
async def test_a_bad_expiry_is_a_400(world, value):
    await world.deployed(0.0)
    answer = await world.http.post("/v1/models/cancer:predict", json=ROWS, headers={**ASYNC, "x-millrace-expires-s": value})
    assert (answer.status_code, "x-millrace-expires-s" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize("header", [{"x-millrace-webhook": "http://example.org/"}, {"x-millrace-expires-s": "0"}])
async def test_of_a_refused_request_nothing_is_stored(world, header):
    await world.deployed(0.0)
    stored = dict(world.store.contents)
    answer = await world.http.post("/v1/models/cancer:predict", json={"instances": [[1, 2]] * 5_000}, headers={**ASYNC, **header})
    assert answer.status_code == 400
    assert world.store.contents == stored


async def test_no_more_is_accepted_than_can_be_kept_until_it_expires(tmp_path, make):
    async with make(tmp_path, async_operations=1) as world:
        await world.deployed(0.0)
        first = (await accepted(world)).headers["location"]
        await ended(world, first)
        refused = await world.http.post("/v1/models/cancer:predict", json=ROWS, headers=ASYNC)
        assert (refused.status_code, "kept" in refused.json()["error"]) == (429, True)
        assert (await world.http.get(first)).json()["status"] == "completed"
        told = (await world.http.get("/metrics")).text
        assert 'millrace_requests_refused_total{endpoint="cancer",protocol="v1",reason="overloaded"} 1' in told


async def test_answers_that_are_kept_have_a_bound(tmp_path, make):
    async with make(tmp_path, async_kept_bytes=1) as world:
        await world.deployed(0.0)
        await ended(world, (await accepted(world)).headers["location"])
        refused = await world.http.post("/v1/models/cancer:predict", json=ROWS, headers=ASYNC)
        assert refused.status_code == 429


async def test_nobody_can_lock_all_others_out(tmp_path, make):
    one, other = {"authorization": f"Bearer {'k' * 20}"}, {"authorization": f"Bearer {'q' * 20}"}
    async with make(tmp_path, api_keys=f"one:{'k' * 20},other:{'q' * 20}", async_operations=4) as world:
        world.http.headers.update(one)
        await world.deployed(0.0)
        for _ in range(2):
            await ended(world, (await accepted(world)).headers["location"])
        refused = await world.http.post("/v1/models/cancer:predict", json=ROWS, headers=ASYNC)
        assert (refused.status_code, "kept for you" in refused.json()["error"]) == (429, True)
        await accepted(world, **other)


async def test_large_bodies_go_through_the_artifact_store(world):
    await world.deployed(0.0)
    rows = [[1, index] for index in range(5_000)]
    url = (await accepted(world, {"instances": rows})).headers["location"]
    await ended(world, url)
    assert (await world.http.get(f"{url}/result")).json()["predictions"] == [1.0 + index for index in range(5_000)]


async def test_operations_outlive_the_gateway(tmp_path, make):
    async with make(tmp_path) as world:
        await world.deployed(0.0)
        url = (await accepted(world)).headers["location"]
        await ended(world, url)
        async with make(tmp_path, broker=world.broker, store=world.store, registry=False) as again:
            assert (await ended(again, url))["status"] == "completed"
            assert (await again.http.get(f"{url}/result")).json() == {"predictions": [3.0, 7.25]}


@asynccontextmanager
async def listening(*statuses):
    """A client's server that answers with these statuses, the last one for ever; yields its address and what it got."""
    got: list[tuple[dict[str, str], bytes]] = []

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)}
        got.append((headers, await reader.readexactly(int(headers["content-length"]))))
        status = statuses[min(len(got), len(statuses)) - 1]
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook", got


async def test_a_webhook_is_told_with_a_signature_until_it_takes_the_news(tmp_path, make):
    async with (
        listening(500, 200) as (hook, got),
        make(tmp_path, webhook_hosts="127.0.0.1", webhook_secret="s" * 20, webhook_first_pause_s=0.01) as world,
    ):
        await world.deployed(0.0)
        url = (await accepted(world, **{"x-millrace-webhook": hook})).headers["location"]
        view = await world.until(url, lambda view: view.get("webhook") not in (None, "pending"))
        assert view["webhook"] == "delivered"
    assert len(got) == 2
    headers, body = got[-1]
    assert json.loads(body)["result"] == {"predictions": [3.0, 7.25]}
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.new(b"s" * 20, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{wanted}"


@asynccontextmanager
async def silent():
    """A server that takes connections and never answers; yields its address."""

    async def wait(reader, writer):
        await reader.read()
        writer.close()

    server = await asyncio.start_server(wait, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    finally:
        server.close()


async def test_a_host_that_does_not_answer_holds_up_neither_predictions_nor_other_hosts(tmp_path, make, monkeypatch):
    monkeypatch.setattr("services.gateway.app._WEBHOOKS_AT_ONCE", 2)
    settings = {"webhook_hosts": "127.0.0.1", "webhook_secret": "s" * 20, "async_concurrency": 2}
    async with silent() as dead, listening(200) as (hook, got), make(tmp_path, **settings) as world:
        await world.deployed(0.0)
        for _ in range(5):
            url = (await accepted(world, **{"x-millrace-webhook": dead})).headers["location"]
            assert (await ended(world, url))["webhook"] == "pending"
        url = (await accepted(world, **{"x-millrace-webhook": hook})).headers["location"]
        await world.until(url, lambda view: view["webhook"] == "delivered")
    assert len(got) == 1


async def test_a_webhook_that_was_told_is_not_told_again_by_a_gateway_that_starts_anew(tmp_path, make):
    settings = {"webhook_hosts": "127.0.0.1", "webhook_secret": "s" * 20}
    async with listening(200) as (hook, got):
        async with make(tmp_path, **settings) as world:
            await world.deployed(0.0)
            url = (await accepted(world, **{"x-millrace-webhook": hook})).headers["location"]
            await world.until(url, lambda view: view.get("webhook") == "delivered")
        world.broker._committed.clear()
        async with make(tmp_path, broker=world.broker, store=world.store, registry=False, **settings) as again:
            await again.publish(request(webhook_url=hook), ended_as("cancelled", webhook_url=hook))
            await again.until("/api/v1/predictions/a", lambda view: view.get("webhook") == "delivered")
    assert [headers["webhook-id"] for headers, _ in got] == [url.rpartition("/")[2], "a"]


def ended_as(outcome, **changes):
    """An end as it stands in the log."""
    about = {"operation_id": "a", "endpoint_name": "cancer", "status": 200, "media_type": "application/json"}
    body = Content(base64=base64.b64encode(b"{}").decode(), size_bytes=2)
    return PredictionEnded(**{**about, "outcome": outcome, "body": body, "expires_at": NOW + timedelta(days=1), **changes})


@pytest.mark.parametrize("changes", [{"operation_id": "\u017e"}, {"body": Content(base64="YQ==", size_bytes=1)}])
async def test_news_that_cannot_be_told_are_given_up_alone(tmp_path, make, changes):
    settings = {"webhook_hosts": "127.0.0.1", "webhook_secret": "s" * 20, "webhook_attempts": 1}
    async with listening(200) as (hook, got), make(tmp_path, **settings) as world:
        await world.publish(ended_as("completed", webhook_url=hook, **changes), ended_as("completed", operation_id="b", webhook_url=hook))
        async with asyncio.timeout(10):
            while len(world.broker.records(OPERATIONS.name)) < 4:  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0.002)
    assert [headers["webhook-id"] for headers, _ in got] == ["b"]


async def test_a_webhook_that_never_takes_the_news_is_given_up(tmp_path, make):
    settings = {"webhook_hosts": "127.0.0.1", "webhook_secret": "s" * 20, "webhook_attempts": 2, "webhook_first_pause_s": 0.01}
    async with listening(500) as (hook, got), make(tmp_path, **settings) as world:
        await world.deployed(0.0)
        url = (await accepted(world, **{"x-millrace-webhook": hook})).headers["location"]
        view = await world.until(url, lambda view: view.get("webhook") not in (None, "pending"))
        assert view["webhook"] == "given up: the last attempt was answered 500"
    assert len(got) == 2


@pytest.mark.parametrize(
    ("hosts", "url"),
    [
        ("", "http://127.0.0.1/hook"),
        ("example.org", "http://127.0.0.1/hook"),
        ("example.org", "http://example.org.evil.net/"),
        ("example.org", "ftp://example.org/"),
        ("example.org", "http://user:pw@example.org/"),
        ("example.org", "http://example.org:99999/"),
        ("example.org", "no url"),
    ],
)
async def test_a_webhook_goes_only_where_the_operator_allows(tmp_path, make, hosts, url):
    async with make(tmp_path, webhook_hosts=hosts, webhook_secret="s" * 20) as world:
        await world.deployed(0.0)
        answer = await world.http.post("/v1/models/cancer:predict", json=ROWS, headers={**ASYNC, "x-millrace-webhook": url})
        assert (answer.status_code, "webhook" in answer.json()["error"]) == (400, True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(consumer, "POLL_S", 0.01)
    monkeypatch.setattr("services.gateway.app.PAUSES", Retry(0.01, longest_s=0.1))
