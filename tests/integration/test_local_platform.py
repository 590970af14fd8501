"""The platform on this machine with a real Kafka: it comes up, survives, and what it held is there again."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from libs.local import platform, processes
from libs.local.home import Home
from libs.local.settings import BrokerChoice, LocalSettings
from tests.conftest import free_port

pytestmark = pytest.mark.integration

UP = """
import sys
from libs.local import platform
from libs.local.settings import LocalSettings

settings = LocalSettings.model_validate_json(sys.argv[1])
plan = lambda *given: [part for part in platform.parts(*given) if part.name in sys.argv[2:]]
platform.up(settings, lambda said: None, lambda status: print("ready", flush=True), plan)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[LocalSettings]:
    settings = LocalSettings(home=tmp_path / "home", broker=BrokerChoice.KAFKA, kafka_port=free_port(), bootstrap_servers="")
    yield settings
    platform.down(settings)


def start(settings: LocalSettings, *parts: str) -> "subprocess.Popen[str]":
    """The broker and the topics of a platform, and further parts, ready."""
    command = [sys.executable, "-c", UP, settings.model_dump_json(), "broker", "topics", *parts]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == "ready\n"
    return process


async def produce(settings: LocalSettings, value: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=f"127.0.0.1:{settings.kafka_port}", enable_idempotence=True)
    await producer.start()
    await producer.send_and_wait("millrace.events", value)
    await producer.stop()


async def read(settings: LocalSettings, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer("millrace.events", bootstrap_servers=f"127.0.0.1:{settings.kafka_port}", auto_offset_reset="earliest")
    await consumer.start()
    values = [(await consumer.getone()).value for _ in range(count)]
    await consumer.stop()
    return values


async def test_what_was_published_survives_down_and_up(settings: LocalSettings) -> None:
    first = start(settings)
    await produce(settings, b"one")
    assert platform.down(settings).was_running
    assert first.poll() == 0, "the supervisor has ended when down returns"
    assert not processes.accepts(settings.kafka_port)
    second = start(settings)
    await produce(settings, b"two")
    assert await read(settings, 2) == [b"one", b"two"]
    platform.down(settings)
    assert second.wait(20) == 0


async def test_kafka_killed_by_kill_9_is_back_with_what_it_held(settings: LocalSettings) -> None:
    supervisor = start(settings)
    await produce(settings, b"one")
    broker = platform.status(settings).parts[0]
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (now := platform.status(settings)).parts[0].restarts == 0 or not now.is_ready:
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.1)
    assert await read(settings, 1) == [b"one"]
    platform.down(settings)
    assert supervisor.wait(20) == 0


async def test_up_again_after_a_killed_supervisor_says_so_and_keeps_everything(settings: LocalSettings) -> None:
    killed = start(settings)
    await produce(settings, b"one")
    killed.kill()
    killed.wait()
    said: list[object] = []
    platform.recover(Home.at(settings.home), said.append)
    assert any("was not stopped properly" in notice.text for notice in said if isinstance(notice, platform.Notice))
    second = start(settings)
    assert await read(settings, 1) == [b"one"]
    platform.down(settings)
    assert second.wait(20) == 0


def test_kafka_listens_on_loopback_only_and_stays_small(settings: LocalSettings) -> None:
    supervisor = start(settings)
    found = platform.status(settings)
    (broker,) = (part for part in found.parts if part.name == "broker")
    assert settings.kafka_port in broker.ports
    assert broker.memory_bytes < 400 * 2**20
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in processes.members(Home.at(settings.home).instance)
        for connection in process.net_connections(kind="tcp")
        if connection.status == "LISTEN"
    }
    assert addresses == {"127.0.0.1"}
    assert "secret" not in json.dumps(found.as_dict())
    platform.down(settings)
    assert supervisor.wait(20) == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_gateway_that_restarts_refuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, workers: int
) -> None:
    http_port, grpc_port = free_port(), free_port()
    for name, value in {"GATEWAY_HTTP_PORT": http_port, "GATEWAY_GRPC_PORT": grpc_port, "GATEWAY_WORKERS": workers}.items():
        monkeypatch.setenv(name, str(value))
    settings = LocalSettings(home=tmp_path / "home", broker=BrokerChoice.EMBEDDED, kafka_port=free_port(), bootstrap_servers="")
    supervisor = start(settings, "gateway")
    answered: list[str] = []
    longest_s = 0.0
    done = asyncio.Event()

    async def ask() -> None:
        nonlocal longest_s
        while not done.is_set():
            began = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", http_port)
                writer.write(b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                answered.append((await reader.read()).split(b"\r\n")[0].decode())
                writer.close()
            except OSError as error:
                answered.append(type(error).__name__)
            longest_s = max(longest_s, time.monotonic() - began)

    try:
        askers = [asyncio.create_task(ask()) for _ in range(8)]
        await asyncio.sleep(1.0)
        before = gateway_of(settings)
        assert before.pid is not None
        os.kill(before.pid, number)
        deadline = time.monotonic() + 60
        while (now := gateway_of(settings)).restarts == 0 or now.state != "ready":
            assert time.monotonic() < deadline, now
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)
        done.set()
        await asyncio.gather(*askers)
    finally:
        platform.down(settings)
    assert supervisor.wait(20) == 0
    others = [answer for answer in answered if answer != "HTTP/1.1 200 OK"]
    print(f"{number.name}, {workers} workers: {len(answered)} connections, {len(others)} broken, the longest took {longest_s:.1f} s")
    assert "ConnectionRefusedError" not in others
    assert len(others) <= (0 if number is signal.SIGTERM else 8), set(others)  # what a killed process held is lost


def gateway_of(settings: LocalSettings) -> platform.PartStatus:
    """The gateway as it is now."""
    (gateway,) = (part for part in platform.status(settings).parts if part.name == "gateway")
    return gateway
