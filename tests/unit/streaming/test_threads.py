"""Blocking calls beside the event loop."""

import asyncio
import threading

import pytest

from services.streaming.threads import CallThread


@pytest.fixture
def thread():
    made = CallThread("calls")
    yield made
    made.end()


async def test_a_call_returns_what_its_function_returns_in_the_order_they_were_asked_for(thread):
    seen: list[int] = []
    assert await asyncio.gather(*(thread.call(lambda number=number: seen.append(number) or number) for number in range(5))) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert seen == [0, 1, 2, 3, 4]


async def test_a_call_raises_what_its_function_raises_and_the_next_one_is_made(thread):
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 // 0)
    assert await thread.call(threading.current_thread) is not threading.current_thread()


async def test_a_call_that_does_not_come_back_can_be_given_up(thread):
    come_back = threading.Event()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await thread.call(come_back.wait)
    come_back.set()
    assert await thread.call(lambda: "next") == "next"
