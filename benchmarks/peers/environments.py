"""Environments for servers and clients that cannot live in ours: built once by uv, kept, and named by what is in them.

They are in ``${XDG_CACHE_HOME:-~/.cache}/millrace/peers/<name>-<hash of the requirements>``.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from uv import find_uv_bin

_INSTALL_TIMEOUT_S = 900


class InstallError(RuntimeError):
    """An environment or a tool cannot be had on this machine; the message has the last that the installer said."""


@dataclass(frozen=True)
class Environment:
    """Packages that belong together, pinned."""

    name: str
    requirements: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        digest = hashlib.sha256("\n".join(sorted(self.requirements)).encode()).hexdigest()[:12]
        return cache() / "peers" / f"{self.name}-{digest}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"


def cache() -> Path:
    """Millrace's directory among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace"


def built(environment: Environment) -> Path:
    """The environment's interpreter, installed first if it is not there; safe when two processes ask at once.

    Raises
    ------
    InstallError
        The packages cannot be installed.
    """
    done = environment.path / ".complete"
    environment.path.parent.mkdir(parents=True, exist_ok=True)
    with environment.path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(environment.path, ignore_errors=True)
            installed([find_uv_bin(), "venv", "--quiet", "--python", sys.executable, str(environment.path)])
            packages = ["--python", str(environment.python), "--compile-bytecode", *environment.requirements]
            installed([find_uv_bin(), "pip", "install", "--quiet", *packages])
            done.touch()
    return environment.python


def installed(command: list[str], folder: Path | None = None, **variables: str) -> None:
    """Run one step of an installation.

    Raises
    ------
    InstallError
        It failed, or took longer than a quarter of an hour.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise InstallError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-2_000:]}")
