"""What is done about a cluster that does not answer; Ray itself is in the integration tests."""

import asyncio
import threading
import time

import pytest

from services.serving.errors import ClusterUnavailableError


@pytest.fixture
def adapters():
    return pytest.importorskip("services.serving.adapters")


@pytest.fixture
async def listener():
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    yield server
    server.close()


def address_of(listener) -> str:
    return f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def test_a_call_is_given_up_when_nothing_listens_any_more(adapters, listener, monkeypatch):
    monkeypatch.setattr(adapters, "_LOOK_S", 0.05)
    cluster, over = adapters.RayServe(address_of(listener), object), threading.Event()
    calling = asyncio.create_task(cluster._call(over.wait))
    await asyncio.sleep(0.2)
    assert not calling.done()
    listener.close()
    await listener.wait_closed()
    began = time.monotonic()
    with pytest.raises(ClusterUnavailableError, match="nothing listens on"):
        await calling
    assert time.monotonic() - began < 1
    over.set()


async def test_what_a_call_answers_and_raises_comes_through(adapters, listener):
    cluster = adapters.RayServe(address_of(listener), object)
    assert await cluster._call(int, "7") == 7
    with pytest.raises(ClusterUnavailableError, match="Ray does not answer: no"):
        await cluster._call(raises, RuntimeError("no"))
    with pytest.raises(KeyError):
        await cluster._call(raises, KeyError("bug"))


def raises(error: Exception) -> None:
    raise error


async def test_a_cluster_that_is_not_there_is_not_waited_for(adapters, listener):
    cluster = adapters.RayServe(address_of(listener), object)
    listener.close()
    await listener.wait_closed()
    with pytest.raises(ClusterUnavailableError, match="nothing listens on"):
        await cluster.start()
    await cluster.stop()


async def test_the_address_is_read_anew_whenever_a_connection_is_tried(adapters, tmp_path):
    file = tmp_path / "ray.json"
    cluster = adapters.RayServe("", object, address_file=file)
    with pytest.raises(ClusterUnavailableError, match="has not come up yet"):
        await cluster.start()
    file.write_text('{"address": "127.0.0.1:1"}')
    with pytest.raises(ClusterUnavailableError, match="nothing listens on 127.0.0.1:1"):
        await cluster.start()
