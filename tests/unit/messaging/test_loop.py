import asyncio

import pytest

from libs.messaging.errors import StoppingError
from libs.messaging.loop import Loop


async def test_a_stop_lets_the_current_step_finish():
    begun, release, finished = asyncio.Event(), asyncio.Event(), []

    async def step() -> None:
        begun.set()
        await release.wait()
        finished.append(True)

    loop = Loop("test", step, asyncio.Event())
    running = asyncio.create_task(loop.run())
    await begun.wait()
    stopping = asyncio.create_task(loop.stop())
    release.set()
    await asyncio.gather(stopping, running)
    assert finished == [True]


async def test_a_step_that_does_not_end_is_cancelled_after_the_grace():
    begun = asyncio.Event()

    async def step() -> None:
        begun.set()
        await asyncio.Event().wait()

    loop = Loop("test", step, asyncio.Event(), grace_s=0.01)
    running = asyncio.create_task(loop.run())
    await begun.wait()
    await loop.stop()
    await running


async def test_what_a_step_raises_ends_the_loop_and_a_stop_afterwards_is_harmless():
    async def step() -> None:
        raise KeyError("bug")

    loop = Loop("test", step, asyncio.Event())
    with pytest.raises(KeyError):
        await loop.run()
    await loop.stop()


async def test_giving_up_because_of_the_stop_is_a_normal_end():
    async def step() -> None:
        raise StoppingError("stopping")

    await Loop("test", step, asyncio.Event()).run()


async def test_a_loop_that_never_ran_stops_at_once_and_then_does_not_begin():
    steps: list[int] = []

    async def step() -> None:
        steps.append(1)

    loop = Loop("test", step, asyncio.Event())
    await loop.stop()
    await loop.run()
    assert steps == []


async def test_cancelling_run_cancels_the_step():
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def step() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    running = asyncio.create_task(Loop("test", step, asyncio.Event()).run())
    await begun.wait()
    running.cancel()
    await asyncio.wait({running})
    async with asyncio.timeout(1):
        await cancelled.wait()
