"""Starts a runner, hears whether it became ready, and makes sure that it ends."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from libs.errors import ConfigurationError
from libs.inference.client import RunnerClient
from libs.inference.errors import RunnerStartError, printable
from libs.runner.cage import CageSpec
from schemas.inference import DeclaredSignature, Signature

RUNNER_DIRECTORY = Path(__file__).resolve().parents[1] / "runner"
MAX_SOCKET_PATH_BYTES = 100
"""The kernel takes 107; leave room for what a caller appends."""

HUNG_STATUS = 75
"""What a runner exits with whose model hung (``libs/runner/server.py``)."""

_MAX_READY_LINE_BYTES = 8 * 1024 * 1024
_LOG_TAIL_BYTES = 4096
_BACKLOG = 128


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """What a runner is started with.

    Attributes
    ----------
    python
        Interpreter of the model's environment.
    artifact, format
        The model's file and how it is read (``sklearn``, ``onnx``).
    runner_id, token
        Who it is, and what it asks of its clients.
    address
        Where it shall listen: ``unix:/path`` or ``tcp:127.0.0.1:0`` (port 0: any free one).
    scratch
        A directory of its own; the only one it may write, its working directory and its home.
    log
        File that what the model prints is appended to.
    cage
        What it may use.
    threads
        Threads of the numeric libraries.
    start_timeout_s
        Longest time from the start of the process to the loaded model, in seconds.
    predict_timeout_s
        A model that is busy with one request for longer hangs, and the runner ends itself; None: it never does.
    signature
        What is known of the signature: declared by the uploader, or found in the trial; None: nothing.
    files
        The folder that the model's file is in, when it is one of several; the model may read them all.
    code
        A folder of modules that the model may import, behind all others.
    """

    python: Path
    artifact: Path
    format: str
    runner_id: str
    token: str = field(repr=False)
    address: str
    scratch: Path
    log: Path
    cage: CageSpec = CageSpec()  # noqa: RUF009 (frozen)
    threads: int = 1
    start_timeout_s: float = 60.0
    predict_timeout_s: float | None = None
    signature: Signature | DeclaredSignature | None = None
    files: Path | None = None
    code: Path | None = None


@dataclass(frozen=True, slots=True)
class ReadyReport:
    """What a runner says once its model is loaded. ``cage`` maps each layer to ``active`` or the reason why not.

    ``sample`` are rows that its model may take, as the member ``inputs`` of a V1 body; the model's code could have written them.
    """

    signature: Signature
    load_s: float
    cage: dict[str, str]
    python: str
    warnings: tuple[str, ...]
    sample: Any = None


@dataclass(frozen=True, slots=True)
class RunnerExit:
    """How a runner ended: ``code`` is the exit status, negative for the number of a signal."""

    code: int

    @property
    def description(self) -> str:
        if self.code == HUNG_STATUS:
            return "ended itself: its model was busy with one request for too long"
        if self.code >= 0:
            return f"exited with status {self.code}"
        name = signal.Signals(-self.code).name if -self.code in signal.Signals.__members__.values() else str(-self.code)
        meanings = {"SIGXCPU": "it used more CPU time than allowed", "SIGSEGV": "it crashed", "SIGABRT": "it crashed or ran out of memory"}
        meaning = meanings.get(name)
        return f"was ended by {name}" + (f": {meaning}" if meaning else "")


class RunnerProcess:
    """A running runner; make one with :meth:`start`.

    It never outlives its supervisor: the kernel kills it when the *thread* that started it ends (so start it from a thread that lives as
    long as the process), and it ends itself when the pipe that is its standard input is closed.
    """

    def __init__(self, spec: RunnerSpec, address: str, process: subprocess.Popen[bytes]) -> None:
        self.spec = spec
        self.address = address
        self.ready: ReadyReport | None = None
        self._process = process
        self._exited: asyncio.Future[RunnerExit] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        threading.Thread(target=_report_exit, args=(process, loop, self._exited), name="runner-exit", daemon=True).start()

    @classmethod
    async def start(cls, spec: RunnerSpec) -> "RunnerProcess":
        """Start a runner and wait until its model is loaded.

        Raises
        ------
        RunnerStartError
            It did not become ready; its process is gone by then.
        ConfigurationError
            The address cannot be listened on.
        """
        listener, address = _listen(spec.address)
        with listener:
            ready_receiver, ready_sender = os.pipe()
            try:
                process = _spawn(spec, listener, ready_sender)
            except OSError as error:
                os.close(ready_receiver)
                raise RunnerStartError(f"the runner's interpreter {spec.python.name} cannot be started: {error}", "not_started") from error
            finally:
                os.close(ready_sender)
        runner = cls(spec, address, process)
        try:
            runner.ready = await runner._wait_ready(ready_receiver)
        except BaseException:
            runner.kill()
            await asyncio.shield(runner._exited)
            runner._clean_up()
            raise
        return runner

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return not self._exited.done()

    @property
    def signature(self) -> Signature:
        if self.ready is None:
            raise RunnerStartError("the runner is not ready", "not_started")
        return self.ready.signature

    def client(self) -> RunnerClient:
        """Return a new client of this runner."""
        return RunnerClient(self.address, self.spec.token)

    async def wait_exit(self) -> RunnerExit:
        """Wait until the process has ended, by itself or by us."""
        return await asyncio.shield(self._exited)

    async def stop(self, grace_s: float = 5.0) -> RunnerExit:
        """Let it finish what it was asked, for ``grace_s`` seconds at most, then kill it with all it started."""
        if not self._exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await asyncio.shield(self._exited)
        self.kill()
        status = await asyncio.shield(self._exited)
        self._clean_up()
        return status

    def kill(self) -> None:
        """Kill the process group at once."""
        if not self._exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def log_tail(self) -> str:
        """Return the last lines that the model printed."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(0, self.spec.log.stat().st_size - _LOG_TAIL_BYTES))
                return log.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def _clean_up(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        if self.address.startswith("unix:"):
            Path(self.address.removeprefix("unix:")).unlink(missing_ok=True)

    async def _wait_ready(self, receiver: int) -> ReadyReport:
        try:
            async with asyncio.timeout(self.spec.start_timeout_s):
                line = await _read_line(receiver)
                if not line:
                    await asyncio.shield(self._exited)
        except TimeoutError as error:
            raise RunnerStartError(f"the model did not load within {self.spec.start_timeout_s:g} s", "timeout") from error
        if not line:
            raise RunnerStartError(self._why_exited(), "exited")
        return _parse_ready(line)

    def _why_exited(self) -> str:
        last = [line for line in self.log_tail().splitlines() if line.strip()][-1:]
        said = f"; its last words: {printable(last[0].strip(), 300)}" if last else ""
        return f"the runner {self._exited.result().description} while it loaded the artifact{said}"


def _listen(address: str) -> tuple[socket.socket, str]:
    """Return the listening socket, and the address with the port that was given."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and len(os.fsencode(rest)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(f"the socket path {rest} is longer than {MAX_SOCKET_PATH_BYTES} bytes")
    listener = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if kind == "unix":
            Path(rest).unlink(missing_ok=True)
            listener.bind(rest)
            os.chmod(rest, 0o600)
        else:
            host, _, port = rest.rpartition(":")
            listener.bind((host, int(port)))
            rest = "{}:{}".format(*listener.getsockname())
        listener.listen(_BACKLOG)
    except (OSError, ValueError) as error:
        listener.close()
        raise ConfigurationError(f"a runner cannot listen on {address}: {error}") from error
    return listener, f"{kind}:{rest}"


def _spawn(spec: RunnerSpec, listener: socket.socket, ready_sender: int) -> subprocess.Popen[bytes]:
    # The interpreter that the environment's link leads to, and without `site`: nothing that packages brought (pyvenv.cfg, *.pth,
    # sitecustomize) is read before the cage is closed.
    command = [os.path.realpath(spec.python), "-I", "-S", "-B", str(RUNNER_DIRECTORY), "--python", str(spec.python.absolute())]
    command += ["--fd", str(listener.fileno()), "--ready-fd", str(ready_sender)]
    command += ["--artifact", str(spec.artifact.resolve()), "--format", spec.format]
    command += ["--scratch", str(spec.scratch.resolve()), "--cage", spec.cage.to_json()]
    for option, folder in (("--files", spec.files), ("--code", spec.code)):
        if folder is not None:
            command += [option, str(folder.resolve())]
    if spec.predict_timeout_s is not None:
        command += ["--predict-timeout-s", str(spec.predict_timeout_s)]
    with spec.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(listener.fileno(), ready_sender),
            env=_environment(spec),
            cwd=spec.scratch,
            start_new_session=True,
        )
    assert process.stdin is not None  # noqa: S101 (asked for above; for the type checker)
    with contextlib.suppress(BrokenPipeError):
        signature = None if spec.signature is None else spec.signature.model_dump(mode="json")
        process.stdin.write(json.dumps({"token": spec.token, "signature": signature}).encode() + b"\n")
        process.stdin.flush()
    return process


def _environment(spec: RunnerSpec) -> dict[str, str]:
    """Return all that a runner sees of our environment: nothing but the language and what keeps libraries modest."""
    scratch, threads = str(spec.scratch.resolve()), str(spec.threads)
    return {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": scratch,
        "TMPDIR": scratch,
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NUMEXPR_NUM_THREADS": threads,
        "VECLIB_MAXIMUM_THREADS": threads,
        "LOKY_MAX_CPU_COUNT": threads,
        "JOBLIB_MULTIPROCESSING": "0",
    }


def _report_exit(process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop, exited: "asyncio.Future[RunnerExit]") -> None:
    code = process.wait()
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_settle, exited, RunnerExit(code))


def _settle(future: "asyncio.Future[RunnerExit]", value: RunnerExit) -> None:
    if not future.done():
        future.set_result(value)


async def _read_line(descriptor: int) -> bytes:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_MAX_READY_LINE_BYTES)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb"))
    try:
        return await reader.readline()
    except ValueError:
        return b""
    finally:
        transport.close()


def _parse_ready(line: bytes) -> ReadyReport:
    """Read the ready line; the model's code could have written it, so nothing in it is taken for granted."""
    try:
        document: dict[str, Any] = json.loads(line)
        if document.get("ready") is not True:
            error = document["error"]
            module = error.get("module")
            raise RunnerStartError(printable(error["message"]), printable(error["kind"]), None if module is None else printable(module))
        return ReadyReport(
            signature=Signature.model_validate(document["signature"]),
            load_s=float(document["load_s"]),
            cage={printable(layer): printable(state) for layer, state in document["cage"].items()},
            python=printable(document["python"]),
            warnings=tuple(printable(text) for text in document["warnings"]),
            sample=document.get("sample"),
        )
    except (ValueError, ValidationError, KeyError, TypeError, AttributeError) as error:
        raise RunnerStartError(f"the runner's ready line cannot be read: {printable(error)}", "exited") from error
