"""Several gateway processes on one port: the kernel spreads connections over their sockets (``SO_REUSEPORT``)."""

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from libs.errors import ConfigurationError
from services.gateway.settings import Settings

log = logging.getLogger(__name__)

_POLL_S = 0.02
_RESTART_PAUSE_S = 1.0
_WORKER_OPTION = "--worker"


class Workers:
    """Starts the worker processes, restarts one that ends, and stops them; a component, and all that the first process then does.

    A worker ends when its standard input does, so it never outlives this process.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._processes: dict[int, Process] = {}

    async def start(self) -> None:
        for number in range(self._settings.workers):
            await self._spawn(number)
        for number in range(self._settings.workers):
            await self._until_ready(number)

    async def run(self) -> None:
        await asyncio.gather(*(self._keep(number) for number in range(self._settings.workers)))

    async def stop(self) -> None:
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        await asyncio.gather(*(process.wait() for process in self._processes.values()))

    async def _spawn(self, number: int) -> None:
        _ready_file(self._settings, number).unlink(missing_ok=True)  # one that was killed has left its own
        command = (sys.executable, "-m", "services.gateway", _WORKER_OPTION, str(number))
        handed_over = (*self._settings.http.sockets, *self._settings.grpc.sockets)
        self._processes[number] = await asyncio.create_subprocess_exec(*command, stdin=PIPE, pass_fds=handed_over)

    async def _until_ready(self, number: int) -> None:
        process, ready = self._processes[number], _ready_file(self._settings, number)
        while not ready.exists():
            if process.returncode is not None:
                raise ConfigurationError(f"worker {number} of the gateway ended with {process.returncode} while it started")
            await asyncio.sleep(_POLL_S)

    async def _keep(self, number: int) -> None:
        while True:
            code = await self._processes[number].wait()
            log.error("worker %d of the gateway ended with %s; another one is started", number, code)
            await asyncio.sleep(_RESTART_PAUSE_S)
            await self._spawn(number)


class SupervisorWatch:
    """Ends a worker when the process that started it is gone; a component."""

    async def start(self) -> None: ...

    async def run(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()

    async def stop(self) -> None: ...


def worker_number(arguments: list[str]) -> int | None:
    """The worker that a process is told to be; None: it is the gateway itself."""
    return int(arguments[1]) if len(arguments) == 2 and arguments[0] == _WORKER_OPTION else None


def worker_settings(settings: Settings, number: int) -> Settings:
    """What a worker runs with: its own place to say that it is ready, its own name in consumer groups, its own sockets."""
    process = settings.process.model_copy(update={"ready_file": _ready_file(settings, number)})
    kafka = settings.kafka.model_copy(update={"group_instance": f"{settings.kafka.group_instance}-{number}"})
    http = settings.http.model_copy(update={"sockets": settings.http.sockets[number : number + 1]})
    grpc = settings.grpc.model_copy(update={"sockets": settings.grpc.sockets[number : number + 1]})
    return settings.model_copy(update={"process": process, "kafka": kafka, "http": http, "grpc": grpc})


def _ready_file(settings: Settings, number: int) -> Path:
    return settings.process.home / "run" / f"gateway-worker-{number}.ready"
