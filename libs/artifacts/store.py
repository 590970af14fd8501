"""What an artifact store is, and what every store does the same way.

An artifact is a sequence of bytes whose address is the SHA-256 of its content: what was stored under an address can never change,
storing it twice is storing it once, and whoever reads it can tell whether it is what was asked for.

Bytes move in blocks of ``BLOCK_BYTES`` through worker threads, so an artifact of any size takes a few MiB of memory and never
blocks the loop.
"""

import asyncio
import errno
import hashlib
import os
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Protocol, TypeVar, TypeVarTuple

from libs.errors import (
    InvalidArgumentError,
    MillraceError,
    NotFoundError,
    PayloadTooLargeError,
    TransientError,
)

BLOCK_BYTES = 1 << 20
"""One block: large enough that the hop to a thread (about 0.1 ms) is lost in it, small beside the memory of any process."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


class ArtifactNotFoundError(NotFoundError):
    """No artifact with this digest is stored."""


class ArtifactCorruptError(MillraceError):
    """What is stored under a digest no longer has that digest. Reading again does not help; storing it again does."""


class DigestMismatchError(InvalidArgumentError):
    """What was sent does not have the digest its sender announced; nothing was stored."""


class ArtifactTooLargeError(PayloadTooLargeError):
    """More bytes were sent than are accepted; nothing was stored."""


class ArtifactStoreUnavailableError(TransientError):
    """The store cannot be reached, or has no room left."""


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """An artifact that is completely stored.

    Attributes
    ----------
    sha256
        Digest of the content, 64 lower-case hexadecimal digits; the address.
    size_bytes
        Length of the content.
    uri
        Where the content lies, for people and logs; code uses the digest.
    """

    sha256: str
    size_bytes: int
    uri: str


class ArtifactStore(Protocol):
    """Content-addressed storage of immutable artifacts.

    Every method raises ``InvalidArgumentError`` for a digest that is not 64 lower-case hexadecimal digits and
    ``ArtifactStoreUnavailableError`` when the store cannot be reached. None of them blocks the event loop.
    """

    async def put(self, chunks: AsyncIterable[bytes], *, expected_sha256: str | None = None, max_bytes: int) -> StoredArtifact:
        """Store what ``chunks`` yield; visible only when complete and checked, and equal content is stored once.

        If it fails or is cancelled, nothing of it stays visible.

        Raises
        ------
        DigestMismatchError
            The content does not have ``expected_sha256``.
        ArtifactTooLargeError
            The content is longer than ``max_bytes``.
        """
        ...

    def open(self, sha256: str) -> AsyncIterator[bytes]:
        """Yield the content. The last block is given out only after the digest of the whole was found right.

        Raises
        ------
        ArtifactNotFoundError
            At the first block.
        ArtifactCorruptError
            Instead of the last block; whoever got every block got the right content.
        """
        ...

    async def stat(self, sha256: str) -> StoredArtifact:
        """Describe a stored artifact; raises ``ArtifactNotFoundError``."""
        ...

    async def exists(self, sha256: str) -> bool:
        """Whether the artifact is stored."""
        ...

    async def fetch_to(self, sha256: str, path: Path) -> None:
        """Copy the content to ``path``, which appears (or is replaced) at once and only when it is right; raises as ``open`` does."""
        ...

    async def delete(self, sha256: str) -> None:
        """Remove the artifact; removing what is not stored is no error."""
        ...


class BlockReader(Protocol):
    """What a store's content is read from, in a worker thread."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


def key_of(sha256: str) -> str:
    """Where an artifact lies below the root of its store: ``sha256/ab/cdef…``."""
    if not _SHA256.fullmatch(sha256):
        raise InvalidArgumentError(f"{sha256!r} is not a SHA-256 digest: 64 lower-case hexadecimal digits.")
    return f"sha256/{sha256[:2]}/{sha256[2:]}"


