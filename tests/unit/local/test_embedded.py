import socket

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from libs.errors import ConfigurationError
from libs.local.embedded import DEFAULT_PARTITIONS, LOOPBACK, MockCluster
from libs.local.kafka import _free_port as free_port


async def test_topics_have_the_declared_partitions_on_the_chosen_port() -> None:
    port = free_port()
    cluster = MockCluster(port, {"one": 1})
    producer = AIOKafkaProducer(bootstrap_servers=f"{LOOPBACK}:{port}", enable_idempotence=True)
    try:
        await producer.start()
        assert await producer.partitions_for("one") == {0}
        assert await producer.partitions_for("undeclared") == set(range(DEFAULT_PARTITIONS))
    finally:
        await producer.stop()
        cluster.close()


async def test_a_group_reads_from_the_beginning_what_was_produced() -> None:
    port = free_port()
    cluster = MockCluster(port, {"one": 1})
    address = f"{LOOPBACK}:{port}"
    producer = AIOKafkaProducer(bootstrap_servers=address)
    consumer = AIOKafkaConsumer("one", bootstrap_servers=address, group_id="group", auto_offset_reset="earliest")
    try:
        await producer.start()
        await producer.send_and_wait("one", b"value", b"key", headers=[("name", b"content")])
        await consumer.start()
        record = await consumer.getone()
        assert (record.key, record.value, record.headers) == (b"key", b"value", (("name", b"content"),))
    finally:
        await consumer.stop()
        await producer.stop()
        cluster.close()


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            MockCluster(port, {})
