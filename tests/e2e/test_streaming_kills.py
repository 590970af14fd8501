"""100 000 records through a whole platform whose parts are killed in the middle: each is answered exactly once."""

import os
import signal
import threading
import time
import uuid
from collections import Counter

import orjson
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from schemas.topics import INFERENCE_PARTITIONS, inference_requests, inference_results
from tests.e2e.platforms import RunningPlatform, cancer_model, dumped, samples

RECORDS = 100_000
SLOWEST_S = 600
"""On a machine that does nothing else it takes less than a minute."""

AHEAD = 20_000
"""Records that are released beyond those whose answers are waited for: what a kill falls into."""

QUIET_S = 25.0
"""A transaction that nobody ends is aborted by the broker after 10 to 20 s, and hides from readers what came after it until then."""

REQUESTS, RESULTS = inference_requests("cancer").name, inference_results("cancer").name


class Answers:
    """What a ``read_committed`` reader finds."""

    def __init__(self, servers: str, expected: list[int]) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[bytes] = []
        self._expected = expected
        self._consumer = Consumer(
            {"bootstrap.servers": servers, "group.id": uuid.uuid4().hex, "isolation.level": "read_committed", "log_level": 0}
        )
        self._consumer.assign([TopicPartition(RESULTS, partition, 0) for partition in range(INFERENCE_PARTITIONS)])

    def until(self, count: int) -> None:
        """Return once so many different requests are answered."""
        end = time.monotonic() + SLOWEST_S
        while len(self.counts) < count:
            assert time.monotonic() < end, f"{len(self.counts)} of {count} are answered after {SLOWEST_S} s"
            self.read()

    def rest(self) -> None:
        """Read on until nothing has come for a while."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < QUIET_S:
            if self.read():
                quiet_since = time.monotonic()
        self._consumer.close()

    def read(self) -> int:
        messages = [message for message in self._consumer.consume(2_000, 0.2) if message.error() is None]
        for message in messages:
            body = orjson.loads(message.value())
            number = int(body["request_id"])
            self.counts[body["request_id"]] += 1
            if body.get("predictions") != [self._expected[number % len(self._expected)]]:
                self.wrong.append(message.value())
        return len(messages)


class Load:
    """Publishes the requests, each once and in order, beside what the block does; as many of them as have been released."""

    def __init__(self, servers: str, rows: list[list[float]]) -> None:
        self.released = 0
        self._bodies = [orjson.dumps({"instances": [row]}) for row in rows]
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._publish)
        self._producer = Producer(
            {
                "bootstrap.servers": servers,
                "enable.idempotence": True,
                "delivery.timeout.ms": SLOWEST_S * 1_000,
                "linger.ms": 20,
                "queue.buffering.max.messages": RECORDS + 1,
                "log_level": 0,
            }
        )

    def release(self, count: int) -> None:
        """Let the load go on until so many have been published."""
        with self._changed:
            self.released = count
            self._changed.notify()

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release(RECORDS)
        self._thread.join()

    def _publish(self) -> None:
        for number in range(RECORDS):
            if number >= self.released:
                with self._changed:
                    self._changed.wait_for(lambda: number < self.released)  # noqa: B023 (called before it returns)
            name = b"%d" % number
            self._producer.produce(
                REQUESTS, self._bodies[number % len(self._bodies)], name, headers=[("ce_id", name), ("ce_source", b"/test")]
            )
        self._producer.flush(SLOWEST_S)


@pytest.mark.e2e
@pytest.mark.timeout(2 * SLOWEST_S)
def test_each_of_100_000_records_is_answered_once_whatever_is_killed_in_the_middle(tmp_path):
    model = cancer_model()
    platform = RunningPlatform(tmp_path / "home", "kafka")
    servers = f"127.0.0.1:{platform.kafka_port}"
    try:
        platform.up()
        platform.upload(dumped(model, tmp_path / "model.joblib"), "cancer")
        platform.version_when("cancer", "validated")
        platform.serve("cancer")
        answers = Answers(servers, model.predict(samples()).tolist())
        runners = platform.runners("cancer")
        with Load(servers, samples().tolist()) as load:

            def until_in_the_middle(count: int) -> None:
                """Return once so many are answered; more than those are on their way, and they are not the last."""
                load.release(count + AHEAD)
                answers.until(count)
                assert len(answers.counts) < load.released < RECORDS

            until_in_the_middle(RECORDS // 20)
            os.kill(platform.pid_of("streaming"), signal.SIGKILL)
            until_in_the_middle(RECORDS * 4 // 20)
            for runner in runners:
                runner.kill()
            until_in_the_middle(RECORDS * 7 // 20)
            os.kill(platform.pid_of("serving"), signal.SIGKILL)
            until_in_the_middle(RECORDS * 10 // 20)
            os.kill(platform.pid_of("broker"), signal.SIGKILL)
            until_in_the_middle(RECORDS * 14 // 20)
            os.kill(platform.pid_of("streaming"), signal.SIGKILL)
            load.release(RECORDS)
            answers.until(RECORDS)
        answers.rest()
        restarts = {part["name"]: part["restarts"] for part in platform.status()["parts"]}
    finally:
        platform.cli("down", check=False)
        platform.close()
    assert restarts["streaming"] >= 2
    assert min(restarts["serving"], restarts["broker"]) >= 1
    assert answers.wrong == []
    assert (len(answers.counts), sum(answers.counts.values())) == (RECORDS, RECORDS)
