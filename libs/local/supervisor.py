"""Starts a list of parts in the order of their dependencies, keeps them alive, and stops them in reverse.

It knows nothing of what the parts are. One coroutine per part waits for what the part depends on, starts it, waits until it is ready,
waits for its end, and begins again; the coroutines meet only in each other's ``ready`` events. Children die with
the supervisor (``PR_SET_PDEATHSIG``), and their orphans become its children (``PR_SET_CHILD_SUBREAPER``), so nothing escapes.
"""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from libs.local import processes
from libs.local.errors import PartFailedError, PortTakenError
from libs.local.last_error import last_error

READY_FILE_VARIABLE = "MILLRACE_READY_FILE"
_POLL_S = 0.05
_MAX_LOG_BYTES = 10 * 2**20
_BACKLOG = 1_024
"""Connections that may wait while a part restarts; the kernel's own bound (``net.core.somaxconn``) may be lower."""
_LAST_LINES, _LAST_BYTES = 500, 65_536


class State(StrEnum):
    """Where a part is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    EXITED = "exited"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Listening:
    """An address that the supervisor listens on for a part, so that connections wait while the part restarts.

    ``variable`` tells the part the descriptors of the ``count`` sockets, as a JSON list; several share the port (``SO_REUSEPORT``).
    """

    variable: str
    host: str
    port: int
    count: int = 1


@dataclass(frozen=True)
class Part:
    """Something that must be there for the platform to work; usually a process.

    Parameters
    ----------
    name
        Names the log file, the ready file, and the part in everything that is said about it.
    argv
        Command line; empty for a part that is only a condition (``is_ready``).
    environment
        Variables on top of the supervisor's own, computed at every start.
    after
        Names of the parts that must be ready before this one starts.
    announces
        The process writes its id to the file named by ``MILLRACE_READY_FILE`` when it is ready.
    is_ready
        Asked again and again until it says True, after ``announces``; may block, runs in a thread. A MillraceError means: never.
    ports
        Loopback ports it will listen on; found to be free before the first start of anything, and kept from being lost to a client
        while it is not there.
    listens
        Sockets that are opened at its first start, are handed to each of its processes, and closed when it is stopped for good.
    stale_files
        Removed before every start.
    start_timeout_s, stop_timeout_s
        How long it may take to become ready; how long it gets between SIGTERM and SIGKILL.
    restarts_with
        Names of parts that need not be ready before this one starts; when one of them that ``restarts_dependents`` ends, this one is
        restarted at once, and it is stopped before them.
    restarts_dependents
        Its death takes with it what the others rely on: they are restarted when it is back.
    required
        Whether the rest is worth nothing without it; if not, the others go on when it does not start.
    """

    name: str
    argv: tuple[str, ...] = ()
    environment: Callable[[], Mapping[str, str]] = dict
    after: tuple[str, ...] = ()
    announces: bool = False
    is_ready: Callable[[], bool] | None = None
    ports: tuple[int, ...] = ()
    listens: tuple[Listening, ...] = ()
    stale_files: tuple[Path, ...] = ()
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
    restarts_with: tuple[str, ...] = ()
    restarts_dependents: bool = False
    required: bool = True


@dataclass(frozen=True)
class Event:
    """A part changed its state.

    ``elapsed_s`` is the time since the supervisor began; ``detail`` one sentence, or empty.
    """

    part: str
    state: State
    elapsed_s: float
    detail: str = ""


@dataclass(frozen=True)
class Backoff:
    """Seconds between restarts: doubling from ``first_s`` to ``longest_s``, anew after ``stable_s`` of life."""

    first_s: float = 0.5
    longest_s: float = 5.0
    stable_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        """Pause before the restart that follows so many failures in a row (1, 2, …)."""
        return float(min(self.first_s * 2 ** (min(failures, 16) - 1), self.longest_s))


@dataclass
class Running:
    """What the supervisor knows of a part right now; ``last_error`` and ``failed_at`` tell of its last end that nobody asked for."""

    part: Part
    state: State = State.WAITING
    pid: int | None = None
    started_at: float | None = None
    restarts: int = 0
    detail: str = ""
    last_error: str = ""
    failed_at: float | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    lapsed: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None
    sockets: dict[str, list[socket.socket]] = field(default_factory=dict)
    restart_asked: bool = False
    log_offset: int = 0


class _NotReadyError(Exception):
    """The part died or took too long before it was ready."""


class Supervisor:
    """Runs parts until told to stop.

    Parameters
    ----------
    parts
        Each after those it depends on.
    instance
        Mark that every process carries in its environment (``MILLRACE_INSTANCE``), by which leftovers are found.
    logs_directory, run_directory
        Where ``<part>.log`` and ``<part>.ready`` go.
    environment
        Environment that every part starts from.
    on_event
        Is told of every change of state; must return quickly.
    attempts
        How often a part may fail before it was ever ready. Afterwards it is restarted for ever, with ``backoff``.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        instance: str,
        logs_directory: Path,
        run_directory: Path,
        environment: Mapping[str, str],
        on_event: Callable[[Event], None],
        backoff: Backoff = Backoff(),
        attempts: int = 3,
    ) -> None:
        self.parts = {part.name: Running(part) for part in parts}
        self._instance = instance
        self._logs = logs_directory
        self._run = run_directory
        self._environment = environment
        self._on_event = on_event
        self._backoff = backoff
        self._attempts = attempts
        self._began = time.monotonic()
        self._stop_asked = asyncio.Event()
        self._spawning = 0
        self._reserved: dict[int, socket.socket] = {}

    def stop(self) -> None:
        """Ask for the end; the second time, whatever still runs is killed at once."""
        if self._stop_asked.is_set():
            for running in self.parts.values():
                self._kill_group(running)
        self._stop_asked.set()

    async def run(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        """Start everything, await ``on_ready`` once when all parts are, and stay until ``stop``; then stop everything.

        Raises
        ------
        PortTakenError
            Before anything is started.
        PartFailedError
            When a part does not come up; everything has been stopped by then.
        """
        try:
            self._reserve_ports()
            await self._supervise(on_ready)
        finally:
            for keeper in self._reserved.values():
                keeper.close()

    async def _supervise(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        processes.adopt_orphans()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        keepers = [asyncio.create_task(self._keep(running)) for running in self.parts.values()]
        all_ready = asyncio.create_task(self._all_ready(on_ready))
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        try:
            done, _ = await asyncio.wait({*keepers, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
            for keeper in done - {stop_asked}:
                keeper.result()
        finally:
            self._stop_asked.set()
            for task in (*keepers, all_ready, stop_asked):
                task.cancel()
            await asyncio.gather(*keepers, all_ready, stop_asked, return_exceptions=True)
            await self._stop_all()
            loop.remove_signal_handler(signal.SIGCHLD)

    def _reserve_ports(self) -> None:
        """Make sure that the ports are free, and stay so while their parts are not there."""
        wanted: dict[int, str] = {}
        for running in self.parts.values():
            for port in running.part.ports:
                other = wanted.setdefault(port, running.part.name)
                if other != running.part.name:
                    raise PortTakenError(
                        f"{running.part.name} and {other} cannot both listen on {processes.LOOPBACK}:{port}; choose another port for one"
                    )
                if port not in self._reserved:
                    try:
                        self._reserved[port] = processes.reserve(port)
                    except OSError as error:
                        raise PortTakenError(
                            f"{running.part.name} cannot listen on {processes.LOOPBACK}:{port}: {processes.holder_of_port(port)}; "
                            "end it or choose another port"
                        ) from error

    async def _all_ready(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        for running in self.parts.values():
            await running.ready.wait()
        await on_ready()

    async def _keep(self, running: Running) -> None:
        failures = 0
        was_ready = False
        while True:
            for name in running.part.after:
                await self.parts[name].ready.wait()
            running.restart_asked = False
            began = time.monotonic()
            try:
                await self._start(running)
                await self._until_ready(running)
                was_ready = True
                self._change(running, State.READY)
                running.ready.set()
                reason = await self._until_exit(running)
            except _NotReadyError as error:
                reason = str(error)
            running.ready.clear()
            await self._end(running)
            if running.restart_asked:
                self._change(running, State.WAITING, "restarts with what it depends on")
                running.restarts += 1
                continue
            running.last_error, running.failed_at = self._last_error(running, reason), time.time()
            failures = 1 if time.monotonic() - began > self._backoff.stable_s else failures + 1
            if not was_ready and failures >= self._attempts:
                await self._give_up(running, reason)
            if running.part.restarts_dependents and was_ready:
                self._restart_dependents(running)
            delay_s = self._backoff.delay_s(failures)
            self._change(running, State.EXITED, f"{running.last_error}; restarting in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            running.restarts += 1

    async def _give_up(self, running: Running, reason: str) -> None:
        failure = self._failure(running, reason)
        if running.part.required:
            raise failure
        self._change(running, State.EXITED, failure.message)
        running.ready.set()
        await self._stop_asked.wait()

    async def _start(self, running: Running) -> None:
        part = running.part
        for stale in (self._ready_file(part), *part.stale_files):
            stale.unlink(missing_ok=True)
        self._change(running, State.STARTING)
        running.started_at = time.time()
        if not part.argv:
            return
        environment = {
            **part.environment(),
            processes.INSTANCE_VARIABLE: self._instance,
            processes.PART_VARIABLE: part.name,
            READY_FILE_VARIABLE: str(self._ready_file(part)),
            **_handed_over(running),
        }
        log = self._logs / f"{part.name}.log"
        if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        self._spawning += 1
        try:
            with log.open("ab") as output:
                running.log_offset = output.tell()
                running.process = await asyncio.create_subprocess_exec(
                    *part.argv,
                    env={**self._environment, **environment},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    process_group=0,
                    pass_fds=[each.fileno() for sockets in running.sockets.values() for each in sockets],
                    preexec_fn=processes.child_setup(),
                )
        except OSError as error:
            raise _NotReadyError(f"`{part.argv[0]}` cannot be run: {error.strerror}") from error
        finally:
            self._spawning -= 1
        running.pid = running.process.pid

    async def _until_ready(self, running: Running) -> None:
        part = running.part
        try:
            async with asyncio.timeout(part.start_timeout_s):
                while not await self._is_ready(running):
                    if running.process is not None and running.process.returncode is not None:
                        raise _NotReadyError(_ending(running.process.returncode))
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise _NotReadyError(f"not ready after {part.start_timeout_s:g} s") from error

    async def _is_ready(self, running: Running) -> bool:
        part = running.part
        if part.announces and not self._has_announced(running):
            return False
        return part.is_ready is None or await asyncio.to_thread(part.is_ready)

    def _has_announced(self, running: Running) -> bool:
        try:
            return self._ready_file(running.part).read_text().strip() == str(running.pid)
        except OSError:
            return False

    async def _until_exit(self, running: Running) -> str:
        if running.process is None:
            running.lapsed.clear()
            await running.lapsed.wait()
            return "what it depends on went away"
        return _ending(await running.process.wait())

    def _restart_dependents(self, running: Running) -> None:
        for other in self.parts.values():
            if running.part.name in (*other.part.after, *other.part.restarts_with) and not other.restart_asked:
                other.restart_asked = True
                if other.process is None:
                    other.lapsed.set()
                else:
                    self._signal(other, signal.SIGTERM)
                self._restart_dependents(other)

    async def _end(self, running: Running) -> None:
        """Make sure that nothing of the part's process group is left."""
        process = running.process
        if process is None:
            return
        if process.returncode is None:
            self._signal(running, signal.SIGTERM)
            try:
                async with asyncio.timeout(running.part.stop_timeout_s):
                    await process.wait()
            except TimeoutError:
                self._kill_group(running)
                await process.wait()
        self._kill_group(running)
        running.process = running.pid = None
        self._ready_file(running.part).unlink(missing_ok=True)

    async def _stop_all(self) -> None:
        """Each part ends after everything that depends on it has."""
        await asyncio.gather(*(self._stop(running) for running in self.parts.values()))

    async def _stop(self, running: Running) -> None:
        for other in self.parts.values():
            if running.part.name in (*other.part.after, *other.part.restarts_with):
                await other.stopped.wait()
        for sockets in running.sockets.values():
            for each in sockets:
                each.close()
        running.sockets.clear()
        if running.process is not None:
            self._change(running, State.STOPPING)
            await self._end(running)
        running.ready.clear()
        self._change(running, State.STOPPED)
        running.stopped.set()

    def _failure(self, running: Running, reason: str) -> PartFailedError:
        if not running.part.argv:
            return PartFailedError(f"{running.part.name} is not ready: {reason}")
        log = self._logs / f"{running.part.name}.log"
        lines = processes.last_lines(log, running.log_offset)
        return PartFailedError(f"{running.part.name} does not start: {reason}; its log is {log}", lines)

    def _last_error(self, running: Running, reason: str) -> str:
        """How a part ended, and what its log says of it; one that was killed had no time to say anything."""
        if not running.part.argv or reason == _ending(-signal.SIGKILL):
            return reason
        lines = processes.last_lines(self._logs / f"{running.part.name}.log", running.log_offset, _LAST_LINES, _LAST_BYTES)
        said = last_error(lines, running.part.name)
        return f"{reason}: {said}" if said else reason

    def _change(self, running: Running, state: State, detail: str = "") -> None:
        running.state = state
        running.detail = detail
        self._on_event(Event(running.part.name, state, time.monotonic() - self._began, detail))

    def _ready_file(self, part: Part) -> Path:
        return self._run / f"{part.name}.ready"

    def _signal(self, running: Running, number: signal.Signals) -> None:
        if running.process is not None and running.process.returncode is None:
            with suppress(ProcessLookupError):
                running.process.send_signal(number)

    def _kill_group(self, running: Running) -> None:
        if running.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(running.pid, signal.SIGKILL)

    def _reap(self) -> None:
        if not self._spawning:
            processes.reap_adopted(running.pid for running in self.parts.values() if running.pid is not None)


def _handed_over(running: Running) -> dict[str, str]:
    """The variables that tell a part its sockets; these are opened the first time.

    Raises
    ------
    PortTakenError
        Somebody else listens there by now.
    """
    for listening in running.part.listens:
        if listening.variable not in running.sockets:
            try:
                running.sockets[listening.variable] = [_listen(listening) for _ in range(listening.count)]
            except OSError as error:
                address = f"{listening.host}:{listening.port}"
                raise PortTakenError(f"{running.part.name} cannot listen on {address}: {error.strerror}; choose another port") from error
    return {variable: json.dumps([each.fileno() for each in sockets]) for variable, sockets in running.sockets.items()}


def _listen(listening: Listening) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        listening.host, listening.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listening.count > 1:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(address)
        opened.listen(_BACKLOG)
    except OSError:
        opened.close()
        raise
    return opened


def _ending(code: int) -> str:
    if code >= 0:
        return f"it ended with exit code {code}"
    return f"it was ended by {signal.Signals(-code).name}"
