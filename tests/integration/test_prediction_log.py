"""The prediction log on a real Kafka: a recorder writes it, the command line reads it, and the account adds up."""

import asyncio
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from libs.cli.log_reader import LogReader
from libs.lifecycle import Component
from libs.messaging.admin import create_topics
from libs.messaging.kafka import KafkaBroker
from libs.messaging.records import Record
from libs.metrics import Metrics
from libs.predictions.audit import Audit, InstanceReport
from schemas.predictions import InstanceState, OutcomeCounts
from schemas.topics import PREDICTIONS, TOPICS
from services.gateway.catalog import Catalog
from services.gateway.predictions import Outcome
from services.gateway.recorder import Recorder, RecorderLimits
from tests.conftest import KafkaServer
from tests.unit.gateway.recording import Recording

pytestmark = pytest.mark.integration


class Gateway:
    """A recorder that writes to Kafka."""

    def __init__(self, directory, server: KafkaServer) -> None:
        self.recorder = Recorder(directory, Catalog(), KafkaBroker(server.settings), Metrics(), RecorderLimits(flush_s=0.02))
        self.told = Recording(self.recorder, None, Metrics(), Catalog())

    async def run(self, work) -> None:
        component: Component = self.recorder
        await component.start()
        running = asyncio.create_task(component.run())
        try:
            await work(self.told)
        finally:
            await component.stop()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def read(server: KafkaServer, since: datetime | None = None) -> list[Record]:
    """What is in the log; in a thread of its own, as librdkafka blocks."""
    found: list[Record] = []

    def look() -> None:
        with LogReader(server.settings.bootstrap_servers) as reader:
            found.extend(reader.until_now(since))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found


def reports(records: Sequence[Record]) -> dict[str, InstanceReport]:
    audit = Audit()
    for record in records:
        audit.add(record)
    assert audit.unreadable == []
    return {report.instance: report for report in audit.reports()}


async def test_what_was_recorded_is_read_and_adds_up(kafka_server: KafkaServer, tmp_path):
    await create_topics(kafka_server.settings, TOPICS)
    gateway = Gateway(tmp_path, kafka_server)

    async def work(told: Recording) -> None:
        for number in range(20):
            told.answer(*(f"r{number}-{place}" for place in range(50)), endpoint=f"endpoint-{number % 4}")
            await asyncio.sleep(0.02)
        told.end(told.accept("late"), Outcome.EXPIRED)

    began = datetime.now(UTC)
    await gateway.run(work)
    records = await asyncio.to_thread(read, kafka_server)
    assert {record.topic for record in records} == {PREDICTIONS.name}
    report = reports(records)[gateway.recorder.instance]
    assert report.findings == ()
    assert (report.state, report.is_whole, report.rows) == (InstanceState.STOPPED, True, OutcomeCounts(completed=1000, expired=1))
    since = await asyncio.to_thread(read, kafka_server, began - timedelta(seconds=5))
    assert reports(since)[gateway.recorder.instance].is_sound
    assert await asyncio.to_thread(read, kafka_server, datetime.now(UTC) + timedelta(hours=1)) == []


async def test_a_part_of_a_living_account_is_sound(kafka_server: KafkaServer, tmp_path):
    await create_topics(kafka_server.settings, TOPICS)
    gateway = Gateway(tmp_path, kafka_server)
    middle: list[datetime] = []

    async def work(told: Recording) -> None:
        for number in range(10):
            told.answer(f"p{number}")
            await asyncio.sleep(0.05)
            if number == 5:
                await told.recorder._writer.drain()
                middle.append(datetime.now(UTC))

    await gateway.run(work)
    report = reports(await asyncio.to_thread(read, kafka_server, middle[0]))[gateway.recorder.instance]
    assert (report.findings, report.is_whole) == ((), False)
    assert 0 < report.rows.completed < 10
