"""Artifacts in a directory: one machine, or a file system that all machines share."""

import os
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

from libs.artifacts.store import (
    ArtifactNotFoundError,
    StoredArtifact,
    in_thread,
    key_of,
    os_errors_of,
    read_verified,
    receive,
    sync,
    write_all,
    write_verified,
)

_ABANDONED_AFTER_S = 24 * 3600
"""No upload takes a day; a partial file that old was left by a process that was killed."""


class DirectoryStore:
    """Artifacts as files ``<root>/sha256/ab/cdef…``.

    An upload is written to ``<root>/incoming``, flushed to the disk, and then renamed, which the file system does at once: a reader
    sees the whole artifact or none, also after a power cut. Uploads of equal content at the same time each rename their own file; the
    last one stays.

    Parameters
    ----------
    root
        Created with the first upload. ``incoming`` must be on the same file system as the rest.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._incoming = self._root / "incoming"
        self._place = f"the artifact directory {self._root}"

    async def put(self, chunks: AsyncIterable[bytes], *, expected_sha256: str | None = None, max_bytes: int) -> StoredArtifact:
        part = self._incoming / uuid.uuid4().hex
        file = await in_thread(self._create, part)
        try:
            with file:
                sha256, size_bytes = await receive(
                    chunks,
                    lambda block: write_all(file, block, self._place),
                    expected_sha256=expected_sha256,
                    max_bytes=max_bytes,
                )
                await in_thread(sync, file, self._place)
            await in_thread(self._publish, part, sha256)
        finally:
            part.unlink(missing_ok=True)
        return StoredArtifact(sha256, size_bytes, self._path(sha256).as_uri())

    def open(self, sha256: str) -> AsyncIterator[bytes]:
        path = self._path(sha256)
        return read_verified(lambda: self._open_file(path, sha256), sha256)

    async def stat(self, sha256: str) -> StoredArtifact:
        path = self._path(sha256)
        return StoredArtifact(sha256, await in_thread(self._size, path, sha256), path.as_uri())

    async def exists(self, sha256: str) -> bool:
        return await in_thread(self._path(sha256).is_file)

    async def fetch_to(self, sha256: str, path: Path) -> None:
        await write_verified(self.open(sha256), path)

    async def delete(self, sha256: str) -> None:
        await in_thread(self._remove, self._path(sha256))

    def _path(self, sha256: str) -> Path:
        return self._root / key_of(sha256)

    def _open_file(self, path: Path, sha256: str) -> FileIO:
        try:
            with os_errors_of(self._place):
                return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ArtifactNotFoundError(f"There is no artifact {sha256}.") from None

    def _size(self, path: Path, sha256: str) -> int:
        with self._open_file(path, sha256) as file:
            return os.fstat(file.fileno()).st_size

    def _create(self, part: Path) -> FileIO:
        with os_errors_of(self._place):
            self._incoming.mkdir(parents=True, exist_ok=True)
            self._sweep()
            return part.open("xb", buffering=0)

    def _sweep(self) -> None:
        oldest = time.time() - _ABANDONED_AFTER_S
        for part in self._incoming.iterdir():
            with suppress(FileNotFoundError):
                if part.stat().st_mtime < oldest:
                    part.unlink()

    def _publish(self, part: Path, sha256: str) -> None:
        path = self._path(sha256)
        with os_errors_of(self._place):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.chmod(0o444)
            part.replace(path)
            for directory in (path.parent, path.parent.parent, self._root):
                _sync_directory(directory)

    def _remove(self, path: Path) -> None:
        with os_errors_of(self._place):
            path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
