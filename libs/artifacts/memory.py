"""Artifacts in this process's memory, for tests."""

import io
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

from libs.artifacts.store import (
    ArtifactNotFoundError,
    BlockReader,
    StoredArtifact,
    key_of,
    read_verified,
    receive,
    write_verified,
)


class MemoryStore:
    """A store that forgets with its process; it behaves as the others and holds every artifact whole.

    Attributes
    ----------
    contents
        Content by key; a test may damage it.
    """

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}

    async def put(self, chunks: AsyncIterable[bytes], *, expected_sha256: str | None = None, max_bytes: int) -> StoredArtifact:
        content = io.BytesIO()
        sha256, size_bytes = await receive(chunks, content.write, expected_sha256=expected_sha256, max_bytes=max_bytes)
        self.contents[key_of(sha256)] = content.getvalue()
        return StoredArtifact(sha256, size_bytes, _uri(sha256))

    def open(self, sha256: str) -> AsyncIterator[bytes]:
        key = key_of(sha256)
        return read_verified(lambda: self._open(key, sha256), sha256)

    async def stat(self, sha256: str) -> StoredArtifact:
        if not await self.exists(sha256):
            raise _not_found(sha256)
        return StoredArtifact(sha256, len(self.contents[key_of(sha256)]), _uri(sha256))

    async def exists(self, sha256: str) -> bool:
        return key_of(sha256) in self.contents

    async def fetch_to(self, sha256: str, path: Path) -> None:
        await write_verified(self.open(sha256), path)

    async def delete(self, sha256: str) -> None:
        self.contents.pop(key_of(sha256), None)

    def _open(self, key: str, sha256: str) -> BlockReader:
        if key not in self.contents:
            raise _not_found(sha256)
        return io.BytesIO(self.contents[key])


def _uri(sha256: str) -> str:
    return f"memory:///{key_of(sha256)}"


def _not_found(sha256: str) -> ArtifactNotFoundError:
    return ArtifactNotFoundError(f"There is no artifact {sha256}.")
