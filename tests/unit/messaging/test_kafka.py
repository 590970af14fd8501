"""What the adapter does when a broker is lost that aiokafka goes on waiting for."""

import asyncio
from types import SimpleNamespace

import pytest

from libs.errors import TransientError
from libs.messaging import kafka
from libs.messaging.records import TopicPartition
from libs.settings import KafkaSettings


async def never(*_: object) -> None:
    await asyncio.Event().wait()


async def soon(*_: object) -> None:
    return None


@pytest.mark.parametrize("hanging", ["begin_transaction", "send_offsets_to_transaction", "commit_transaction"])
async def test_a_transaction_whose_broker_is_gone_fails_long_before_other_requests_do(monkeypatch, hanging):
    monkeypatch.setattr(kafka, "TRANSACTION_S", 0.02)
    producer = kafka.KafkaProducer(KafkaSettings(request_timeout_ms=30_000), "registry")
    client = dict.fromkeys(("begin_transaction", "send_offsets_to_transaction", "commit_transaction", "abort_transaction"), soon)
    producer._producer = SimpleNamespace(**{**client, hanging: never}, _txn_manager=SimpleNamespace(is_fatal_error=lambda: False))
    producer._is_started = True
    async with asyncio.timeout(5):
        with pytest.raises(TransientError):
            async with producer.transaction():
                await producer.send_offsets({TopicPartition("commands", 0): 1}, "registry")


def test_requests_outside_of_transactions_may_take_as_long_as_they_are_told():
    assert kafka.KafkaProducer(KafkaSettings(request_timeout_ms=30_000))._timeout_s == 30
    assert kafka.KafkaProducer(KafkaSettings(request_timeout_ms=1_000), "registry")._timeout_s == 1
