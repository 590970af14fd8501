"""The gateway behind a real HTTP server on a free port."""

import asyncio
import json
import socket
from types import SimpleNamespace

import httpx
import pytest

from libs.errors import ConfigurationError
from services.gateway import handlers, memory, server
from services.gateway.health import Health
from services.gateway.memory import keep_freed_memory
from services.gateway.server import HttpServer, allow_open_files
from services.gateway.settings import HttpSettings
from tests.unit.gateway.conftest import make_world, running

NOTHING = SimpleNamespace(admit=None, handle=None)


@pytest.fixture
async def served(tmp_path):
    async with make_world(tmp_path) as world:
        yield world


async def raw(world, request: bytes) -> bytes:
    """What the server says to bytes as they are."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.gateway.server.port)
    writer.write(request)
    await writer.drain()
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_predictions_over_a_real_connection(served):
    await served.deployed(0.0)
    answers = await asyncio.gather(*(served.predict([[1, number]]) for number in range(50)))
    assert [answer.json()["predictions"] for answer in answers] == [[1.0 + number] for number in range(50)]
    assert served.http is not None


async def test_dots_in_a_path_are_a_name_and_not_a_way_up(served):
    answer = await raw(served, b"GET /api/v1/models/.. HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"1 to 63 letters, digits" in answer


@pytest.mark.parametrize(
    "path",
    ["/healthz", "/metrics", "/v2", "/api/v1/endpoints", "/openapi.json", "/docs", "/api/v1/events?follow=true", "/api/v1/models/none"],
)
async def test_head_is_answered_as_get_without_the_body(served, path):
    request = f"HEAD {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    head, end, body = (await raw(served, request.encode())).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404" if path.endswith("/none") else b"HTTP/1.1 200")
    assert b"content-type: " in head
    assert (end, body) == (b"\r\n\r\n", b"")


async def test_a_refused_upload_hears_why_although_it_is_still_sending(tmp_path, make, monkeypatch):
    monkeypatch.setenv("ARTIFACTS_MAX_BYTES", "100000")

    async def chunks():
        for _ in range(300):
            yield b"x" * 65_536

    async with make(tmp_path) as world:
        answer = await world.http.post("/api/v1/artifacts", content=chunks())
        assert (answer.status_code, answer.headers["connection"]) == (413, "close")
        answer = await world.http.post("/api/v1/artifacts", content=b"x" * 5_000_000)
        assert answer.status_code == 413
        assert "100000 bytes" in answer.json()["error"]
        assert world.store.contents == {}


async def test_a_client_that_goes_away_leaves_no_artifact(served):
    reader, writer = await asyncio.open_connection("127.0.0.1", served.gateway.server.port)
    writer.write(b"POST /api/v1/artifacts HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 1000)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert reader is not None
    assert (await served.http.get("/healthz")).status_code == 200
    assert served.store.contents == {}


async def read_events(response: httpx.Response, count: int) -> list[dict]:
    found = []
    async with asyncio.timeout(5):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
            if len(found) == count:
                break
    return found


async def test_events_stream_as_they_come_and_the_stream_ends_when_the_server_stops(tmp_path, make):
    async with make(tmp_path) as world:
        async with world.http.stream("GET", "/api/v1/events", params={"follow": "true", "entity": "e"}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            await world.http.post("/api/v1/endpoints", json={"name": "other"})
            await world.http.post("/api/v1/endpoints", json={"name": "e"})
            (event,) = await read_events(response, 1)
            assert event["data"]["endpoint_name"] == "e"
        later = await world.http.post("/api/v1/endpoints", json={"name": "e2"})
        stream = world.http.stream("GET", "/api/v1/events?follow=true", headers={"last-event-id": event["id"]})
        async with stream as response:
            (missed,) = await read_events(response, 1)
            assert missed["causationid"] == later.json()["operation_id"]
            stopping = asyncio.create_task(world.gateway.server.stop())
            async with asyncio.timeout(2):
                await stopping


async def test_a_quiet_stream_shows_that_it_lives(served, monkeypatch):
    monkeypatch.setattr(handlers, "HEARTBEAT_S", 0.01)
    async with served.http.stream("GET", "/api/v1/events?follow=true") as response:
        lines = response.aiter_lines()
        async with asyncio.timeout(5):
            while await anext(lines) != ": alive":
                pass


async def test_requests_in_flight_are_answered_before_the_server_stops(served):
    await served.deployed(0.0)
    going_on = asyncio.Event()
    runner = served.runners[0]
    answer_frame = runner._answer

    async def slowly(frame, writer):
        if frame.meta["op"] == "infer":
            going_on.set()
            await asyncio.sleep(0.1)
        return await answer_frame(frame, writer)

    runner._answer = slowly
    asked = asyncio.create_task(served.predict([[1, 2]]))
    await going_on.wait()
    await served.gateway.server.stop()
    assert (await asked).json() == {"predictions": [3.0]}
    with pytest.raises(httpx.ConnectError):
        await served.http.get("/healthz")


async def test_a_request_that_does_not_end_is_cut_off_after_the_drain_time(tmp_path, make):
    async with make(tmp_path, drain_timeout_s=1) as world:
        await world.deployed(0.0)
        going_on = asyncio.Event()

        def hang(_count):
            going_on.set()
            return "hang"

        world.runners[0].behave = hang
        asked = asyncio.create_task(world.predict([[1, 2]]))
        await going_on.wait()
        async with asyncio.timeout(3):
            await world.gateway.server.stop()
        with pytest.raises(httpx.HTTPError):
            (await asked).raise_for_status()


async def test_a_taken_port_is_one_clear_sentence():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        taken = HttpServer(NOTHING, Health(), "127.0.0.1", port, HttpSettings(), 1.0)
        with pytest.raises(ConfigurationError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use; set GATEWAY_HTTP_PORT"):
            await taken.start()
        await taken.stop()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        await HttpServer(NOTHING, Health(), "no such host", 0, HttpSettings(), 1.0).start()


async def test_not_ready_before_the_state_was_read(tmp_path, make):
    async with make(tmp_path) as world:
        world.gateway.server._health.caught_up = False
        assert (await world.http.get("/healthz")).status_code == 503
        assert (await world.http.get("/v2/health/ready")).status_code == 503
        assert (await world.http.get("/v2/health/live")).status_code == 200


async def test_a_missing_runner_key_refuses_to_start(tmp_path, make):
    async with make(tmp_path) as world:
        runners = world.gateway.dataplane
        (tmp_path / "runner.key").unlink()
        with pytest.raises(ConfigurationError, match=r"the runner key .* cannot be read"):
            async with running([runners]):
                pass


async def test_what_is_not_http_is_a_400_in_json(served):
    head, _, body = (await raw(served, b"NONSENSE\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"content-type: application/json" in head.split(b"\r\n")
    assert json.loads(body)["error"].startswith("the request is not valid HTTP")


async def test_several_servers_can_share_a_port():
    first = HttpServer(NOTHING, Health(), "127.0.0.1", 0, HttpSettings(), 1.0, reuse_port=True)
    await first.start()
    second = HttpServer(NOTHING, Health(), "127.0.0.1", first.port, HttpSettings(), 1.0, reuse_port=True)
    await second.start()
    assert first.port == second.port
    await second.stop()
    await first.stop()


async def test_a_client_that_vanished_is_noticed():
    accepted = []

    def accept(exchange):
        accepted.append(exchange._link._transport.get_extra_info("socket"))
        exchange.respond(200, [], b"")

    listening = HttpServer(SimpleNamespace(admit=accept, handle=None), Health(), "127.0.0.1", 0, HttpSettings(), 1.0)
    await listening.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    (connection,) = accepted
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert [
        connection.getsockopt(socket.IPPROTO_TCP, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    ] == [60, 15, 4]
    writer.close()
    await writer.wait_closed()
    await listening.stop()


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "warned"),
    [(1024, 4096, 2000, False), (1024, 1500, 1500, True), (1024, -1, 2000, False), (-1, -1, None, False)],
)
def test_as_many_files_may_be_open_as_connections_need(monkeypatch, caplog, soft, hard, allowed, warned):
    limits = []
    monkeypatch.setattr(server.resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(server.resource, "setrlimit", lambda _, pair: limits.append(pair))
    allow_open_files(2000)
    assert limits == ([] if allowed is None else [(allowed, hard)])
    assert ("below 988" in caplog.text) == warned


def test_a_c_library_without_the_switch_stays_as_it_is(monkeypatch):
    keep_freed_memory()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    keep_freed_memory()
