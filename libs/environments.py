"""Environments for models: a Python with exactly the packages of one lock, named by the lock, shared by every version with an equal one.

The builder makes locks; whoever runs a model calls ``EnvironmentCache.ensure`` and gets a Python. Nothing of an upload or of a package runs
while an environment is made: wheels only, each checked against its hash. There is no Millrace in an environment.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uv

from libs.environment_files import differing_from_manifest, differing_from_records, write_manifest
from libs.errors import ConfigurationError, DeadlineExceededError, InvalidArgumentError, MillraceError, TransientError
from schemas.environment import EnvironmentLock

log = logging.getLogger(__name__)

ENVIRONMENT_FORMAT = 1
"""Part of every environment's id; raised when the same lock shall give another environment than before."""

INSTALL_TIMEOUT_S = 600.0
"""Longest installation: a few GB of wheels over a slow line."""

_LOCK_POLL_S = 0.05
_MOST_COMPILERS = 4
_EVIDENCE_CHARACTERS = 16_000
_LONGEST_LOCK_CHARACTERS = 524_288
"""What the contract of the lock accepts: the hashes of about 5 000 wheels."""

_PIN = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?==[A-Za-z0-9.!+_-]+")
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
_ANSWERS = ("No solution found", "HTTP status client error")
"""The index was reached, and it said no."""

_NOT_NOW = ("client error (408 ", "client error (429 ")
"""The index was reached, and it said: later."""

_UNREACHABLE = ("Failed to fetch", "error sending request", "Request failed", "timed out", "dns error", "Connection re")


class ImpossibleEnvironmentError(MillraceError):
    """No environment can be made from this; trying again does not help.

    Attributes
    ----------
    evidence
        The installer's own words.
    """

    def __init__(self, message: str, evidence: str = "") -> None:
        super().__init__(message)
        self.evidence = evidence[:_EVIDENCE_CHARACTERS]


class EnvironmentUnavailableError(TransientError):
    """The package index cannot be reached or is too busy, or the disk is full."""


@dataclass(frozen=True, slots=True)
class UvOutcome:
    """What a finished uv left: its exit status and its two outputs."""

    status: int
    stdout: str
    stderr: str


def make_lock(lock: str, *, python: str | None = None, platform: str | None = None) -> EnvironmentLock:
    """Name a set of pinned, hashed packages.

    Parameters
    ----------
    lock
        Lines ``name==version --hash=sha256:…`` as ``uv pip compile --generate-hashes`` writes them; order and comments do not matter.
    python, platform
        For which the packages were chosen; by default those of this process.

    Raises
    ------
    InvalidArgumentError
        A line is neither a pin nor a hash, or a pin has no hash.
    """
    python, platform = python or this_python(), platform or this_platform()
    text = _canonical(lock)
    if len(text) > _LONGEST_LOCK_CHARACTERS:
        raise InvalidArgumentError(f"A lock of {len(text)} characters is longer than the {_LONGEST_LOCK_CHARACTERS} that events carry.")
    content = json.dumps([ENVIRONMENT_FORMAT, python, platform, text], separators=(",", ":"))
    return EnvironmentLock(environment_id=hashlib.sha256(content.encode()).hexdigest()[:32], python=python, platform=platform, lock=text)


