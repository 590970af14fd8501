"""A bell that rings whenever a view of the log has changed."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Changes:
    """Wakes everybody who waits for something to become true."""

    def __init__(self) -> None:
        self._bell = asyncio.Event()

    def notify(self) -> None:
        """Wake everybody; each looks for itself."""
        if self._bell.is_set():
            return
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    async def next(self, timeout_s: float) -> None:
        """Return at the next change, or after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._bell.wait()
        except TimeoutError:
            return

    async def until(self, look: Callable[[], T | None], timeout_s: float) -> T | None:
        """What ``look`` finds first, trying now and after every change; None when it found nothing in time."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (found := look()) is None:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return None
            await self.next(left)
        return found
