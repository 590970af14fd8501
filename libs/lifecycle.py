"""One life-cycle for every process: start in order, say that it is ready, stop in reverse order."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Component(Protocol):
    """Something that starts and stops.

    ``start`` returns when the component is ready. ``run`` ends by itself only when the component can no longer work; a component
    with nothing to watch waits for ever. ``stop`` finishes what was begun; it is called while ``run`` still runs, which is cancelled
    afterwards if it has not ended by then. It may be called after a failed or unfinished ``start``.
    """

    async def start(self) -> None: ...

    async def run(self) -> None: ...

    async def stop(self) -> None: ...


async def run(components: Sequence[Component], ready_file: Path | None = None) -> None:
    """Run components until SIGTERM or SIGINT, or until one of them ends.

    Raises
    ------
    Exception
        What the first component to fail raised in ``start`` or ``run``; all of them have been stopped by then.
    """
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stopping.set)
    asked = asyncio.create_task(stopping.wait())
    started: list[Component] = []
    running: list[asyncio.Task[None]] = []
    try:
        for component in components:
            started.append(component)
            if not await _start(component, asked, running):
                return
            running.append(asyncio.create_task(component.run()))
        _announce(ready_file)
        log.info("ready")
        await asyncio.wait({asked, *running}, return_when=asyncio.FIRST_COMPLETED)
        _check(running)
    finally:
        asked.cancel()
        _withdraw(ready_file)
        for component in reversed(started):
            await _stop(component)
        for task in running:
            task.cancel()
        await asyncio.gather(asked, *running, return_exceptions=True)
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        log.info("stopped")


async def _start(component: Component, asked: asyncio.Task[bool], running: Sequence[asyncio.Task[None]]) -> bool:
    """Whether it started; False when the process was told to stop, or another component ended, before that."""
    starting = asyncio.create_task(component.start())
    try:
        await asyncio.wait({starting, asked, *running}, return_when=asyncio.FIRST_COMPLETED)
        _check(running)
        if starting.done():
            starting.result()
        return starting.done()
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def _stop(component: Component) -> None:
    """Stop one component; one that fails at it must not keep the others from stopping."""
    (error,) = await asyncio.gather(component.stop(), return_exceptions=True)
    if error is not None:
        log.error("%s did not stop cleanly", type(component).__name__, exc_info=error)


def _check(running: Sequence[asyncio.Task[None]]) -> None:
    for task in running:
        if task.done():
            task.result()


def _announce(ready_file: Path | None) -> None:
    if ready_file is not None:
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        partial = ready_file.with_suffix(".partial")
        partial.write_text(str(os.getpid()))
        partial.replace(ready_file)


def _withdraw(ready_file: Path | None) -> None:
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