def this_python() -> str:
    """Minor version of the running interpreter, such as ``3.11``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def this_platform() -> str:
    """Platform of the running interpreter, such as ``x86_64-linux`` or ``arm64-darwin``; locks are made for one platform."""
    machine, system = platform.machine().lower(), platform.system().lower()
    is_musl = system == "linux" and platform.libc_ver()[0] != "glibc"
    return f"{machine}-{system}-musl" if is_musl else f"{machine}-{system}"


def find_uv() -> Path:
    """The executable of the ``uv`` package; raises ``ConfigurationError``."""
    try:
        return Path(uv.find_uv_bin())
    except FileNotFoundError as error:
        raise ConfigurationError("The uv executable is missing; install the package uv.") from error


async def run_uv(executable: Path, *arguments: str, timeout_s: float) -> UvOutcome:
    """Run uv to its end in an empty directory, so that no project near by changes what it does; index settings are the user's own.

    Raises
    ------
    DeadlineExceededError
        It did not end in time and was killed, with everything it started.
    EnvironmentUnavailableError
        It could not reach the package index, the index was too busy, or there was no space left.
    """
    with tempfile.TemporaryDirectory() as directory:
        process = await _start(
            executable,
            *arguments,
            "--no-python-downloads",
            "--no-progress",
            "--color=never",
            cwd=directory,
            output=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(timeout_s):
                stdout, stderr = await process.communicate()
        except TimeoutError as error:
            raise DeadlineExceededError(f"uv {' '.join(arguments[:2])} did not end within {timeout_s:g} s.") from error
        finally:
            await _kill_session(process)
    outcome = UvOutcome(process.returncode or 0, stdout.decode(errors="replace"), stderr.decode(errors="replace"))
    _raise_if_transient(outcome)
    return outcome


async def base_python(version: str, uv: Path) -> Path:
    """An interpreter outside any virtual environment: the platform's own when the minor version is equal, else one that uv finds.

    Raises
    ------
    ImpossibleEnvironmentError
        There is none on this machine.
    """
    own = Path(sys.base_prefix) / "bin" / f"python{version}"
    if version == this_python() and own.exists():
        return own
    outcome = await run_uv(uv, "python", "find", "--no-project", "--system", version, timeout_s=30.0)
    if outcome.status:
        raise ImpossibleEnvironmentError(f"There is no Python {version} on this machine.", outcome.stderr)
    return Path(outcome.stdout.strip())


class EnvironmentCache:
    """Environments on this machine, each in ``<root>/<environment id>``.

    An environment is built beside its place and renamed into it, so what is there is complete, also after a crash in the middle. At each
    use it is compared with what was installed, and installed again where it differs. One process builds, others that want the same wait for
    it. Packages are hard links into uv's cache where the file system allows it: a second environment with the same packages takes almost no
    space, and whoever runs a model in one must not let it write there.

    Parameters
    ----------
    root
        Directory of the environments.
    uv
        The executable; by default that of the ``uv`` package.
    timeout_s
        Longest installation, and longest wait for another process that installs the same.
    on_damaged
        Called for each environment that was found damaged, when another has taken its place.
    """

    def __init__(
        self,
        root: Path,
        *,
        uv: Path | None = None,
        timeout_s: float = INSTALL_TIMEOUT_S,
        on_damaged: Callable[[], None] = lambda: None,
    ) -> None:
        self._root = root.absolute()
        self._uv = uv or find_uv()
        self._timeout_s = timeout_s
        self._on_damaged = on_damaged

    def python_of(self, lock: EnvironmentLock) -> Path:
        """Where the Python of the environment is or will be."""
        return self._root / lock.environment_id / "bin" / "python"

    def holds(self, lock: EnvironmentLock) -> bool:
        """Whether the environment is there, complete."""
        return self.python_of(lock).parent.is_dir()

    async def ensure(self, lock: EnvironmentLock) -> Path:
        """The Python of the environment, which is made if it is not there yet (about 2 s from a warm package cache).

        Raises
        ------
        ImpossibleEnvironmentError
            It cannot be made here: another platform, no such Python, a package that is gone or has another hash.
        EnvironmentUnavailableError
            The package index cannot be reached or is too busy, the disk is full, or another process takes too long to make it.
        DeadlineExceededError
            The installation took too long.
        """
        if not await self._is_intact(lock):
            _check(lock)
            async with self._exclusively(lock):
                if not await self._is_intact(lock):
                    await self._build(lock)
        return self.python_of(lock)

    async def _is_intact(self, lock: EnvironmentLock) -> bool:
        """Whether the environment is there, and its files are those that were installed."""
        return self.holds(lock) and await asyncio.to_thread(self._verify, self._root / lock.environment_id)

    def _verify(self, environment: Path) -> bool:
        differing = differing_from_manifest(environment)
        if differing is None:  # made before there were manifests
            differing = differing_from_records(environment)
            if not differing:
                with contextlib.suppress(OSError):
                    write_manifest(environment)
        if differing:
            log.error(
                "the environment %s is damaged: %d of its files are not those that were installed, such as %s; it is installed again",
                *(environment, len(differing), differing[0]),
            )
        return not differing

    async def _build(self, lock: EnvironmentLock) -> None:
        started = time.monotonic()
        staging = self._root / ".building" / f"{lock.environment_id}.{uuid.uuid4().hex}"
        await asyncio.to_thread(self._prepare, lock)
        try:
            python = await base_python(lock.python, self._uv)
            await self._uv_or_raise(lock, "venv", "--no-project", "--relocatable", "--python", str(python), "--quiet", str(staging))
            requirements = staging / "requirements.lock"
            requirements.write_text(lock.lock)
            await self._install(lock, staging, requirements, "--link-mode", "hardlink")
            if await asyncio.to_thread(differing_from_records, staging):
                # A file in uv's cache is damaged: it is the same file as in the environments that have it.
                log.warning("packages in uv's cache are damaged; those of environment %s are fetched again", lock.environment_id)
                await self._install(lock, staging, requirements, "--no-cache", "--reinstall", "--link-mode", "copy")
                if damaged := await asyncio.to_thread(differing_from_records, staging):
                    raise EnvironmentUnavailableError(
                        f"The environment {lock.environment_id} was installed, but {damaged[0]} is not what its package says."
                    )
            if self.holds(lock):  # damaged, and so may be the bytecode that it shares
                await asyncio.to_thread(shutil.rmtree, self._root / ".bytecode", ignore_errors=True)
            await self._compile(python, staging / "lib")
            await asyncio.to_thread(write_manifest, staging)
            if self.holds(lock):
                (self._root / lock.environment_id).rename(staging.with_name(f"{staging.name}.damaged"))
                self._on_damaged()
            staging.rename(self._root / lock.environment_id)
            await asyncio.to_thread(shutil.rmtree, staging.with_name(f"{staging.name}.damaged"), ignore_errors=True)
        finally:
            await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
        log.info("built environment %s in %.2f s", lock.environment_id, time.monotonic() - started)

    async def _install(self, lock: EnvironmentLock, staging: Path, requirements: Path, *options: str) -> None:
        await self._uv_or_raise(
            lock,
            *("pip", "sync", str(requirements), "--python", str(staging / "bin" / "python")),
            *("--require-hashes", "--only-binary", ":all:", "--quiet", *options),
        )

    async def _compile(self, python: Path, tree: Path) -> None:
        """Compile the packages, but not their tests, to bytecode (see ``libs.bytecode``).

        Measured for scikit-learn on two cores: 1.7 s the first time, 0.1 s when another environment had the same packages; every start of a
        model then imports in 1.1 s instead of 2.8 s. An environment works without bytecode, so failing to compile is no error.
        """
        count = min(os.cpu_count() or 1, _MOST_COMPILERS)
        program = str(Path(__file__).with_name("bytecode.py"))
        arguments = ("-I", "-S", program, str(tree), str(self._root / ".bytecode"))
        try:
            async with asyncio.timeout(self._timeout_s), asyncio.TaskGroup() as group:
                for index in range(count):
                    group.create_task(_run_silently(python, *arguments, str(index), str(count)))
        except TimeoutError:
            log.warning("compiling %s took over %g s; it stays partly uncompiled", tree, self._timeout_s)

    def _prepare(self, lock: EnvironmentLock) -> None:
        """Remove what a killed process left of this environment; only one process at a time is here."""
        building = self._root / ".building"
        building.mkdir(parents=True, exist_ok=True)
        for abandoned in building.glob(f"{lock.environment_id}.*"):
            shutil.rmtree(abandoned, ignore_errors=True)

    async def _uv_or_raise(self, lock: EnvironmentLock, *arguments: str) -> None:
        outcome = await run_uv(self._uv, *arguments, timeout_s=self._timeout_s)
        if outcome.status:
            raise ImpossibleEnvironmentError(
                f"The environment {lock.environment_id} cannot be installed: {first_cause(outcome.stderr)}", outcome.stderr
            )

    @asynccontextmanager
    async def _exclusively(self, lock: EnvironmentLock) -> AsyncIterator[None]:
        """Keep other processes and tasks out; a process that dies lets go."""
        locks = self._root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self._timeout_s
        with (locks / lock.environment_id).open("w") as file:
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise EnvironmentUnavailableError(
                        f"Another process has been making the environment {lock.environment_id} for {self._timeout_s:g} s."
                    )
                await asyncio.sleep(_LOCK_POLL_S)
            yield


def first_cause(stderr: str) -> str:
    """uv's explanation as one line: the causes if it names any, else its error."""
    text = " ".join(line.strip() for line in stderr.split("\n\n")[0].splitlines())
    causes = [part.strip() for part in re.split(r"\bcause: ", text)[1:]]
    explanation = ": ".join(causes) if causes else text.removeprefix("error: ")
    return explanation if len(explanation) <= 500 else f"{explanation[:497]}..."


