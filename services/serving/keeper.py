"""Keeps one runner alive inside a replica: restarts it, says where it listens, and says when it cannot go on."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from libs.errors import MillraceError
from libs.inference.errors import RunnerStartError
from services.serving.errors import ReplicaUnhealthyError

Clock = Callable[[], float]


class Exit(Protocol):
    """How a runner ended."""

    @property
    def description(self) -> str: ...


class Runner(Protocol):
    """A runner whose model is loaded."""

    @property
    def address(self) -> str: ...

    async def ping(self) -> float:
        """Return when it answers: for how many seconds it has been busy with one request; raises ``MillraceError`` when it does not."""
        ...

    async def wait_exit(self) -> Exit: ...

    async def stop(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the rest of the platform may know of a replica: ``address`` is None while nobody answers, ``reason`` says why."""

    address: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Restarts:
    """When a runner that ended is started again.

    The first restart follows at once; a runner that ends again within ``stable_s`` seconds waits ``first_delay_s``, then twice as long,
    up to ``longest_delay_s``: a model that exits on every request must not keep a core busy. After ``most_failed_starts`` starts in a row
    that failed the replica gives up, and Serve replaces it, maybe on another machine.
    """

    first_delay_s: float = 0.1
    longest_delay_s: float = 5.0
    stable_s: float = 30.0
    most_failed_starts: int = 3

    def delay_s(self, early_exits: int) -> float:
        """Pause before the restart after so many exits in a row that came early (0: the runner had been stable)."""
        return 0.0 if early_exits == 0 else float(min(self.first_delay_s * 2 ** min(early_exits - 1, 16), self.longest_delay_s))


class RunnerKeeper:
    """Owns one runner at a time.

    Parameters
    ----------
    start
        Starts a runner and returns when its model is loaded; raises ``RunnerStartError``.
    announce
        Is told of every change, in order.
    predict_timeout_s
        A runner that is busy with one request for longer hangs: it answers one after the other, so nobody else is answered either. It is
        told the same limit and ends itself; one that does not is killed here.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Runner]],
        announce: Callable[[Announcement], Awaitable[None]],
        restarts: Restarts | None = None,
        *,
        predict_timeout_s: float = math.inf,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        self._start = start
        self._announce = announce
        self._restarts = restarts or Restarts()
        self._predict_timeout_s = predict_timeout_s
        self._sleep = sleep
        self._clock = clock
        self._runner: Runner | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._failure: str | None = None

    async def start(self) -> None:
        """Start the first runner; raises ``RunnerStartError`` when the model cannot be loaded."""
        self._runner = await self._start()
        await self._announce(Announcement(self._runner.address))
        self._watcher = asyncio.create_task(self._watch(self._runner))

    async def check(self) -> None:
        """Return when the replica is healthy; a runner that does not answer or hangs is killed, so that the watcher starts another.

        Raises
        ------
        ReplicaUnhealthyError
            The runner cannot be brought back, did not answer, or hangs.
        """
        if self._failure is not None:
            raise ReplicaUnhealthyError(self._failure)
        if self._watcher is not None and self._watcher.done():
            self._watcher.result()
        runner = self._runner
        if runner is None:
            return
        try:
            busy_s = await runner.ping()
        except MillraceError as error:
            if runner is self._runner:
                self._kill(runner, f"does not answer: {error.message}")
        else:
            if busy_s > self._predict_timeout_s:
                self._kill(runner, f"has been busy with one request for {busy_s:.0f} s")

    def _kill(self, runner: Runner, reason: str) -> None:
        runner.kill()
        raise ReplicaUnhealthyError(f"the runner at {runner.address} {reason}")

    async def stop(self) -> None:
        """Say that nobody answers here any more, then end the runner."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        runner, self._runner = self._runner, None
        await self._announce(Announcement(None, "the replica is stopping"))
        if runner is not None:
            await runner.stop()

    async def _watch(self, runner: Runner) -> None:
        early_exits = 0
        while True:
            started = self._clock()
            ended = await runner.wait_exit()
            self._runner = None
            await runner.stop()
            await self._announce(Announcement(None, f"the runner {ended.description}"))
            early_exits = early_exits + 1 if self._clock() - started < self._restarts.stable_s else 0
            await self._sleep(self._restarts.delay_s(early_exits - 1 if early_exits else 0))
            restarted = await self._restart()
            if restarted is None:
                return
            runner = self._runner = restarted
            await self._announce(Announcement(runner.address))

    async def _restart(self) -> Runner | None:
        """Start another runner; None when that failed too often."""
        for attempt in range(1, self._restarts.most_failed_starts + 1):
            try:
                return await self._start()
            except RunnerStartError as error:
                reason = error.message
            if attempt < self._restarts.most_failed_starts:
                await self._sleep(self._restarts.delay_s(attempt))
        self._failure = f"the runner cannot be started again: {reason}"
        await self._announce(Announcement(None, self._failure))
        return None
