"""How many small events a second each runner handles and answers, and how much of a core an idle one takes.

``python -m benchmarks.messaging`` starts its own Kafka in a temporary home. A handled event is parsed, given to a handler that leads to one
fact, the fact is published and acknowledged, and the offset committed. Idle is a started runner that is given nothing.
"""

import argparse
import asyncio
import time
import uuid

from benchmarks.brokers import kafka
from benchmarks.tables import show
from libs.messaging import cloudevents
from libs.messaging.admin import create_topics
from libs.messaging.cloudevents import Event, utc_now
from libs.messaging.consumer import ConsumerRunner, TransactionalRunner
from libs.messaging.faust_app import FaustRunner
from libs.messaging.kafka import KafkaBroker
from libs.messaging.processing import Processor
from libs.settings import KafkaSettings
from schemas.base import Payload
from schemas.registry import CreateEndpoint, EndpointCreated
from schemas.topics import TOPICS, Topic

KINDS = ("consumer", "transactional", "faust")
IDLE_S = 5.0


async def nothing() -> None:
    return None


async def written(settings: KafkaSettings, events: int) -> str:
    """A topic with so many commands."""
    topic = f"benchmark-{uuid.uuid4().hex[:8]}"
    await create_topics(settings, [*TOPICS, Topic(topic, "any", (), (), ())])
    producer = KafkaBroker(settings).producer()
    await producer.start()
    commands = [CreateEndpoint(endpoint_name=f"endpoint-{number}") for number in range(events)]
    records = [cloudevents.write(cloudevents.new_event(command, "/benchmark", now=utc_now()), topic) for command in commands]
    for start in range(0, events, 1_000):
        await producer.send(records[start : start + 1_000])
    await producer.stop()
    return topic


async def measure(kind: str, settings: KafkaSettings, events: int) -> tuple[float, float, float]:
    """Events per second, seconds to start, percent of a core when idle."""
    topic, handled, done = await written(settings, events), 0, asyncio.Event()

    async def handle(event: Event[CreateEndpoint]) -> list[Payload]:
        nonlocal handled
        handled += 1
        if handled == events:
            done.set()
        return [EndpointCreated(endpoint_name=event.data.endpoint_name)]

    broker, processor = KafkaBroker(settings), Processor("benchmark", {CreateEndpoint: handle})
    runner = {
        "consumer": lambda: ConsumerRunner(broker, [topic], topic, processor),
        "transactional": lambda: TransactionalRunner(broker, [topic], topic, processor, nothing),
        "faust": lambda: FaustRunner(settings, broker, [topic], topic, processor),
    }[kind]()
    began = time.perf_counter()
    await runner.start()
    start_s = time.perf_counter() - began
    running = asyncio.create_task(runner.run())
    began = time.perf_counter()
    await asyncio.wait({running, asyncio.create_task(done.wait())}, return_when=asyncio.FIRST_COMPLETED)
    rate = handled / (time.perf_counter() - began)
    await asyncio.sleep(1.0)
    used = time.process_time()
    await asyncio.sleep(IDLE_S)
    idle_percent = 100 * (time.process_time() - used) / IDLE_S
    await runner.stop()
    await running
    return rate, start_s, idle_percent


def main(arguments: list[str] | None = None) -> None:
    """Start a broker and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    events = parser.parse_args(arguments).events
    with kafka() as servers:
        settings = KafkaSettings(bootstrap_servers=servers)
        results = [(kind, *asyncio.run(measure(kind, settings, events))) for kind in KINDS]
    show(
        f"Runners on real Kafka: {events} small events, each leading to one",
        ("runner", "events/s", "start s", "idle CPU %"),
        [(kind, f"{rate:,.0f}", f"{start_s:.2f}", f"{idle:.1f}") for kind, rate, start_s, idle in results],
    )


if __name__ == "__main__":
    main()