def _check(lock: EnvironmentLock) -> None:
    """Refuse a lock that is not what its id says (its id is a path and a promise) or is for another platform."""
    if make_lock(lock.lock, python=lock.python, platform=lock.platform).environment_id != lock.environment_id:
        raise ImpossibleEnvironmentError(f"The lock of environment {lock.environment_id} does not have that id.")
    if lock.platform != this_platform():
        raise ImpossibleEnvironmentError(
            f"The environment {lock.environment_id} is for {lock.platform}, and this machine is {this_platform()}."
        )


def _canonical(lock: str) -> str:
    """The pins in order of name, each with its hashes in order; nothing else may be in a lock."""
    pins: dict[str, set[str]] = {}
    pin = ""
    for word in re.sub(r"(^|\s)#.*", "", lock, flags=re.MULTILINE).replace("\\\n", " ").split():
        if _PIN.fullmatch(word):
            pin = word
            pins.setdefault(pin, set())
        elif _HASH.fullmatch(word) and pin:
            pins[pin].add(word)
        else:
            raise InvalidArgumentError(f"{word[:80]!r} in a lock is neither name==version nor a SHA-256 hash.")
    if bare := [pin for pin, hashes in pins.items() if not hashes]:
        raise InvalidArgumentError(f"{bare[0]!r} in a lock has no hash.")
    return "".join(f"{' '.join([pin, *sorted(hashes)])}\n" for pin, hashes in sorted(pins.items()))


