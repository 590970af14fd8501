"""Asynchronous predictions, over HTTP: accepted, carried out, kept, cancelled, expired, and told to a webhook."""

import asyncio
import base64
import hashlib
import hmac
import json
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from libs.messaging import cloudevents, consumer
from schemas.operations import Content, PredictionAccepted
from services.gateway.asynchronous import Operations
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


async def test_no_more_is_accepted_than_can_be_kept_until_it_expires(world, monkeypatch):
    monkeypatch.setattr("services.gateway.asynchronous.MOST_OPERATIONS", 1)
    await world.deployed(0.0)
    first = (await accepted(world)).headers["location"]
    await ended(world, first)
    refused = await world.http.post("/v1/models/cancer:predict", json=ROWS, headers=ASYNC)
    assert (refused.status_code, "kept" in refused.json()["error"]) == (429, True)
    assert (await world.http.get(first)).json()["status"] == "completed"


def test_what_expires_first_makes_room_first(monkeypatch):
    monkeypatch.setattr("services.gateway.asynchronous.MOST_OPERATIONS", 2)
    now = [NOW]
    operations = Operations(lambda: now[0])
    for name, hours in (("long", 48), ("short", 1)):
        about = {"operation_id": name, "endpoint_name": "cancer", "principal": "local", "path": "/", "accepted_at": NOW}
        kept = PredictionAccepted(**about, body=Content(base64="", size_bytes=0), expires_at=NOW + timedelta(hours=hours))
        operations.apply(cloudevents.write(cloudevents.new_event(kept, "/test", now=NOW)))
    assert operations.is_full
    now[0] = NOW + timedelta(hours=2)
    assert not operations.is_full
    assert (operations.get("long") is None, operations.get("short") is None) == (False, True)


async def test_answers_that_are_kept_have_a_bound(world, monkeypatch):
    monkeypatch.setattr("services.gateway.asynchronous.MOST_KEPT_BYTES", 1)
    await world.deployed(0.0)
    await ended(world, (await accepted(world)).headers["location"])
    refused = await world.http.post("/v1/models/cancer:predict", json=ROWS, headers=ASYNC)
    assert refused.status_code == 429


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
    monkeypatch.setattr("services.gateway.asynchronous._FIRST_PAUSE_S", 0.01)
