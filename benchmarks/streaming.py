"""Streaming inference: records a second, and what a record waits at low load, beside what a broker can do and beside MLServer.

    python -m benchmarks.streaming [--records 100000] [--rounds 3]

It starts its own Kafka in a temporary home. In each round, on topics of the same shape and with the four numbers of an iris flower in each
record: a bare consume–produce loop by aiokafka with transactions, which does nothing with what it reads; the streaming service with a real
runner in its cage, for each form of a body; and MLServer's Kafka transport (neither transactions nor offsets) with the same model. Load is
written by a client in C while the service under test reads; a record counts when a ``read_committed`` reader has its result. Low load is 50
records a second, one after the other; a record's wait is from before it is sent until its result was read.

To reach: a quarter of the bare loop; twenty times MLServer; half of the records at low load within 25 ms.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import joblib
import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from confluent_kafka import Consumer, Producer, TopicPartition
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from benchmarks.brokers import kafka
from benchmarks.peers.environments import InstallError, built
from benchmarks.peers.mlserver import MLServer
from benchmarks.tables import show
from libs.inference import v2_grpc
from libs.inference.requests import InferRequest
from libs.inference.supervisor import RunnerProcess, RunnerSpec
from libs.inference.tokens import runner_token
from libs.messaging import cloudevents
from libs.messaging.admin import create_topics
from libs.messaging.kafka import KafkaBroker
from libs.runner.cage import CageSpec, platform_layers
from libs.settings import KafkaSettings
from schemas.environment import EnvironmentLock
from schemas.inference import Signature
from schemas.registry import Artifact, ArtifactFormat, DeploymentSnapshot, DeploymentStatus, EndpointSnapshot, Replica
from schemas.topics import TOPICS, Topic, inference_requests, inference_results

KEY = b"the key of the benchmark"
PARTITIONS = 4
LOW_LOAD_RECORDS = 200
LOW_LOAD_INTERVAL_S = 0.02
WAIT_S = 120.0
EVENT = [("ce_specversion", b"1.0"), ("ce_source", b"/benchmark"), ("ce_type", b"inference.request")]


@dataclass(frozen=True)
class Form:
    """How rows are written into records."""

    name: str
    content_type: bytes
    body: bytes


@dataclass(frozen=True)
class Result:
    """One measurement; NaN where it was not made."""

    records_per_s: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Model:
    """A model's file, and a row to ask about."""

    path: Path
    row: np.ndarray


def train(folder: Path) -> Model:
    """Train a model that costs tens of microseconds."""
    rows, labels = load_iris(return_X_y=True)
    joblib.dump(LogisticRegression(max_iter=1_000).fit(rows, labels), folder / "iris.joblib")
    return Model(folder / "iris.joblib", rows[:1])


def forms(model: Model) -> list[Form]:
    """The same row in each form."""
    row = model.row
    tensor = {"name": "input", "datatype": "FP64", "shape": [1, 4], "data": row.ravel().tolist()}
    asked = InferRequest({"input": row}, ("predict",), binary_data_output=True)
    return [
        Form("V1 JSON", b"application/json", orjson.dumps({"instances": row.tolist()})),
        Form("V2 JSON", b"application/json", orjson.dumps({"inputs": [tensor], "outputs": [{"name": "predict"}]})),
        Form("V2 protobuf", v2_grpc.CONTENT_TYPE.encode(), v2_grpc.write_request(asked, "iris")),
    ]


