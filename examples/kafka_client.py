"""Register, deploy and predict by events, with a plain Kafka client: no Millrace library, no management API.

    python examples/train_cancer.py /tmp/cancer
    python examples/kafka_client.py /tmp/cancer/cancer.joblib [ENDPOINT]

The model's file is the one thing that does not travel through Kafka: it is put into the artifact store over HTTP, and the command
refers to it by its digest. ``KAFKA_BOOTSTRAP_SERVERS`` and ``MILLRACE_URL`` say where.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from sklearn.datasets import load_breast_cancer

SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9092")
GATEWAY = os.environ.get("MILLRACE_URL", "http://127.0.0.1:8080")
MODEL = "cancer"
RECORDS = 100


def main(path: Path, endpoint: str) -> None:
    """The whole way: file → version → endpoint → predictions."""
    artifact = store(path)
    samples = load_breast_cancer().data[:RECORDS].tolist()
    producer = Producer({"bootstrap.servers": SERVERS, "enable.idempotence": True})

    spec = {"artifact": artifact, "example": {"instances": samples[:2]}}
    register = {"model_name": MODEL, "spec": spec}
    version = ask(producer, "millrace.registry.version.register.v1", MODEL, register, {"version.validated", "version.already_registered"})
    print(f"{MODEL}@{version['version']} can be deployed")

    ask(producer, "millrace.registry.endpoint.create.v1", endpoint, {"endpoint_name": endpoint}, {"endpoint.created"})
    deploy = {"endpoint_name": endpoint, "model_name": MODEL, "version": version["version"]}
    ask(producer, "millrace.registry.endpoint.deploy.v1", endpoint, deploy, {"deployment.requested"})
    wait_until_ready(endpoint)

    started = time.monotonic()
    results = dict(stream(producer, endpoint, samples))
    labels = [results[f"sample-{index}"]["predictions"][0] for index in range(RECORDS)]
    print(f"{len(results)} predictions in {time.monotonic() - started:.2f} s: {labels}")


def store(path: Path) -> dict:
    """Put a file into the artifact store."""
    with path.open("rb") as file:
        answer = httpx.post(f"{GATEWAY}/api/v1/artifacts", params={"filename": path.name}, content=file, timeout=60)
    if answer.is_error:
        sys.exit(answer.json()["error"])
    return answer.json()


def ask(producer: Producer, event_type: str, entity: str, data: dict, until: set[str]) -> dict:
    """Publish a command and watch its story on the events topic until a fact whose type is one of ``until`` tells of it."""
    command_id = str(uuid.uuid4())
    with_events = listen("millrace.events")
    headers = {
        "content-type": "application/json",
        "ce_specversion": "1.0",
        "ce_id": command_id,
        "ce_type": event_type,
        "ce_source": "/examples/kafka_client",
    }
    producer.produce("millrace.commands", key=entity, value=json.dumps(data), headers=headers)
    producer.flush(30)
    for record in read(with_events, timeout_s=300):
        attributes = {name: value.decode() for name, value in record.headers() or []}
        if attributes.get("ce_correlationid") != command_id:
            continue
        kind, fact = attributes["ce_type"].removesuffix(".v1").split(".", 2)[2], json.loads(record.value())
        print(f"  {kind}")
        if kind in until:
            with_events.close()
            return fact
        if "reason" in fact:
            sys.exit(fact["reason"])
    sys.exit(f"nothing was heard of {event_type} for five minutes")


def wait_until_ready(endpoint: str) -> None:
    """A deployment that was there already is ready at once, without another event; so ask."""
    for _ in range(600):
        if httpx.get(f"{GATEWAY}/v2/models/{endpoint}/ready").is_success:
            print(f"{endpoint} is ready")
            return
        time.sleep(0.1)
    sys.exit(f"{endpoint} is not ready after a minute; see: millrace endpoints show {endpoint}")


def stream(producer: Producer, endpoint: str, samples: list[list[float]]) -> Iterator[tuple[str, dict]]:
    """One request per sample; the key is the request id, and the result comes back under it."""
    results = listen(f"millrace.inference.{endpoint}.results")
    for index, sample in enumerate(samples):
        producer.produce(f"millrace.inference.{endpoint}.requests", key=f"sample-{index}", value=json.dumps({"instances": [sample]}))
    producer.flush(30)
    for number, record in enumerate(read(results, timeout_s=60), start=1):
        result = json.loads(record.value())
        if result["status"] != "completed":
            sys.exit(result["error"])
        yield result["request_id"], result
        if number == len(samples):
            break
    results.close()


def listen(topic: str) -> Consumer:
    """A consumer of what is published from now on."""
    consumer = Consumer(
        {
            "bootstrap.servers": SERVERS,
            "group.id": f"example-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "allow.auto.create.topics": True,  # the embedded broker makes a topic when it is first asked for
        }
    )
    partitions = [TopicPartition(topic, number) for number in consumer.list_topics(topic, timeout=10).topics[topic].partitions]
    for partition in partitions:
        _, partition.offset = consumer.get_watermark_offsets(partition, timeout=10)
    consumer.assign(partitions)
    return consumer


def read(consumer: Consumer, timeout_s: float) -> Iterator[Message]:
    """Records as they come, for so long."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        record = consumer.poll(0.2)
        if record is not None and record.error() is None:
            yield record


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cancer-by-events")
