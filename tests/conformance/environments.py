"""Python environments of servers and clients that cannot live in ours, built by uv once and kept.

They are in ``${XDG_CACHE_HOME:-~/.cache}/millrace/peers/<name>-<hash of requirements>``.
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


@dataclass(frozen=True)
class Environment:
    """Packages that belong together, pinned."""

    name: str
    requirements: tuple[str, ...]

    @property
    def path(self) -> Path:
        digest = hashlib.sha256("\n".join(sorted(self.requirements)).encode()).hexdigest()[:12]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "millrace" / "peers" / f"{self.name}-{digest}"

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"


MLSERVER = Environment("mlserver", ("mlserver==1.7.1", "mlserver-sklearn==1.7.1", "scikit-learn==1.9.1"))
KSERVE = Environment("kserve", ("kserve==0.21.0", "scikit-learn==1.9.1", "joblib==1.5.3"))
TRITONCLIENT = Environment("tritonclient", ("tritonclient[http,grpc]==2.73.0",))


def built(environment: Environment) -> Path:
    """The environment's Python, installed first if it is not there; safe when two processes ask at once.

    Raises
    ------
    RuntimeError
        The packages cannot be installed; the message has what uv said.
    """
    done = environment.path / ".complete"
    environment.path.parent.mkdir(parents=True, exist_ok=True)
    with environment.path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(environment.path, ignore_errors=True)
            _uv("venv", "--python", sys.executable, str(environment.path))
            _uv("pip", "install", "--python", str(environment.python), "--compile-bytecode", *environment.requirements)
            done.touch()
    return environment.python


def _uv(*arguments: str) -> None:
    done = subprocess.run([find_uv_bin(), *arguments, "--quiet"], capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"uv {arguments[0]} failed: {done.stderr.strip()[-2000:]}")
