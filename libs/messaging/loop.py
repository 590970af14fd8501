"""A loop that runs until it is told to stop, finishing the step it is in."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from libs.messaging.errors import StoppingError

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Time a handler gets to finish when the process stops; then it is cancelled and its record is handled again after the restart."""


class Loop:
    """Repeats ``step`` until ``stop``.

    Parameters
    ----------
    stopping
        Set by ``stop``; steps may look at it.
    grace_s
        Time the current step gets to finish, in seconds; then it is cancelled.
    finish
        Called last, however the steps ended; ``stop`` waits for it.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], Awaitable[None]],
        stopping: asyncio.Event,
        grace_s: float = GRACE_S,
        finish: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._name = name
        self._step = step
        self._stopping = stopping
        self._grace_s = grace_s
        self._finish = finish
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Returns after ``stop``; raises what a step raised."""
        task = self._task = asyncio.create_task(self._repeat(), name=self._name)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        if not task.cancelled():
            task.result()

    async def stop(self) -> None:
        """Wait for the current step; may be called before ``run``, or without it."""
        self._stopping.set()
        if self._task is None or self._task.done():
            return
        done, _ = await asyncio.wait({self._task}, timeout=self._grace_s)
        if not done:
            log.warning("%s did not finish within %g s and is cancelled; its record will be handled again", self._name, self._grace_s)
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _repeat(self) -> None:
        try:
            while not self._stopping.is_set():
                await self._step()
        except StoppingError as error:
            log.info("%s: %s", self._name, error)
        finally:
            if self._finish is not None:
                await self._finish()
