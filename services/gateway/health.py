"""Whether the gateway can do its work."""

import asyncio


class Health:
    """Ready from the moment the state has been read until the process is told to stop."""

    def __init__(self) -> None:
        self.caught_up = False
        self._closing = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered."""
        return self.caught_up and not self._closing.is_set()

    def close(self) -> None:
        """Say that no more work is wanted; endless answers end."""
        self._closing.set()

    async def closing(self) -> None:
        """Return when the process is told to stop."""
        await self._closing.wait()
