"""Copies of artifacts: verified each time, and fetched again when they are damaged."""

import asyncio
import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from libs.artifacts.cache import ArtifactCache, store_set
from libs.artifacts.directory import DirectoryStore
from libs.artifacts.manifest import File, Manifest
from libs.artifacts.store import ArtifactCorruptError, ArtifactNotFoundError, read_verified

CONTENT = b"a model" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
async def cache(tmp_path: Path) -> ArtifactCache:
    store = DirectoryStore(tmp_path / "store")

    async def chunks():
        yield CONTENT

    await store.put(chunks(), max_bytes=10**6)
    return ArtifactCache(tmp_path / "cache", store)


async def test_an_artifact_is_fetched_once(cache, tmp_path):
    path = await cache.ensure(SHA256)
    inode = path.stat().st_ino
    assert path.read_bytes() == CONTENT
    assert (await cache.ensure(SHA256)).stat().st_ino == inode


@pytest.mark.parametrize("place", [0, 3500, len(CONTENT) - 1])
async def test_one_flipped_bit_is_found_and_the_copy_is_fetched_again(cache, caplog, place):
    path = await cache.ensure(SHA256)
    damaged = bytearray(CONTENT)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    assert (await cache.ensure(SHA256)).read_bytes() == CONTENT
    assert "is damaged" in caplog.text


async def test_a_copy_that_was_cut_off_is_fetched_again(cache):
    path = await cache.ensure(SHA256)
    path.write_bytes(CONTENT[:100])
    assert (await cache.ensure(SHA256)).read_bytes() == CONTENT


async def test_what_the_store_does_not_have_is_an_error(cache):
    with pytest.raises(ArtifactNotFoundError):
        await cache.ensure("0" * 64)


FILES = {"model.pkl": b"a model", "data/a.bin": b"a" * 1000, "data/deep/b.bin": b"b"}


@pytest.fixture
async def files(tmp_path: Path) -> tuple[ArtifactCache, str, list[None]]:
    store, root = DirectoryStore(tmp_path / "store"), tmp_path / "root"
    for path, content in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    manifest = Manifest.of(File(path, hashlib.sha256(content).hexdigest(), len(content)) for path, content in FILES.items())
    await store_set(store, manifest, root)
    damaged: list[None] = []
    return ArtifactCache(tmp_path / "cache", store, on_damaged=lambda: damaged.append(None)), manifest.sha256, damaged


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_a_set_is_a_folder_of_its_files(files):
    cache, digest, damaged = files
    folder = await cache.ensure_set(digest)
    assert content_of(folder) == FILES
    inode = (folder / "model.pkl").stat().st_ino
    assert (await cache.ensure_set(digest) / "model.pkl").stat().st_ino == inode
    assert damaged == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").write_bytes(b"")


def become_a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        Path.unlink,
        link,
        become_a_folder,
        become_a_file,
        lambda path: path.with_name("surplus.py").write_bytes(b""),
        lambda path: path.with_name("surplus").mkdir(),
        lambda path: os.mkfifo(path.with_name("pipe")),
    ],
)
async def test_a_damaged_set_is_repaired_and_counted(files, damage, caplog):
    cache, digest, damaged = files
    folder = await cache.ensure_set(digest)
    untouched, of_the_folder = (folder / "model.pkl").stat().st_ino, folder.stat().st_ino
    damage(folder / "data" / "a.bin")
    assert content_of(await cache.ensure_set(digest)) == FILES
    assert not [path for path in folder.rglob("*") if path.is_symlink() or path.name in ("surplus", "pipe")]
    assert ((folder / "model.pkl").stat().st_ino, folder.stat().st_ino) == (untouched, of_the_folder)
    assert len(damaged) == 1
    assert "are damaged" in caplog.text


async def test_a_set_that_is_here_needs_no_store(files, tmp_path):
    cache, digest, _ = files
    await cache.ensure_set(digest)
    shutil.rmtree(tmp_path / "store")
    assert content_of(await cache.ensure_set(digest)) == FILES