async def in_thread(
    function: Callable[[*_Arguments], _Result],
    *args: *_Arguments,
    on_cancel: Callable[[], None] | None = None,
) -> _Result:
    """Run a blocking function in a worker thread; when cancelled, return only after the thread has ended.

    So the caller may close what the thread was using. ``on_cancel`` can tell the thread to hurry.
    """
    future = asyncio.get_running_loop().run_in_executor(None, partial(function, *args))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if on_cancel:
            on_cancel()
        await asyncio.wait({future})
        future.exception()
        raise


async def receive(
    chunks: AsyncIterable[bytes],
    write: Callable[[bytes], object],
    *,
    expected_sha256: str | None,
    max_bytes: int,
) -> tuple[str, int]:
    """Write what ``chunks`` yield; the SHA-256 and the length of it, once both are found acceptable."""
    if expected_sha256 is not None:
        key_of(expected_sha256)
    digest, size_bytes = hashlib.sha256(), 0

    def digest_and_write(block: bytes) -> None:
        digest.update(block)
        write(block)

    async for block in _blocks(chunks):
        size_bytes += len(block)
        if size_bytes > max_bytes:
            raise ArtifactTooLargeError(f"The artifact is larger than the {max_bytes} bytes accepted.")
        await in_thread(digest_and_write, block)
    sha256 = digest.hexdigest()
    if expected_sha256 not in (None, sha256):
        raise DigestMismatchError(f"The artifact has the SHA-256 {sha256}, not the announced {expected_sha256}.")
    return sha256, size_bytes


async def read_verified(open_reader: Callable[[], BlockReader], sha256: str) -> AsyncIterator[bytes]:
    """Yield the blocks of a reader, the last one only if all of them together have the digest."""
    digest = hashlib.sha256()
    opened: list[BlockReader] = []  # there as soon as it is open: who is cancelled at that moment closes it, too

    def read_block() -> bytes:
        block = opened[0].read(BLOCK_BYTES)
        digest.update(block)
        return block

    try:
        await in_thread(lambda: opened.append(open_reader()))
        held = await in_thread(read_block)
        while block := await in_thread(read_block):
            yield held
            held = block
        if digest.hexdigest() != sha256:
            raise ArtifactCorruptError(f"The stored artifact {sha256} is damaged: its content has the SHA-256 {digest.hexdigest()}.")
        if held:
            yield held
    finally:
        for reader in opened:
            reader.close()


async def write_verified(blocks: AsyncIterator[bytes], path: Path) -> None:
    """Write blocks to a file that appears under its name only when all of them came; what yields them is closed at the end."""
    part = path.with_name(f".{path.name[:64]}.{uuid.uuid4().hex}.part")
    place = f"the directory {path.parent}"
    with os_errors_of(place):
        file = part.open("xb", buffering=0)
    try:
        with file:
            async for block in blocks:
                await in_thread(write_all, file, block, place)
            await in_thread(sync, file, place)
        with os_errors_of(place):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        if isinstance(blocks, AsyncGenerator):
            await blocks.aclose()


def write_all(file: FileIO, block: bytes, place: str) -> None:
    """Write the whole block; ``place`` names the disk in errors."""
    rest = memoryview(block)
    with os_errors_of(place):
        while rest:
            rest = rest[file.write(rest) :]


def sync(file: FileIO, place: str) -> None:
    """Return when the content of the file is on the disk."""
    with os_errors_of(place):
        os.fsync(file.fileno())


@contextmanager
def os_errors_of(place: str) -> Iterator[None]:
    """Turn what a file system refuses into errors that say where and why; a missing file stays ``FileNotFoundError``."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactStoreUnavailableError(f"There is no space left in {place}.") from error
        raise ArtifactStoreUnavailableError(f"Cannot use {place}: {error.strerror or error}.") from error


async def _blocks(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Small chunks joined to blocks of at least ``BLOCK_BYTES``."""
    gathered = bytearray()
    async for chunk in chunks:
        if not gathered and len(chunk) >= BLOCK_BYTES:
            yield chunk
            continue
        gathered += chunk
        if len(gathered) >= BLOCK_BYTES:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)
