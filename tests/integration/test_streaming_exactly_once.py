"""Streaming inference on real Kafka: whatever happens to processes and broker, a ``read_committed`` reader finds one result per request."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from libs.messaging import cloudevents
from libs.messaging.admin import create_topics
from libs.messaging.kafka import KafkaBroker
from libs.messaging.records import Record
from libs.settings import KafkaSettings
from schemas.base import Payload
from schemas.environment import EnvironmentLock
from schemas.inference import Datatype, Signature, TensorSpec
from schemas.registry import (
    Artifact,
    ArtifactFormat,
    DeploymentSnapshot,
    DeploymentStatus,
    EndpointCreated,
    EndpointDeleted,
    EndpointSnapshot,
)
from schemas.topics import DLQ, STATE_ENDPOINTS, TOPICS, inference_requests, inference_results
from tests.conftest import KafkaServer
from tests.unit.runners import KEY, FakeRunner

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PATIENCE_S = 120.0
SESSION_S = 6.0
TOPICS_KEPT_S = 4.0
MIXED_RECORDS = int(os.environ.get("STREAMING_TEST_RECORDS", "2000"))
"""Of which one in a hundred is bad; 100 000 by hand."""

QUIET_AFTER_FAULT_S = 25.0
"""A transaction that nobody ends is aborted by the broker after 10 to 20 s, and hides from readers what came after it until then."""


class Results:
    """Reads a results topic as ``read_committed`` readers do, from its beginning; counts by what ``identify`` makes of a record."""

    def __init__(self, servers: str, topic: str, identify: Callable[[Any], str]) -> None:
        self.counts: Counter[str] = Counter()
        self._identify = identify
        self._consumer = Consumer(
            {"bootstrap.servers": servers, "group.id": uuid.uuid4().hex, "isolation.level": "read_committed", "log_level": 0}
        )
        self._consumer.assign([TopicPartition(topic, partition, 0) for partition in range(4)])

    async def until(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Return once so many different ones are there."""
        end = time.monotonic() + timeout_s
        while len(self.counts) < count:
            assert time.monotonic() < end, f"{len(self.counts)} of {count} results after {timeout_s:.0f} s"
            await self.read()

    async def read(self, timeout_s: float = 0.2) -> int:
        messages = await asyncio.to_thread(self._consumer.consume, 2_000, timeout_s)
        found = [self._identify(message) for message in messages if message.error() is None]
        self.counts.update(found)
        return len(found)

    async def rest(self, quiet_s: float = 5.0) -> None:
        """Read on until nothing has come for a while."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < quiet_s:
            if await self.read():
                quiet_since = time.monotonic()
        self._consumer.close()

    @property
    def duplicates(self) -> int:
        return sum(count - 1 for count in self.counts.values())


def value_of(message: Any) -> str:
    return str(message.value(), "ascii")


def request_of(message: Any) -> str:
    body = orjson.loads(message.value())
    assert body["status"] == "completed", body
    assert body["predictions"] == [float(body["request_id"])]
    return str(body["request_id"])


@dataclass
class Copier:
    """A ``stopping_stream`` and what it said."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def committed(self) -> int:
        return sum(int(line.split()[1]) for line in self.lines if line.startswith("committed"))


@contextmanager
def copier(server: KafkaServer, endpoint_name: str, instance: str, point: str = "nowhere") -> Iterator[Copier]:
    command = [sys.executable, "-m", "tests.integration.stopping_stream", server.settings.bootstrap_servers, endpoint_name, instance, point]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    started = Copier(process)

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            started.lines.append(line.strip())

    listening = threading.Thread(target=listen)
    listening.start()
    try:
        yield started
    finally:
        process.kill()
        listening.join()
        with process:
            process.wait()


async def until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {timeout_s:.0f} s"
        await asyncio.sleep(0.05)


def publish(servers: str, topic: str, numbers: range, **headers: bytes) -> None:
    settings = {"enable.idempotence": True, "linger.ms": 5, "queue.buffering.max.messages": 1_000_000, "log_level": 0}
    producer = Producer({"bootstrap.servers": servers, **settings})
    for number in numbers:
        name = b"%d" % number
        body = name if headers else b'{"instances": [[%d, 0]]}' % number
        producer.produce(topic, body, name, headers=[("ce_id", name), ("ce_source", b"/test"), *headers.items()])
    assert producer.flush(60) == 0