def _raise_if_transient(outcome: UvOutcome) -> None:
    if not outcome.status:
        return
    if "No space left on device" in outcome.stderr or "Disk quota exceeded" in outcome.stderr:
        raise EnvironmentUnavailableError("There is no space left on the disk to install packages.")
    if any(sign in outcome.stderr for sign in _NOT_NOW):
        raise EnvironmentUnavailableError(f"The package index is too busy: {first_cause(outcome.stderr)}")
    if any(sign in outcome.stderr for sign in _ANSWERS):
        return
    if any(sign in outcome.stderr for sign in _UNREACHABLE):
        raise EnvironmentUnavailableError(f"The package index cannot be reached: {first_cause(outcome.stderr)}")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _run_silently(program: Path, *arguments: str) -> None:
    process = await _start(program, *arguments, output=asyncio.subprocess.DEVNULL)
    try:
        await process.wait()
    finally:
        await _kill_session(process)


async def _start(program: Path, *arguments: str, output: int, cwd: str | None = None) -> asyncio.subprocess.Process:
    """Start a process in a session of its own; when cancelled meanwhile, it is killed as a whole, which asyncio alone does not do."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            program,
            *arguments,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await _kill_session(await starting)
        raise


async def _kill_session(process: asyncio.subprocess.Process) -> None:
    """End the process if it still runs, with all it started, and wait for it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
