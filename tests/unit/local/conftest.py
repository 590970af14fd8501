"""A supervisor that runs in the test's own event loop, with parts that are tiny programs."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from libs.local.home import Home
from libs.local.settings import inherited_environment
from libs.local.supervisor import Backoff, Event, Part, State, Supervisor

ANNOUNCING = "import os, pathlib, signal; pathlib.Path(os.environ['MILLRACE_READY_FILE']).write_text(str(os.getpid())); signal.pause()"
"""Says that it is ready and waits for a signal."""

STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {ANNOUNCING}"
"""The same, and does not end at SIGTERM."""


def program(name: str, text: str = ANNOUNCING, **options: object) -> Part:
    """A part that is a Python program."""
    return Part(name, (sys.executable, "-I", "-S", "-c", text), **{"announces": True, **options})  # type: ignore[arg-type]


class Run:
    """A supervisor at work and what it said."""

    def __init__(self, supervisor: Supervisor, events: list[Event], changed: asyncio.Event) -> None:
        self.supervisor = supervisor
        self.events = events
        self._changed = changed

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds that only an event can bring about."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def until_said(self, name: str, state: State, count: int = 1) -> Event:
        """Wait until a part has entered a state so many times."""
        await self.until(lambda: len(self._said(name, state)) >= count)
        return self._said(name, state)[count - 1]

    def order(self, state: State) -> list[str]:
        """Names of the parts in the order in which they entered a state."""
        return [event.part for event in self.events if event.state is state]

    def pid(self, name: str) -> int:
        """Process id of a part that runs."""
        pid = self.supervisor.parts[name].pid
        assert pid is not None
        return pid

    def _said(self, name: str, state: State) -> list[Event]:
        return [event for event in self.events if event.part == name and event.state is state]


Supervise = Callable[[Sequence[Part]], Awaitable[Run]]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home of its own."""
    home = Home.at(tmp_path / "home")
    home.create()
    return home


@asynccontextmanager
async def supervised(home: Home, parts: Sequence[Part]) -> AsyncIterator[Run]:
    """Everything ready on entry, everything stopped on exit."""
    events: list[Event] = []
    changed = asyncio.Event()
    ready = asyncio.Event()

    def on_event(event: Event) -> None:
        events.append(event)
        changed.set()

    async def on_ready() -> None:
        ready.set()

    supervisor = make_supervisor(home, parts, on_event)
    running = asyncio.create_task(supervisor.run(on_ready))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        waiting.cancel()
        running.result()
    try:
        yield Run(supervisor, events, changed)
    finally:
        supervisor.stop()
        await running


def make_supervisor(home: Home, parts: Sequence[Part], on_event: Callable[[Event], None]) -> Supervisor:
    """A supervisor that loses no time between restarts."""
    return Supervisor(
        parts,
        instance=home.instance,
        logs_directory=home.logs,
        run_directory=home.run,
        environment=inherited_environment(),
        on_event=on_event,
        backoff=Backoff(first_s=0.01, longest_s=0.01),
    )