@pytest.mark.parametrize("point", ["before-offsets", "before-commit"])
async def test_a_process_that_was_stopped_within_a_transaction_cannot_write_what_another_one_has_taken_over(kafka_server, point):
    endpoint_name, servers, count = f"e{uuid.uuid4().hex[:8]}", kafka_server.settings.bootstrap_servers, 1_000
    requests, results = inference_requests(endpoint_name), inference_results(endpoint_name)
    await create_topics(kafka_server.settings, [requests, results])
    publish(servers, requests.name, range(count), plain=b"1")
    found = Results(servers, results.name, value_of)
    with copier(kafka_server, endpoint_name, "a", point) as stopped:
        await until(lambda: "stopping" in stopped.lines, "the first stops in its transaction")
        with copier(kafka_server, endpoint_name, "b") as other:
            await until(lambda: other.committed + stopped.committed == count, "the second takes over")
            os.kill(stopped.process.pid, signal.SIGCONT)
            await until(lambda: any(line.startswith(("lost", "left")) for line in stopped.lines), "the first notices")
            await found.until(count)
            await found.rest()
    assert (len(found.counts), found.duplicates) == (count, 0)
    assert stopped.committed + other.committed == count


@dataclass
class Stage:
    """An endpoint with a deployment that a runner in this process answers for, and streaming processes."""

    home: Path
    settings: KafkaSettings
    endpoint_name: str
    runner: FakeRunner
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def requests(self) -> str:
        return inference_requests(self.endpoint_name).name

    def results(self) -> Results:
        return Results(self.settings.bootstrap_servers, inference_results(self.endpoint_name).name, request_of)

    def start(self, instance: str) -> None:
        """Start (again) the streaming process of this name."""
        variables = {
            "KAFKA_BOOTSTRAP_SERVERS": self.settings.bootstrap_servers,
            "KAFKA_GROUP_INSTANCE": instance,
            "KAFKA_SESSION_TIMEOUT_MS": str(int(SESSION_S * 1000)),
            "RUNNER_KEY_FILE": str(self.home / "runner.key"),
            "ARTIFACTS_URL": (self.home / "artifacts").as_uri(),
            "MILLRACE_HOME": str(self.home),
            "METRICS_PORT": "0",
            "STREAMING_TOPICS_KEPT_S": str(TOPICS_KEPT_S),
            "LOG_FORMAT": "text",
        }
        with (self.home / f"{instance}.log").open("ab") as log:
            self.processes[instance] = subprocess.Popen(
                [sys.executable, "-m", "services.streaming"], env={**os.environ, **variables}, stdout=log, stderr=log
            )
        self.started.append(self.processes[instance])

    def log(self, instance: str) -> str:
        path = self.home / f"{instance}.log"
        return path.read_text() if path.exists() else ""

    def send(self, instance: str, number: signal.Signals) -> None:
        os.kill(self.processes[instance].pid, number)

    async def reads(self, instance: str, times: int = 1) -> None:
        """Return once the process has been given partitions so many times."""
        await until(lambda: self.log(instance).count(f"reads partitions [0, 1, 2, 3] of {self.requests}") >= times, "it reads")

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


@asynccontextmanager
async def stage(server: KafkaServer, directory: Path) -> AsyncIterator[Stage]:
    name = f"e{uuid.uuid4().hex[:8]}"
    (directory / "runner.key").write_bytes(KEY)
    runner = FakeRunner("r0", directory / "r0.sock")
    await runner.start()
    await create_topics(server.settings, [*TOPICS, inference_requests(name), inference_results(name)])
    made = Stage(directory, server.settings, name, runner)
    await say_deployed(server.settings, name, runner)
    try:
        yield made
    finally:
        made.close()
        await runner.stop()


async def say_deployed(settings: KafkaSettings, endpoint_name: str, runner: FakeRunner) -> None:
    now = datetime.now(UTC)
    deployment_id = f"{endpoint_name}.m.1"
    times = {"created_at": now, "updated_at": now}
    specs = [TensorSpec(name=name, datatype=Datatype.FP64, shape=shape) for name, shape in (("input", (-1, 2)), ("predict", (-1,)))]
    deployment = DeploymentSnapshot(
        deployment_id=deployment_id,
        generation=1,
        endpoint_name=endpoint_name,
        model_name="m",
        version=1,
        status=DeploymentStatus.READY,
        artifact=Artifact(sha256="0" * 64, size_bytes=1, filename="m.joblib"),
        format=ArtifactFormat.SKLEARN,
        environment=EnvironmentLock(environment_id="0" * 16, python="3.11", platform="any", lock=""),
        signature=Signature(inputs=(specs[0],), outputs=(specs[1],)),
        min_replicas=1,
        max_replicas=1,
        replicas=(runner.replica,),
        **times,
    )
    endpoint = EndpointSnapshot(endpoint_name=endpoint_name, traffic={deployment_id: 100}, deployment_ids=(deployment_id,), **times)
    await say(settings, endpoint, deployment, EndpointCreated(endpoint_name=endpoint_name))


