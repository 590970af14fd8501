"""Copies of artifacts on one machine, one file each, named by digest and verified each time they are about to be loaded."""

import hashlib
import logging
from pathlib import Path

from libs.artifacts.store import ArtifactStore, in_thread, os_errors_of

log = logging.getLogger(__name__)


class ArtifactCache:
    """A directory of artifacts that were fetched from a store.

    A copy whose content is not what its name says (a flipped bit, a torn write) is dropped and fetched again.
    """

    def __init__(self, directory: Path, store: ArtifactStore) -> None:
        self._directory = directory
        self._store = store

    async def ensure(self, sha256: str) -> Path:
        """Return the path of a copy that has just been verified.

        Raises
        ------
        ArtifactNotFoundError, ArtifactCorruptError
            The store does not have the content, or has it damaged.
        ArtifactStoreUnavailableError
            The store or the directory cannot be used now.
        """
        path = self._directory / sha256
        found = await in_thread(_digest, path)
        if found == sha256:
            return path
        if found is not None:
            log.error("the cached artifact %s is damaged: its content has the SHA-256 %s; it is fetched again", path, found)
        with os_errors_of(f"the directory {self._directory}"):
            self._directory.mkdir(parents=True, exist_ok=True)
        await self._store.fetch_to(sha256, path)
        return path


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None when there is none."""
    try:
        with os_errors_of(f"the directory {path.parent}"), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
