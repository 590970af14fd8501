"""Tasks that stand and fall together, and waiting that ends with the process."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from libs.messaging.errors import StoppingError


async def together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run coroutines at once; when one raises or is cancelled, so are the others, and its error is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        running = set(tasks)
        while running:
            # A cancelled one is no exception to FIRST_EXCEPTION: the others would wait for it for ever.
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def pause(stopping: asyncio.Event, seconds: float) -> None:
    """Wait a while; raises ``StoppingError`` as soon as the process stops."""
    try:
        await asyncio.wait_for(stopping.wait(), seconds)
    except TimeoutError:
        return
    raise StoppingError("the stream stops")
