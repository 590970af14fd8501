"""How long the registry takes to rebuild its state from a log of 10 000 lifecycle events.

Run against a real broker: ``python -m benchmarks.registry_rebuild`` starts its own Kafka in a temporary home. The log is written by the
registry's own rules: models are registered, inspected, built and validated.
"""

import argparse
import asyncio
import statistics
import time
from datetime import UTC, datetime

from benchmarks.brokers import kafka
from benchmarks.tables import show
from libs.messaging import cloudevents
from libs.messaging.admin import create_topics
from libs.messaging.broker import Broker
from libs.messaging.kafka import KafkaBroker
from libs.messaging.records import Record
from libs.settings import KafkaSettings
from schemas.base import Payload
from schemas.environment import EnvironmentLock, VersionBuilt
from schemas.inference import Datatype, Signature, TensorSpec
from schemas.registry import Artifact, RegisterVersion, VersionSpec
from schemas.topics import COMMANDS, TOPICS
from schemas.validation import Measurements, VersionInspected, VersionValidated
from services.registry.handlers import HandledCommands, Handlers
from services.registry.restore import restore
from services.registry.state import State

EVENTS_PER_VERSION = 4
LOCK = EnvironmentLock(environment_id="0" * 32, python="3.11", platform="x86_64-linux", lock="numpy==2.0.0 --hash=sha256:00\n" * 60)
SIGNATURE = Signature(
    inputs=(TensorSpec(name="input", datatype=Datatype.FP64, shape=(-1, 30)),),
    outputs=(TensorSpec(name="predict", datatype=Datatype.INT64, shape=(-1,)),),
)


def story(number: int) -> list[Payload]:
    """What happens to one version of a model of its own."""
    name = f"model-{number}"
    spec = VersionSpec(artifact=Artifact(sha256=f"{number:064x}", size_bytes=1, filename="model.joblib"))
    measured = Measurements(load_s=1.0, peak_memory_bytes=1)
    return [
        RegisterVersion(model_name=name, spec=spec),
        VersionInspected(model_name=name, version=1, format="sklearn", requirements=("scikit-learn==1.9.1",), inferred=True),
        VersionBuilt(model_name=name, version=1, environment=LOCK, reused=True, resolve_s=0.1, install_s=0.1),
        VersionValidated(model_name=name, version=1, signature=SIGNATURE, measurements=measured),
    ]


async def write_log(broker: Broker, events: int) -> int:
    """Write what the registry would have written for ``events`` lifecycle events; returns the number of records."""
    table = Handlers(State(), HandledCommands()).table()
    now = datetime.now(UTC)
    records: list[Record] = []
    for number in range(events // EVENTS_PER_VERSION):
        for data in story(number):
            event = cloudevents.new_event(data, "/benchmark", now=now)
            if data.topic != COMMANDS.name:
                records.append(cloudevents.write(event))
            for result in await table[type(data)](event):
                caused = result if isinstance(result, Record) else cloudevents.write(cloudevents.caused_event(result, event, "/b", now=now))
                records.append(caused)
    producer = broker.producer()
    await producer.start()
    for start in range(0, len(records), 500):
        await producer.send(records[start : start + 500])
    await producer.stop()
    return len(records)


async def rebuild(broker: Broker) -> tuple[float, int]:
    """Seconds and versions of one rebuild."""
    state = State()
    started = time.perf_counter()
    await restore(broker, state, HandledCommands())
    return time.perf_counter() - started, len(state.versions)


async def measure(servers: str, events: int, runs: int) -> None:
    """Fill the log once, rebuild several times, print the table."""
    settings = KafkaSettings(bootstrap_servers=servers)
    await create_topics(settings, TOPICS)
    broker = KafkaBroker(settings)
    records = await write_log(broker, events)
    results = [await rebuild(broker) for _ in range(runs)]
    times = [seconds for seconds, _ in results]
    show(
        "Rebuild of the registry from the log (real Kafka)",
        ("lifecycle events", "records read", "versions", "runs", "median s", "min s", "max s", "to reach"),
        [(events, records, results[0][1], runs, f"{statistics.median(times):.2f}", f"{min(times):.2f}", f"{max(times):.2f}", "≤ 5 s")],
    )


def main(arguments: list[str] | None = None) -> None:
    """Start a broker and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    with kafka() as servers:
        asyncio.run(measure(servers, options.events, options.runs))


if __name__ == "__main__":
    main()