class Reader:
    """Reads a results topic as fast as it can, from where it ends now."""

    def __init__(self, servers: str, topic: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": uuid.uuid4().hex,
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )
        places = [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
        self._consumer.assign(
            [TopicPartition(topic, place.partition, self._consumer.get_watermark_offsets(place, 10)[1]) for place in places]
        )

    def read(self, count: int, timeout_s: float = WAIT_S) -> None:
        """Return when so many have come."""
        end = time.monotonic() + timeout_s
        while count > 0:
            count -= len(self._consumer.consume(min(count, 1_000), 0.1))
            if time.monotonic() > end:
                raise SystemExit(f"{count} results did not come within {timeout_s:.0f} s")

    def one(self, timeout_s: float = WAIT_S) -> None:
        """Return when one has come."""
        if self._consumer.poll(timeout_s) is None:
            raise SystemExit(f"a result did not come within {timeout_s:.0f} s")

    def close(self) -> None:
        self._consumer.close()


def load(servers: str, topics: tuple[str, str], form: Form, records: int, headers: Sequence[tuple[str, bytes]] = ()) -> float:
    """Records a second, from before the first is sent until the result of the last was read."""
    producer = Producer({"bootstrap.servers": servers, "linger.ms": 5, "queue.buffering.max.messages": 1_000_000, "log_level": 0})
    head = [("content-type", form.content_type), *EVENT, *headers]
    reader = Reader(servers, topics[1])
    began = time.perf_counter()
    for number in range(records):
        name = b"r-%d" % number
        producer.produce(topics[0], form.body, name, headers=[*head, ("ce_id", name)])
    reader.read(records)
    took_s = time.perf_counter() - began
    reader.close()
    return records / took_s


def waits(servers: str, topics: tuple[str, str], form: Form, headers: Sequence[tuple[str, bytes]] = ()) -> tuple[float, float]:
    """Milliseconds that half, and 99 of 100, of the records at low load wait at most."""
    producer = Producer({"bootstrap.servers": servers, "linger.ms": 0, "log_level": 0})
    head = [("content-type", form.content_type), *EVENT, *headers]
    reader = Reader(servers, topics[1])
    taken = []
    for number in range(LOW_LOAD_RECORDS):
        began = time.perf_counter()
        name = b"s-%d" % number
        producer.produce(topics[0], form.body, name, headers=[*head, ("ce_id", name)])
        producer.poll(0)
        reader.one()
        taken.append((time.perf_counter() - began) * 1_000)
        time.sleep(max(0.0, LOW_LOAD_INTERVAL_S - taken[-1] / 1_000))
    reader.close()
    taken.sort()
    return statistics.median(taken), taken[int(len(taken) * 0.99)]


def topics_of(settings: KafkaSettings, name: str) -> tuple[str, str]:
    """Two new topics."""
    names = (f"{name}-{uuid.uuid4().hex[:8]}.requests", f"{name}-{uuid.uuid4().hex[:8]}.results")
    asyncio.run(create_topics(settings, [Topic(each, "key", (), (), (), PARTITIONS) for each in names]))
    return names


async def pass_through(servers: str, topics: tuple[str, str], max_records: int) -> None:
    """Consume, produce, commit both in a transaction; nothing else. Runs until it is ended."""
    group = uuid.uuid4().hex
    options = {"bootstrap_servers": servers}
    consumer = AIOKafkaConsumer(
        topics[0], **options, group_id=group, enable_auto_commit=False, auto_offset_reset="earliest", isolation_level="read_committed"
    )
    producer = AIOKafkaProducer(**options, transactional_id=group)
    await producer.start()
    await consumer.start()
    print("ready", flush=True)
    while True:
        batches = await consumer.getmany(timeout_ms=500, max_records=max_records)
        if not batches:
            continue
        async with producer.transaction():
            for messages in batches.values():
                for message in messages:
                    await producer.send(topics[1], message.value, message.key, headers=list(message.headers))
            offsets = {place: messages[-1].offset + 1 for place, messages in batches.items()}
            await producer.send_offsets_to_transaction(offsets, group)


@contextmanager
def process(command: Sequence[str], log: Path, is_ready: Callable[[str], bool], **variables: str) -> Iterator[None]:
    """A process that has said that it is ready, until the block ends."""
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **variables}, start_new_session=True)
    try:
        end = time.monotonic() + WAIT_S
        while not is_ready(log.read_text(errors="replace")):
            if started.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2_000:]}")
            time.sleep(0.05)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


