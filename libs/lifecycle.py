"""One life-cycle for every process: start in order, say that it is ready, stop in reverse order."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)


class Component(Protocol):
    """Something that starts and stops.

    ``start`` returns when the component is ready. ``run`` returns or raises only when the component can no longer work; a component
    with nothing to watch waits for ever. ``stop`` finishes what was begun and may be called after a failed ``start``.
    """

    async def start(self) -> None: ...

    async def run(self) -> None: ...

    async def stop(self) -> None: ...


async def run(components: Sequence[Component], ready_file: Path | None = None) -> None:
    """Run components until SIGTERM or SIGINT, or until one of them ends.

    Raises
    ------
    Exception
        Whatever a component's ``start`` or ``run`` raised; the others have been stopped by then.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    started: list[Component] = []
    watched: list[asyncio.Task[None]] = []
    stop_asked = asyncio.create_task(stopping.wait())
    try:
        for component in components:
            started.append(component)
            starting = asyncio.create_task(component.start())
            await asyncio.wait({starting, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.is_set():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            await starting
            watched.append(asyncio.create_task(component.run()))
        if ready_file is not None:
            _announce(ready_file)
        log.info("ready")
        done, _ = await asyncio.wait({stop_asked, *watched}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop_asked}:
            task.result()
    finally:
        for task in (*watched, stop_asked):
            task.cancel()
        await asyncio.gather(*watched, stop_asked, return_exceptions=True)
        for component in reversed(started):
            await component.stop()
        log.info("stopped")


def _announce(ready_file: Path) -> None:
    ready_file.parent.mkdir(parents=True, exist_ok=True)
    partial = ready_file.with_suffix(".partial")
    partial.write_text(str(os.getpid()))
    partial.replace(ready_file)
