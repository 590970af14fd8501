"""What is made of what the client hands out."""

from typing import Any

import pytest
from confluent_kafka import KafkaError

from libs.metrics import Metrics
from libs.settings import KafkaSettings
from services.streaming import adapters
from services.streaming.errors import SessionLostError, SupersededError


class Message:
    """A record whose headers cannot be had: the name of one is not UTF-8."""

    def headers(self) -> Any:
        b"\xff".decode()

    def partition(self) -> int:
        return 1

    def offset(self) -> int:
        return 2

    def key(self) -> bytes:
        return b"key"

    def value(self) -> bytes:
        return b"value"

    def timestamp(self) -> tuple[int, int]:
        return (1, 3)


def test_a_record_whose_headers_are_not_text_is_one_without_headers():
    assert adapters._taken(Message()) == (1, 2, b"key", b"value", (), 3)


def test_a_broker_that_refuses_a_record_for_its_size_is_told_from_other_errors():
    assert adapters._lost("writing", KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)).is_too_large
    assert not adapters._lost("writing", KafkaError(KafkaError._TIMED_OUT)).is_too_large


def test_a_name_that_another_process_took_is_known_by_its_code_or_its_words():
    assert adapters._is_superseded(KafkaError(KafkaError.FENCED_INSTANCE_ID))
    assert adapters._is_superseded(KafkaError(KafkaError._FATAL, "Static consumer fenced by other consumer with same group.instance.id"))
    assert not adapters._is_superseded(KafkaError(KafkaError._FATAL, "something else"))


def test_who_is_fenced_after_its_broker_was_away_comes_back_and_who_is_fenced_otherwise_stops(monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr(adapters.time, "monotonic", lambda: now[0])
    fenced = KafkaError(KafkaError.FENCED_INSTANCE_ID, "Static consumer fenced", True)

    def stream_log() -> adapters.KafkaStreamLog:
        made = adapters.KafkaStreamLog(KafkaSettings(group_instance="a"), "e", 1, Metrics())
        made._on_error(KafkaError(KafkaError._ALL_BROKERS_DOWN))
        return made

    back = stream_log()
    back._on_error(fenced)
    with pytest.raises(SessionLostError, match="Static consumer fenced"):
        back._check()
    other = stream_log()
    now[0] += adapters.AFTER_OUTAGE_S + 1
    other._on_error(fenced)
    with pytest.raises(SupersededError, match="another process with KAFKA_GROUP_INSTANCE=a"):
        other._check()
