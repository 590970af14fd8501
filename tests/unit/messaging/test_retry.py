import asyncio

import pytest

from libs.errors import ConflictError, NotReadyError, OverloadedError, TransientError
from libs.messaging.errors import StoppingError
from libs.messaging.retry import Retry, keep_trying

FAST = Retry(first_s=0.001, longest_s=0.001)


def failing(error: Exception, times: int):
    left = [times]

    async def action() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "done"

    return action


@pytest.mark.parametrize("error", [TransientError("x"), NotReadyError("x"), OverloadedError("x")])
async def test_retryable_errors_are_tried_again_until_they_are_gone(error):
    assert await keep_trying(failing(error, 5), FAST, asyncio.Event()) == "done"


@pytest.mark.parametrize("error", [ConflictError("x"), KeyError("x")])
async def test_other_errors_go_up_at_once(error):
    with pytest.raises(type(error)):
        await keep_trying(failing(error, 1), FAST, asyncio.Event())


async def test_when_stopping_there_is_one_attempt_and_no_wait():
    stopping = asyncio.Event()
    stopping.set()
    assert await keep_trying(failing(TransientError("x"), 0), Retry(first_s=60), stopping) == "done"
    with pytest.raises(StoppingError, match="after 1 failed attempts: x"):
        await keep_trying(failing(TransientError("x"), 1), Retry(first_s=60), stopping)


def test_delays_grow_to_the_longest_and_are_half_random():
    retry = Retry(first_s=1, factor=2, longest_s=8)
    for attempt, whole in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (5000, 8)):
        assert whole / 2 <= retry.delay_s(attempt) <= whole


def test_the_broker_is_asked_every_two_seconds_at_least():
    assert Retry().for_broker.longest_s == 2.0
    assert Retry(longest_s=0.1).for_broker == Retry(longest_s=0.1)
