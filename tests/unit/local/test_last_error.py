import json

import pytest

from libs.local.last_error import LONGEST, last_error

TRACEBACK = """Traceback (most recent call last):
  File "a.py", line 1, in f
    g()
KeyError: 'x'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "a.py", line 3, in h
    f()
    ^^^
libs.errors.BrokerError: the broker is gone"""


def log_line(level: str, message: str, **fields: str) -> str:
    return json.dumps({"time": "2026-01-01T00:00:00Z", "level": level, "service": "gateway", "message": message, **fields})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TRACEBACK, "libs.errors.BrokerError: the broker is gone"),
        (f"{log_line('INFO', 'ready')}\n{TRACEBACK}\n{log_line('INFO', 'stopped')}", "libs.errors.BrokerError: the broker is gone"),
        (f"{log_line('ERROR', 'it failed', exception=TRACEBACK)}", "it failed: libs.errors.BrokerError: the broker is gone"),
        (log_line("CRITICAL", "no disk"), "no disk"),
        (f"{TRACEBACK}\ngateway: the runner key cannot be read", "gateway: the runner key cannot be read"),
        ("2026-01-01T00:00:00.000Z ERROR   gateway: it failed", "2026-01-01T00:00:00.000Z ERROR gateway: it failed"),
        ("[2026-01-01 00:00:00,000] FATAL Exiting Kafka (kafka.Kafka$)", "[2026-01-01 00:00:00,000] FATAL Exiting Kafka (kafka.Kafka$)"),
        ("Traceback (most recent call last):\n  File 'a'\nKeyboardInterrupt", "KeyboardInterrupt"),
        (log_line("INFO", "ready"), ""),
        ('{"half a line', ""),
        ("", ""),
    ],
)
def test_the_last_word_of_a_process_is_found(text: str, said: str) -> None:
    assert last_error(text.splitlines(), "gateway") == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gateway: cannot reach kafka://user:hunter2@host:9092", "gateway: cannot reach kafka://user:***@host:9092"),
        ("gateway: refused: Authorization: Bearer abcdef0123456789", "gateway: refused: Authorization: Bearer ***"),
        ("gateway: AWS_SECRET_ACCESS_KEY=abc/def is wrong", "gateway: AWS_SECRET_ACCESS_KEY=*** is wrong"),
        ('gateway: {"password": "hunter2", "user": "me"}', 'gateway: {"password": ***", "user": "me"}'),
    ],
)
def test_secrets_are_left_out(text: str, said: str) -> None:
    assert last_error([text], "gateway") == said


def test_a_long_error_is_cut() -> None:
    assert len(last_error(["ValueError", "gateway: " + "x" * 1000], "gateway")) == LONGEST