@asynccontextmanager
async def runner(model: Model, folder: Path) -> AsyncIterator[RunnerProcess]:
    """A real runner in its cage."""
    (folder / "scratch").mkdir(parents=True)
    started = await RunnerProcess.start(
        RunnerSpec(
            python=Path(sys.executable),
            artifact=model.path,
            format="sklearn",
            runner_id="benchmark",
            token=runner_token(KEY, "benchmark"),
            address=f"unix:{folder}/s",
            scratch=folder / "scratch",
            log=folder / "runner.log",
            cage=CageSpec(layers=platform_layers()),
        )
    )
    try:
        yield started
    finally:
        await started.stop()


async def say_deployed(settings: KafkaSettings, signature: Signature, address: str) -> None:
    """What the registry would have said of a deployment that answers."""
    now = datetime.now(UTC)
    deployment = DeploymentSnapshot(
        deployment_id="iris.iris.1",
        generation=1,
        endpoint_name="iris",
        model_name="iris",
        version=1,
        status=DeploymentStatus.READY,
        artifact=Artifact(sha256="0" * 64, size_bytes=1, filename="iris.joblib"),
        format=ArtifactFormat.SKLEARN,
        environment=EnvironmentLock(environment_id="0" * 16, python="3.11", platform="any", lock=""),
        signature=signature,
        min_replicas=1,
        max_replicas=1,
        replicas=(Replica(replica_id="benchmark", address=address),),
        created_at=now,
        updated_at=now,
    )
    endpoint = EndpointSnapshot(
        endpoint_name="iris",
        traffic={deployment.deployment_id: 100},
        deployment_ids=(deployment.deployment_id,),
        created_at=now,
        updated_at=now,
    )
    producer = KafkaBroker(settings).producer()
    await producer.start()
    await producer.send([cloudevents.write(cloudevents.new_event(snapshot, "/benchmark", now=now)) for snapshot in (endpoint, deployment)])
    await producer.stop()


