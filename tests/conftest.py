"""Fixtures that several suites share."""

import itertools
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import pytest

from libs.local.embedded import MockCluster
from libs.local.kafka import install, prepare
from libs.local.settings import LocalSettings
from libs.messaging.admin import create_topics
from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.kafka import KafkaBroker
from libs.messaging.memory import MemoryBroker
from libs.settings import KafkaSettings
from schemas.topics import TOPICS, Topic

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return lambda: NOW


@pytest.fixture
def memory_broker() -> MemoryBroker:
    """A log that lives as long as the test."""
    return MemoryBroker()


class EmbeddedBroker:
    """librdkafka's broker in this process; ``close`` makes it go away."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{self.port}", embedded=True, request_timeout_ms=5_000)
        self._cluster: MockCluster | None = MockCluster(self.port, {})

    def create_topic(self, name: str, partitions: int = 1) -> None:
        assert self._cluster is not None
        self._cluster.create_topic(name, partitions)

    def close(self) -> None:
        if self._cluster is not None:
            cluster, self._cluster = self._cluster, None
            cluster.close()


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[EmbeddedBroker]:
    """One embedded broker for the whole run; tests keep apart by topic."""
    broker = EmbeddedBroker()
    for topic in TOPICS:
        broker.create_topic(topic.name)
    yield broker
    broker.close()


@dataclass
class KafkaServer:
    """A real Kafka in a directory of its own; it can be killed and started again with what it holds."""

    home: Path
    port: int = field(default_factory=lambda: free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> KafkaSettings:
        return KafkaSettings(bootstrap_servers=f"127.0.0.1:{self.port}", request_timeout_ms=10_000)

    def start(self) -> None:
        installation = install(LocalSettings().cache, print)
        with (self.home / "output.log").open("ab") as output:
            self.process = subprocess.Popen(prepare(installation, self.home, self.port, 256), stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while not _accepts(self.port):
            assert self.process.poll() is None, (self.home / "output.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "Kafka did not start within 60 s"
            time.sleep(0.1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A real Apache Kafka for the whole run."""
    server = KafkaServer(tmp_path_factory.mktemp("kafka"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Log(Protocol):
    """A broker under test, with what a test needs around the ports."""

    broker: Broker
    settings: KafkaSettings | None

    async def topics(self, count: int) -> Sequence[str]:
        """Names of new, empty topics of one partition each."""
        ...


class MemoryLog:
    """The log in memory."""

    settings = None

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self._numbers = itertools.count()

    async def topics(self, count: int) -> Sequence[str]:
        return [f"topic-{next(self._numbers)}" for _ in range(count)]


class EmbeddedLog:
    """librdkafka's broker behind aiokafka."""

    def __init__(self, embedded: EmbeddedBroker) -> None:
        self._embedded = embedded
        self.settings = embedded.settings
        self.broker = KafkaBroker(embedded.settings)

    async def topics(self, count: int) -> Sequence[str]:
        names = _new_names(count)
        for name in names:
            self._embedded.create_topic(name)
        return names


class KafkaLog:
    """Real Kafka behind aiokafka."""

    def __init__(self, server: KafkaServer) -> None:
        self.settings = server.settings
        self.broker = KafkaBroker(server.settings)

    async def topics(self, count: int) -> Sequence[str]:
        names = _new_names(count)
        await create_topics(self.settings, [*TOPICS, *(Topic(name, "any", (), (), ()) for name in names)])
        return names


@pytest.fixture(params=["memory", "embedded", pytest.param("kafka", marks=pytest.mark.integration)])
def log(request: pytest.FixtureRequest) -> Log:
    """Each implementation of the broker ports in turn."""
    return open_log(request.param, request)


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.integration)])
def wire_log(request: pytest.FixtureRequest) -> Log:
    """Each broker that speaks Kafka's protocol in turn."""
    return open_log(request.param, request)


def open_log(name: str, request: pytest.FixtureRequest) -> Log:
    """A log by its name: memory, embedded or kafka."""
    match name:
        case "memory":
            return MemoryLog()
        case "embedded":
            return EmbeddedLog(request.getfixturevalue("embedded_broker"))
        case _:
            return KafkaLog(request.getfixturevalue("kafka_server"))


def _new_names(count: int) -> list[str]:
    return [f"topic-{uuid.uuid4().hex[:12]}" for _ in range(count)]


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