async def say(settings: KafkaSettings, *payloads: Payload | Record) -> None:
    now = datetime.now(UTC)
    records = [each if isinstance(each, Record) else cloudevents.write(cloudevents.new_event(each, "/test", now=now)) for each in payloads]
    producer = KafkaBroker(settings).producer()
    await producer.start()
    await producer.send(records)
    await producer.stop()


@asynccontextmanager
async def load(place: Stage, count: int, duration_s: float) -> AsyncIterator[None]:
    """Publish requests evenly over some time, beside what the block does."""

    def work() -> None:
        for part in range(20):
            publish(place.settings.bootstrap_servers, place.requests, range(part * count // 20, (part + 1) * count // 20))
            time.sleep(duration_s / 20)

    working = asyncio.create_task(asyncio.to_thread(work))
    try:
        yield
    finally:
        await working


async def test_processes_that_are_killed_stopped_and_started_again_answer_each_request_once(kafka_server, tmp_path):
    count = 20_000
    async with stage(kafka_server, tmp_path) as place:
        place.start("a")
        found = place.results()
        await place.reads("a")
        async with load(place, count, duration_s=10):
            await found.until(count // 20)
            place.start("b")
            await until(lambda: "reads partitions" in place.log("b"), "the second has its share")
            place.send("a", signal.SIGKILL)
            place.start("a")
            await found.until(count // 4)
            place.send("b", signal.SIGSTOP)
            await place.reads("a", times=2)
            place.send("b", signal.SIGCONT)
            await found.until(count // 2)
            place.send("a", signal.SIGTERM)
            await asyncio.to_thread(place.processes["a"].wait, PATIENCE_S)
        await found.until(count)
        await found.rest()
    assert (len(found.counts), found.duplicates) == (count, 0)


async def test_a_broker_that_restarts_in_the_middle_costs_nothing_and_doubles_nothing(tmp_path):
    count = 10_000
    server = KafkaServer(tmp_path / "kafka")
    server.home.mkdir()
    server.start()
    try:
        async with stage(server, tmp_path) as place:
            place.start("a")
            found = place.results()
            await place.reads("a")
            await asyncio.to_thread(publish, place.settings.bootstrap_servers, place.requests, range(count))
            await found.until(count // 20)
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            await asyncio.to_thread(server.start)
            await found.until(count)
            await found.rest(QUIET_AFTER_FAULT_S)
    finally:
        server.stop()
    assert (len(found.counts), found.duplicates) == (count, 0)


async def test_a_second_process_of_the_same_name_ends_the_first(kafka_server, tmp_path):
    async with stage(kafka_server, tmp_path) as place:
        place.start("a")
        await place.reads("a")
        first = place.processes["a"]
        place.start("a")
        assert await asyncio.to_thread(first.wait, 60) == 1
        publish(place.settings.bootstrap_servers, place.requests, range(100))
        found = place.results()
        await found.until(100)
        await found.rest()
    assert "another process with KAFKA_GROUP_INSTANCE=a has taken over" in place.log("a")
    assert found.duplicates == 0


async def test_records_of_one_key_are_answered_in_their_order(kafka_server, tmp_path):
    async with stage(kafka_server, tmp_path) as place:
        servers = place.settings.bootstrap_servers
        producer = Producer({"bootstrap.servers": servers, "log_level": 0})
        for number in range(3_000):
            body = b'{"instances": [[%d, 0]]}' % number
            producer.produce(place.requests, body, b"key-%d" % (number % 7), headers=[("ce_id", b"%d" % number), ("ce_source", b"/t")])
        producer.flush(30)
        place.start("a")
        order: list[tuple[bytes, int]] = []

        def identify(message: Any) -> str:
            order.append((message.key(), int(request_of(message))))
            return request_of(message)

        found = Results(servers, inference_results(place.endpoint_name).name, identify)
        await found.until(3_000)
        await found.rest()
    for key in range(7):
        numbers = [number for name, number in order if name == b"key-%d" % key]
        assert numbers == list(range(key, 3_000, 7))


BAD: tuple[bytes | None, ...] = (b'{"instances": [[1]]}', b"{", b"", None, b'{"instances": [["a", 1]]}')


def publish_mixed(servers: str, topic: str, count: int) -> set[str]:
    """Publish requests of which one in a hundred cannot be answered; the ids of those."""
    producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, "linger.ms": 5, "log_level": 0})
    bad = set()
    for number in range(count):
        body: bytes | None = b'{"instances": [[%d, 0]]}' % number
        if number % 100 == 50:
            body = BAD[number // 100 % len(BAD)]
            bad.add(str(number))
        while True:
            try:
                producer.produce(topic, body, b"%d" % number, headers=[("ce_id", b"%d" % number), ("ce_source", b"/test"), ("none", None)])
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0
    return bad


async def test_bad_records_among_good_ones_stop_nobody(kafka_server, tmp_path):
    async with stage(kafka_server, tmp_path) as place:
        servers = place.settings.bootstrap_servers
        place.start("a")
        await place.reads("a")
        began = time.monotonic()
        bad = await asyncio.to_thread(publish_mixed, servers, place.requests, MIXED_RECORDS)
        wrong: list[bytes] = []

        def result(message: Any) -> str:
            body = orjson.loads(message.value())
            identity = str(dict(message.headers())["ce_causationid"], "ascii")
            if (body["status"] == "failed") != (identity in bad) or (identity not in bad and body["predictions"] != [float(identity)]):
                wrong.append(message.value())
            return identity

        def letter(message: Any) -> str:
            read = cloudevents.read(Record(DLQ.name, message.key(), message.value(), tuple(message.headers())))
            return str(read.data.event_id) if getattr(read.data, "origin_topic", "") == place.requests else ""

        found = Results(servers, inference_results(place.endpoint_name).name, result)
        await found.until(MIXED_RECORDS, timeout_s=PATIENCE_S)
        took_s = time.monotonic() - began
        letters = Results(servers, DLQ.name, letter)
        await letters.until(len(bad), timeout_s=PATIENCE_S)
        await found.rest()
        await letters.rest()
        assert place.processes["a"].poll() is None
        log = place.log("a")
    letters.counts.pop("", None)
    print(f"{MIXED_RECORDS} records, {len(bad)} of them bad: {took_s:.1f} s, {MIXED_RECORDS / took_s:.0f} records/s")
    assert wrong == []
    assert (len(found.counts), found.duplicates) == (MIXED_RECORDS, 0)
    assert (set(letters.counts), letters.duplicates) == (bad, 0)
    assert "begins anew" not in log


async def test_topics_of_a_deleted_endpoint_go_and_stay_away_until_it_is_created_again(kafka_server, tmp_path):
    async with stage(kafka_server, tmp_path) as place:
        servers, name = place.settings.bootstrap_servers, place.endpoint_name
        topics = {place.requests, inference_results(name).name}
        admin = AdminClient({"bootstrap.servers": servers})

        def existing() -> set[str]:
            return topics & admin.list_topics(timeout=10).topics.keys()

        async def delete(**how: bool) -> None:
            await say(place.settings, cloudevents.tombstone(STATE_ENDPOINTS.name, name), EndpointDeleted(endpoint_name=name, **how))

        async def answers() -> None:
            publish(servers, place.requests, range(100))
            found = place.results()
            await found.until(100)
            await found.rest(2)
            assert found.duplicates == 0

        place.start("a")
        await place.reads("a")
        await answers()
        await delete(keep_topics=True)
        await asyncio.sleep(2 * TOPICS_KEPT_S)
        assert existing() == topics
        await say_deployed(place.settings, name, place.runner)
        await place.reads("a", times=2)
        await delete()
        place.send("a", signal.SIGKILL)
        place.start("a")
        began = time.monotonic()
        await until(lambda: not existing(), "the topics are gone")
        print(f"gone {time.monotonic() - began:.1f} s after a restart")
        await asyncio.sleep(5)
        assert existing() == set()
        await say_deployed(place.settings, name, place.runner)
        await place.reads("a", times=3)
        await answers()
        assert place.processes["a"].poll() is None