class Bench:
    """What is measured in each round."""

    def __init__(self, servers: str, folder: Path, model: Model, records: int) -> None:
        self.servers = servers
        self.settings = KafkaSettings(bootstrap_servers=servers)
        self.folder = folder
        self.model = model
        self.records = records

    def bare(self) -> Result:
        """The best of two sizes of a batch: small ones make it look worse than it is."""
        rates = []
        for max_records in (500, 2_000):
            topics = topics_of(self.settings, "bare")
            command = [sys.executable, "-m", "benchmarks.streaming", "--bare", self.servers, *topics, str(max_records)]
            with process(command, self.folder / "bare.log", lambda said: "ready" in said):
                rates.append(load(self.servers, topics, forms(self.model)[0], self.records))
                p50_ms, p99_ms = waits(self.servers, topics, forms(self.model)[0])
        return Result(max(rates), p50_ms, p99_ms)

    def ours(self) -> dict[str, Result]:
        """Each form."""
        topics = (inference_requests("iris").name, inference_results("iris").name)
        key_file = self.folder / "runner.key"
        key_file.write_bytes(KEY)
        variables = {
            "KAFKA_BOOTSTRAP_SERVERS": self.servers,
            "RUNNER_KEY_FILE": str(key_file),
            "ARTIFACTS_URL": (self.folder / "artifacts").as_uri(),
            "LOG_FORMAT": "text",
            "MILLRACE_HOME": str(self.folder),
        }
        results = {}

        def is_ready(said: str) -> bool:
            return "reads partitions" in said

        with process([sys.executable, "-m", "services.streaming"], self.folder / "streaming.log", is_ready, **variables):
            for form in forms(self.model):
                load(self.servers, topics, form, 2_000)
                rate = load(self.servers, topics, form, self.records)
                results[form.name] = Result(rate, *waits(self.servers, topics, form))
        return results

    def mlserver(self, python: Path) -> Result:
        """MLServer, given fewer records: it takes all of them into memory at once."""
        topics = topics_of(self.settings, "mlserver")
        folder = self.folder / "mlserver"
        (folder / "iris").mkdir(parents=True, exist_ok=True)
        settings = {
            "host": "127.0.0.1",
            "http_port": 0,
            "grpc_port": 0,
            "metrics_endpoint": None,
            "parallel_workers": 0,
            "debug": False,
            "kafka_enabled": True,
            "kafka_servers": self.servers,
            "kafka_topic_input": topics[0],
            "kafka_topic_output": topics[1],
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        described = {"name": "iris", "implementation": "mlserver_sklearn.SKLearnModel", "parameters": {"uri": str(self.model.path)}}
        (folder / "iris" / "model-settings.json").write_text(json.dumps(described))
        command = [str(python.with_name("mlserver")), "start", str(folder)]
        form = forms(self.model)[1]
        headers = [("mlserver-model", b"iris")]
        with process(command, self.folder / "mlserver.log", lambda said: "Reading messages" in said):
            time.sleep(2)
            load(self.servers, topics, form, 200, headers)
            rate = load(self.servers, topics, form, min(self.records, 5_000), headers)
            return Result(rate, *waits(self.servers, topics, form, headers))


async def _measured(bench: Bench, rounds: int, mlserver: Path | None) -> dict[str, list[Result]]:
    results: dict[str, list[Result]] = {}
    async with runner(bench.model, bench.folder / "runner") as running:
        await create_topics(bench.settings, [*TOPICS, inference_requests("iris"), inference_results("iris")])
        assert running.ready is not None
        await say_deployed(bench.settings, running.ready.signature, running.address)
        for _ in range(rounds):
            results.setdefault("bare", []).append(await asyncio.to_thread(bench.bare))
            for name, result in (await asyncio.to_thread(bench.ours)).items():
                results.setdefault(name, []).append(result)
            if mlserver is not None:
                results.setdefault("mlserver", []).append(await asyncio.to_thread(bench.mlserver, mlserver))
    return results


def measure(records: int, rounds: int, with_peers: bool) -> None:
    """Measure and print the table."""
    mlserver = None
    if with_peers:
        try:
            mlserver = built(MLServer.environment)
        except InstallError as error:
            print(f"MLServer cannot be had: {error}")
    with kafka() as servers, tempfile.TemporaryDirectory(prefix="mr-stream-") as directory:
        folder = Path(directory)
        bench = Bench(servers, folder, train(folder), records)
        results = asyncio.run(_measured(bench, rounds, mlserver))
    _show(results, rounds)


def _show(results: dict[str, list[Result]], rounds: int) -> None:
    medians = {
        name: Result(*(statistics.median(getattr(result, field) for result in some) for field in ("records_per_s", "p50_ms", "p99_ms")))
        for name, some in results.items()
    }
    bare = medians["bare"].records_per_s
    peer = medians["mlserver"].records_per_s if "mlserver" in medians else float("nan")
    titles = {"bare": "bare aiokafka, transactions, no model", "mlserver": "MLServer 1.7, V2 JSON, at most once"}
    rows = [
        (
            titles.get(name, f"Millrace, {name}, exactly once"),
            f"{result.records_per_s:,.0f}",
            f"{100 * result.records_per_s / bare:.0f} %",
            f"{result.records_per_s / peer:.1f} ×",
            f"{result.p50_ms:.1f}",
            f"{result.p99_ms:.1f}",
        )
        for name, result in medians.items()
    ]
    show(
        f"Streaming inference (real Kafka, {PARTITIONS} partitions, one row a record, medians of {rounds})",
        ("what", "records/s", "of bare", "of MLServer", "p50 ms at low load", "p99 ms"),
        [*rows, ("to reach", "", "≥ 25 %", "≥ 20 ×", "≤ 25", "")],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="only the bare loop and ours")
    parser.add_argument("--bare", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.bare:
        servers, requests, results, max_records = options.bare
        asyncio.run(pass_through(servers, (requests, results), int(max_records)))
        return
    measure(options.records, options.rounds, not options.no_peers)


if __name__ == "__main__":
    main()