async def test_many_that_want_a_set_at_once_get_one(files):
    cache, digest, damaged = files
    folders = await asyncio.gather(*(cache.ensure_set(digest) for _ in range(8)))
    assert len(set(folders)) == 1
    assert content_of(folders[0]) == FILES
    flip(folders[0] / "model.pkl")
    await asyncio.gather(*(cache.ensure_set(digest) for _ in range(8)))
    assert content_of(folders[0]) == FILES
    assert len(damaged) == 1


async def test_what_a_killed_process_left_is_not_taken_for_a_set(files, tmp_path):
    cache, digest, _ = files
    left = tmp_path / "cache" / ".building" / f"{digest}.files.0123"
    left.mkdir(parents=True)
    (left / "model.pkl").write_bytes(b"half")
    assert content_of(await cache.ensure_set(digest)) == FILES
    assert list((tmp_path / "cache" / ".building").iterdir()) == []


async def test_a_set_with_a_file_that_the_store_lost_is_an_error_and_leaves_no_folder(files, tmp_path):
    cache, digest, _ = files
    await cache._store.delete(hashlib.sha256(b"b").hexdigest())
    with pytest.raises(ArtifactNotFoundError):
        await cache.ensure_set(digest)
    assert not (tmp_path / "cache" / f"{digest}.files").exists()


async def test_what_is_no_manifest_is_damage(files):
    cache, _, _ = files
    with pytest.raises(ArtifactCorruptError, match="is no manifest"):
        await cache.ensure_set(hashlib.sha256(b"a model").hexdigest())


MANY = {f"d{number % 7}/f{number}": b"%d" % number * 100 for number in range(300)}
WORKS = """
import asyncio, hashlib, sys
from pathlib import Path
from libs.artifacts.cache import ArtifactCache, store_set
from libs.artifacts.directory import DirectoryStore
from tests.unit.artifacts.test_cache import manifest_of, MANY

store = DirectoryStore(Path(sys.argv[2]) / "store")
if sys.argv[1] == "store":
    asyncio.run(store_set(store, manifest_of(MANY), Path(sys.argv[2]) / "root"))
else:
    asyncio.run(ArtifactCache(Path(sys.argv[2]) / "cache", store).ensure_set(manifest_of(MANY).sha256))
"""


def manifest_of(files: dict[str, bytes]) -> Manifest:
    return Manifest.of(File(path, hashlib.sha256(content).hexdigest(), len(content)) for path, content in files.items())


def killed(what: str, place: Path, after: int) -> None:
    """Do something in a process that is killed once there are so many files."""
    process = subprocess.Popen([sys.executable, "-c", WORKS, what, str(place)])
    watched = place / ("store" if what == "store" else "cache")
    while process.poll() is None and sum(len(files) for _, _, files in os.walk(watched)) < after:
        time.sleep(0.001)
    process.kill()
    process.wait()


@pytest.mark.parametrize("after", [1, 100])
async def test_a_process_that_is_killed_leaves_no_half_set(tmp_path, after):
    for path, content in MANY.items():
        (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / path).write_bytes(content)
    store, manifest = DirectoryStore(tmp_path / "store"), manifest_of(MANY)
    killed("store", tmp_path, after)
    if await store.exists(manifest.sha256):  # it was quicker than the one who killed it
        assert all([await store.exists(file.sha256) for file in manifest.files])
    await store_set(store, manifest, tmp_path / "root")
    killed("cache", tmp_path, after + 2)
    folder = tmp_path / "cache" / f"{manifest.sha256}.files"
    assert content_of(folder) in ({}, MANY)
    assert content_of(await ArtifactCache(tmp_path / "cache", store).ensure_set(manifest.sha256)) == MANY


async def test_a_file_that_is_being_opened_for_somebody_who_gave_up_is_closed() -> None:
    opened: list[io.BytesIO] = []

    def open_slowly() -> io.BytesIO:
        time.sleep(0.1)
        opened.append(io.BytesIO(b"x"))
        return opened[0]

    async def read() -> None:
        async for _ in read_verified(open_slowly, "0" * 64):
            raise AssertionError

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.02)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert opened[0].closed
