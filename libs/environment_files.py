"""Whether the files of an environment are those that were installed.

Each wheel lists its files with their hashes (``RECORD``), and its own hash is in the lock: that is compared once, after installing.
What was found right is written down with sizes and times, and these are compared at each use, in about 7 microseconds a file. Content
that changes on the disk without a write (its size and time stay) is not seen by that.
"""

import base64
import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
_ROOTS = ("bin", "lib")


def differing_from_records(environment: Path) -> list[str]:
    """Files, relative to the environment, that are missing or whose content is not what the ``RECORD`` of their wheel says."""
    found = []
    for record in sorted(environment.glob("lib/*/site-packages/*.dist-info/RECORD")):
        packages = record.parent.parent
        with record.open(newline="", encoding="utf-8", errors="replace") as file:
            for name, said, *_ in (row for row in csv.reader(file) if len(row) > 1 and row[1].startswith("sha256=")):
                path = packages / name
                if _digest(path) != said.removeprefix("sha256=").rstrip("="):
                    found.append(os.path.relpath(path, environment))
    return found


def write_manifest(environment: Path) -> None:
    """Write down the files as they are now."""
    (environment / MANIFEST).write_text(json.dumps(dict(_files(environment)), separators=(",", ":")))


def differing_from_manifest(environment: Path) -> list[str] | None:
    """Files that are not as they were written down (new ones do not count); ``None`` when there is no manifest."""
    try:
        known = json.loads((environment / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return [MANIFEST]
    if not isinstance(known, dict):
        return [MANIFEST]
    now = dict(_files(environment))
    return [name for name, state in known.items() if now.get(name) != state]


def _files(environment: Path) -> Iterator[tuple[str, list[int]]]:
    """Each file -> its size and the time of its last change in ns. Links are passed over: the interpreter is not ours."""
    prefix = len(str(environment)) + 1
    waiting = [str(environment / root) for root in _ROOTS]
    while waiting:
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    state = entry.stat(follow_symlinks=False)
                    yield entry.path[prefix:], [state.st_size, state.st_mtime_ns]


def _digest(path: Path) -> str | None:
    """As ``RECORD`` writes it; ``None`` when the file cannot be read."""
    try:
        with path.open("rb") as file:
            return base64.urlsafe_b64encode(hashlib.file_digest(file, "sha256").digest()).decode().rstrip("=")
    except OSError:
        return None
