"""Copies of artifacts on one machine, named by digest and verified each time they are about to be loaded: files, and folders of files."""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from libs.artifacts.manifest import MAX_MANIFEST_BYTES, File, Manifest
from libs.artifacts.store import ArtifactCorruptError, ArtifactStore, ArtifactStoreUnavailableError, in_thread, os_errors_of
from libs.errors import InvalidArgumentError, MillraceError

log = logging.getLogger(__name__)

FETCHED_AT_ONCE = 8
WAIT_S = 600.0
"""Longest wait for another process that fetches the same set."""

_LOCK_POLL_S = 0.05


class ArtifactCache:
    """A directory of artifacts that were fetched from a store.

    A copy whose content is not what its name says (a flipped bit, a torn write) is dropped and fetched again.

    Parameters
    ----------
    on_damaged
        Called for each copy that was found damaged.
    """

    def __init__(self, directory: Path, store: ArtifactStore, *, on_damaged: Callable[[], None] = lambda: None) -> None:
        self._directory = directory
        self._store = store
        self._on_damaged = on_damaged

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
            self._on_damaged()
        with os_errors_of(f"the directory {self._directory}"):
            self._directory.mkdir(parents=True, exist_ok=True)
        await self._store.fetch_to(sha256, path)
        return path

    async def ensure_set(self, sha256: str) -> Path:
        """Return a folder with exactly the files of the manifest that has this digest, each of them just verified.

        A folder is filled beside its place and renamed, so it is there as a whole or not at all. In one that is there, files that are
        damaged or missing are replaced one by one, and what does not belong is removed: who has it open goes on. One process does it,
        others that want the same wait. Raises as ``ensure`` does.
        """
        manifest = await in_thread(_read, await self.ensure(sha256), sha256)  # the store need not answer for what is here
        folder = self._directory / f"{sha256}.files"
        if folder.is_dir() and not await in_thread(_differing, folder, manifest):
            return folder
        async with self._exclusively(sha256):
            if folder.is_dir():
                await self._repair(folder, manifest)
            else:
                await self._build(folder, manifest)
        return folder

    async def _repair(self, folder: Path, manifest: Manifest) -> None:
        differing = await in_thread(_differing, folder, manifest)
        if not differing:
            return
        log.error("the cached files %s are damaged: %d differ, such as %s; they are fetched again", folder, len(differing), differing[0])
        self._on_damaged()
        with os_errors_of(f"the directory {folder}"):
            for path in differing:
                await in_thread(_remove, folder / path)
        damaged = set(differing)
        await _fetch(self._store, folder, [file for file in manifest.files if file.path in damaged or not (folder / file.path).exists()])

    async def _build(self, folder: Path, manifest: Manifest) -> None:
        building = self._directory / ".building"
        staging = building / f"{folder.name}.{uuid.uuid4().hex}"
        with os_errors_of(f"the directory {self._directory}"):
            for abandoned in building.glob(f"{folder.name}.*"):
                await in_thread(_remove, abandoned)
            staging.mkdir(parents=True)
        try:
            await _fetch(self._store, staging, manifest.files)
            with os_errors_of(f"the directory {self._directory}"):
                staging.rename(folder)
        finally:
            await in_thread(_remove, staging)

    @asynccontextmanager
    async def _exclusively(self, sha256: str) -> AsyncIterator[None]:
        """Keep other processes and tasks out; a process that dies lets go."""
        locks = self._directory / ".locks"
        deadline = time.monotonic() + WAIT_S
        with os_errors_of(f"the directory {self._directory}"):
            locks.mkdir(parents=True, exist_ok=True)
            file = (locks / sha256).open("w")
        with file:
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise ArtifactStoreUnavailableError(f"Another process has been fetching the files {sha256} for {WAIT_S:g} s.")
                await asyncio.sleep(_LOCK_POLL_S)
            yield


async def read_manifest(store: ArtifactStore, sha256: str) -> Manifest:
    """Read the manifest with this digest from a store; raises as ``ArtifactCache.ensure`` does."""
    content = bytearray()
    async for block in store.open(sha256):
        content += block
        if len(content) > MAX_MANIFEST_BYTES:
            break
    return _parsed(bytes(content), sha256)


async def fetch_set(store: ArtifactStore, sha256: str, folder: Path) -> None:
    """Copy the files of a set into a folder that is empty, or not there yet; raises as ``ArtifactCache.ensure`` does."""
    await _fetch(store, folder, (await read_manifest(store, sha256)).files)


async def store_set(store: ArtifactStore, manifest: Manifest, root: Path) -> None:
    """Put the files of a set, which lie in a folder, into a store, and its manifest last: who finds it finds them all."""
    limit = asyncio.Semaphore(FETCHED_AT_ONCE)

    async def put(file: File) -> None:
        async with limit:
            await store.put(_blocks_of(root / file.path), expected_sha256=file.sha256, max_bytes=file.size_bytes)

    by_content = {file.sha256: file for file in manifest.files}
    await _all(put(file) for file in by_content.values())
    content = manifest.to_bytes()
    await store.put(_single(content), expected_sha256=manifest.sha256, max_bytes=len(content))


async def _fetch(store: ArtifactStore, folder: Path, files: Sequence[File]) -> None:
    limit = asyncio.Semaphore(FETCHED_AT_ONCE)

    async def fetch(file: File) -> None:
        path = folder / file.path
        async with limit:
            await store.fetch_to(file.sha256, path)
            path.chmod(0o444)

    with os_errors_of(f"the directory {folder}"):
        for parent in {(folder / file.path).parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
    await _all(fetch(file) for file in files)


async def _all(coroutines: Iterable[Coroutine[None, None, None]]) -> None:
    """Run them together; the first error ends the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except* MillraceError as errors:
        raise errors.exceptions[0] from None


def _read(path: Path, sha256: str) -> Manifest:
    with os_errors_of(f"the directory {path.parent}"), path.open("rb") as file:
        return _parsed(file.read(MAX_MANIFEST_BYTES + 1), sha256)


def _parsed(content: bytes, sha256: str) -> Manifest:
    if len(content) > MAX_MANIFEST_BYTES:
        raise ArtifactCorruptError(f"The artifact {sha256} is no manifest: it is too long for one.")
    try:
        return Manifest.from_bytes(content)
    except InvalidArgumentError as error:
        raise ArtifactCorruptError(f"The artifact {sha256} is no manifest: {error.message}.") from error


def _differing(folder: Path, manifest: Manifest) -> list[str]:
    """Paths in a folder that are not what the manifest says: damaged, missing, or surplus."""
    wanted = {file.path: file for file in manifest.files}
    folders = {parent.as_posix() for file in manifest.files for parent in Path(file.path).parents}
    differing: list[str] = []
    with os_errors_of(f"the directory {folder}"):
        for parent, names, files in os.walk(folder):
            for name in [*names, *files]:
                path = Path(parent, name)
                relative = path.relative_to(folder).as_posix()
                if path.is_symlink() or (path.is_dir() != (relative in folders)) or (not path.is_dir() and relative not in wanted):
                    differing.append(relative)
                    if name in names:
                        names.remove(name)
    for relative, file in wanted.items():
        path = folder / relative
        if relative not in differing and (not path.is_file() or _digest(path) != file.sha256):
            differing.append(relative)
    return differing


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None when there is none."""
    try:
        with os_errors_of(f"the directory {path.parent}"), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


async def _blocks_of(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while block := await in_thread(file.read, 1 << 20):
            yield block


async def _single(content: bytes) -> AsyncIterator[bytes]:
    yield content
