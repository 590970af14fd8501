"""Which operations are kept, and how much of them."""

import base64
import tracemalloc
from datetime import timedelta

import pytest

from libs.errors import OverloadedError
from libs.messaging import cloudevents
from schemas.operations import Content, PredictionAccepted, PredictionEnded, WebhookEnded
from services.gateway.operations import Operations
from tests.unit.gateway.conftest import NOW

HOUR = timedelta(hours=1)


class Folded:
    """Operations at a time that a test sets."""

    def __init__(self, most=100, most_bytes=1_000_000):
        self.now = NOW
        self.operations = Operations(lambda: self.now, most, most_bytes)

    def say(self, payload):
        self.operations.apply(cloudevents.write(cloudevents.new_event(payload, "/test", now=self.now)))

    def accepted(self, name, hours=1, principal="local", body=b"", **changes):
        content = Content(base64=base64.b64encode(body).decode(), size_bytes=len(body))
        about = {"operation_id": name, "endpoint_name": "cancer", "principal": principal, "path": "/", "accepted_at": self.now}
        self.say(PredictionAccepted(**{**about, "body": content, "expires_at": self.now + hours * HOUR, **changes}))

    def ended(self, name, body=b""):
        content = Content(base64=base64.b64encode(body).decode(), size_bytes=len(body))
        about = {"operation_id": name, "endpoint_name": "cancer", "outcome": "completed", "status": 200, "media_type": "application/json"}
        self.say(PredictionEnded(**about, body=content))

    def told(self, name):
        self.say(WebhookEnded(operation_id=name, delivered=True, attempts=1))

    def is_full(self, principal="nobody"):
        try:
            self.operations.check_room(principal)
        except OverloadedError:
            return True
        return False


def test_what_expires_first_makes_room_first():
    fold = Folded(most=2)
    for name, hours in (("long", 48), ("short", 1)):
        fold.accepted(name, hours)
        fold.ended(name)
    assert fold.is_full()
    fold.now += 2 * HOUR
    assert not fold.is_full()
    assert (fold.operations.get("long") is None, fold.operations.get("short") is None) == (False, True)


def test_an_operation_is_known_until_it_has_expired_and_its_end_is_known():
    fold = Folded()
    fold.accepted("a")
    fold.now += 2 * HOUR
    fold.accepted("b")
    assert (fold.operations.get("a"), fold.operations.find("a") is None) == (None, False)
    fold.ended("a")
    assert fold.operations.find("a") is None


def test_an_operation_is_known_until_its_webhook_was_told():
    fold = Folded()
    fold.accepted("a", webhook_url="http://example.org")
    fold.ended("a")
    fold.now += 2 * HOUR
    assert not fold.is_full()
    assert fold.operations.find("a") is not None
    fold.told("a")
    assert fold.operations.find("a") is None


def test_one_caller_may_have_half_of_the_operations_and_of_the_memory():
    fold = Folded(most=4, most_bytes=4_000)
    fold.accepted("a", principal="one")
    assert not fold.is_full("one")
    fold.accepted("b", principal="one")
    assert (fold.is_full("one"), fold.is_full("other")) == (True, False)
    fold.accepted("c", principal="other", body=bytes(1_600))
    assert fold.is_full("other")
    fold.ended("c")
    assert not fold.is_full("other")
    fold.ended("c", bytes(3_000))
    assert not fold.is_full("other"), "only the first end counts"


def test_what_was_forgotten_takes_no_room():
    fold = Folded(most=1, most_bytes=1_000)
    fold.accepted("a", body=bytes(900))
    fold.ended("a", bytes(900))
    assert fold.is_full("other")
    fold.now += 2 * HOUR
    assert not fold.is_full("other")


@pytest.mark.parametrize("ends", [False, True])
def test_little_is_kept_of_an_operation(ends):
    fold = Folded(most=10_000)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(500):
            name = f"{number:032x}"
            fold.accepted(name, body=bytes(10_000), query="q" * 1_000, headers={f"ce-{n}": "x" * 100 for n in range(20)})
            if ends:
                fold.ended(name)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 500 < 1_500
