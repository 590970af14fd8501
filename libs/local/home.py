"""The home: the directory that holds the state of one platform on one machine.

::

    run/            lock, platform.json, ready files, sockets        kafka/         the log
    logs/           one file per part                                artifacts/     what was uploaded
    secrets/        keys, 0700                                       environments/  what the models run in
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libs.local.errors import AlreadyRunningError, HomeUnusableError

MINIMUM_FREE_BYTES = 2**30


@dataclass(frozen=True)
class Home:
    """Paths below one home; ``root`` is absolute."""

    root: Path

    @classmethod
    def at(cls, path: Path) -> "Home":
        """The home at a path, which need not exist yet."""
        return cls(path.expanduser().resolve())

    @property
    def instance(self) -> str:
        """Mark of this platform's processes; the same at every start, so that leftovers of an earlier one are found."""
        return hashlib.sha256(str(self.root).encode()).hexdigest()[:16]

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def log(self) -> Path:
        """Where a detached supervisor writes."""
        return self.logs / "platform.log"

    @property
    def state_file(self) -> Path:
        return self.run / "platform.json"

    @property
    def runner_key(self) -> Path:
        return self.root / "secrets" / "runner.key"

    def create(self) -> None:
        """Make the directories and the secrets that are not there.

        Raises
        ------
        HomeUnusableError
            When it cannot be written, or the disk has less than ``MINIMUM_FREE_BYTES`` free.
        """
        try:
            for directory in (self.root, self.run, self.logs, self.root / "artifacts", self.root / "environments", self.root / "cache"):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.root / "secrets").mkdir(mode=0o700, exist_ok=True)
            (self.root / "secrets").chmod(0o700)
            _create_secret(self.runner_key)
            probe = self.run / ".writable"
            probe.write_text("")
            probe.unlink()
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise self._unusable(error) from error
        if free < MINIMUM_FREE_BYTES:
            raise HomeUnusableError(
                f"the disk of {self.root} has {free / 2**30:.1f} GiB free, at least {MINIMUM_FREE_BYTES / 2**30:.0f} are needed; "
                "make room or choose another home with --home"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the home; the lock ends with the process, however that ends.

        Raises
        ------
        AlreadyRunningError
            When another process holds it.
        """
        with self._lock_path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                state = self.read_state()
                raise AlreadyRunningError(
                    f"the platform in {self.root} is already running: pid {self.holder() or 'unknown'}, "
                    f"gateway {state.get('gateway', 'not yet listening')}; "
                    "`millrace status` shows it, `millrace down` stops it"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def holder(self) -> int | None:
        """Process id of whoever holds the lock; None when nobody does.

        Raises
        ------
        HomeUnusableError
            When the lock cannot be looked at.
        """
        try:
            with self._lock_path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return int(file.read() or 0) or None
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._unusable(error) from error
        return None

    def read_state(self) -> dict[str, Any]:
        """What the supervisor last wrote about itself; empty when there is nothing."""
        try:
            state: dict[str, Any] = json.loads(self.state_file.read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return state

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace what is known of the running platform; holds no secrets."""
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(json.dumps(state, indent=1))
        partial.replace(self.state_file)

    def _unusable(self, error: OSError) -> HomeUnusableError:
        return HomeUnusableError(f"the home {self.root} cannot be used: {error.strerror}; choose another with --home or MILLRACE_HOME")

    @property
    def _lock_path(self) -> Path:
        return self.run / "lock"


def _create_secret(path: Path) -> None:
    """32 random bytes in hexadecimal, readable by the owner only; an existing one stays."""
    if path.exists():
        return
    partial = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink()
