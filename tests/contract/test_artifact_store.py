"""Every artifact store behaves the same: one suite over memory, a directory and a real S3 server."""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from libs.artifacts import (
    ArtifactCorruptError,
    ArtifactNotFoundError,
    ArtifactStore,
    ArtifactTooLargeError,
    DigestMismatchError,
    DirectoryStore,
    MemoryStore,
    StoredArtifact,
)
from libs.artifacts.s3 import PART_BYTES, SPOOL_IN_MEMORY_BYTES, Bucket, S3Store, s3_client
from libs.artifacts.store import BLOCK_BYTES, key_of
from libs.errors import InvalidArgumentError
from tests.integration.servers import S3Server, s3_server  # noqa: F401 (a fixture)

CONTENT = b"a model, so to speak"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Subject:
    """A store, and what the suite must do behind its back."""

    store: ArtifactStore
    damage: Callable[[str, bytes], None]
    leftovers: Callable[[], list[str]]
    """Everything the store holds that is not a complete artifact."""


@pytest.fixture(params=["memory", "directory", pytest.param("s3", marks=pytest.mark.integration)])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    match request.param:
        case "memory":
            return _memory()
        case "directory":
            return _directory(tmp_path / "artifacts")
        case _:
            return _s3(request.getfixturevalue("s3_server"), f"tests-{tmp_path.name.replace('_', '-').lower()}"[:60].strip("-"))


@pytest.fixture
def store(subject: Subject) -> ArtifactStore:
    return subject.store


def _memory() -> Subject:
    store = MemoryStore()

    def damage(sha256: str, content: bytes) -> None:
        store.contents[key_of(sha256)] = content

    return Subject(store, damage, list)


def _directory(root: Path) -> Subject:
    def damage(sha256: str, content: bytes) -> None:
        path = root / key_of(sha256)
        path.chmod(0o644)
        path.write_bytes(content)

    return Subject(DirectoryStore(root), damage, lambda: _names(root / "incoming"))


def _s3(server: S3Server, bucket: str) -> Subject:
    client = s3_client(server.endpoint, server.region, server.access_key, server.secret_key)
    client.make_bucket(bucket)
    place = Bucket(bucket, "some/prefix")

    def damage(sha256: str, content: bytes) -> None:
        client.put_object(bucket, place.key(sha256), io.BytesIO(content), len(content))

    def leftovers() -> list[str]:
        uploads = [upload.object_name for upload in client._list_multipart_uploads(bucket).uploads]
        objects = [found.object_name for found in client.list_objects(bucket, recursive=True)]
        return uploads + [name for name in objects if "/sha256/" not in name]

    return Subject(S3Store(client, place), damage, leftovers)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def _chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _put(store: ArtifactStore, content: bytes = CONTENT) -> StoredArtifact:
    return await store.put(_chunks(content), max_bytes=MAX_BYTES)


async def _read(store: ArtifactStore, sha256: str) -> bytes:
    return b"".join([block async for block in store.open(sha256)])


def _pattern(size: int) -> Iterator[bytes]:
    """``size`` bytes in uneven chunks."""
    block = bytes(range(251)) * 1000
    while size > 0:
        yield block[:size]
        size -= len(block)


async def test_what_was_put_is_read_back(store: ArtifactStore) -> None:
    stored = await store.put(_chunks(CONTENT[:5], b"", CONTENT[5:]), max_bytes=MAX_BYTES)
    assert (stored.sha256, stored.size_bytes) == (SHA256, len(CONTENT))
    assert stored.uri.endswith(f"sha256/{SHA256[:2]}/{SHA256[2:]}")
    assert await _read(store, SHA256) == CONTENT


async def test_an_empty_artifact_is_an_artifact(store: ArtifactStore) -> None:
    stored = await store.put(_chunks(), max_bytes=MAX_BYTES)
    assert stored.size_bytes == 0
    assert await _read(store, stored.sha256) == b""


@pytest.mark.parametrize("size", [BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES, SPOOL_IN_MEMORY_BYTES + 1, 2 * PART_BYTES + 1])
async def test_sizes_around_blocks_and_parts_survive(store: ArtifactStore, size: int) -> None:
    content = b"".join(_pattern(size))
    stored = await store.put(_chunks(*_pattern(size)), expected_sha256=hashlib.sha256(content).hexdigest(), max_bytes=MAX_BYTES)
    assert stored.size_bytes == size
    assert await _read(store, stored.sha256) == content


async def test_stat_says_what_put_said(store: ArtifactStore) -> None:
    stored = await _put(store)
    assert await store.stat(SHA256) == stored
    assert await store.exists(SHA256)


async def test_an_unknown_artifact_is_not_found(store: ArtifactStore, tmp_path: Path) -> None:
    assert not await store.exists(SHA256)
    with pytest.raises(ArtifactNotFoundError, match=SHA256):
        await store.stat(SHA256)
    with pytest.raises(ArtifactNotFoundError, match=SHA256):
        await _read(store, SHA256)
    with pytest.raises(ArtifactNotFoundError, match=SHA256):
        await store.fetch_to(SHA256, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", SHA256.upper(), SHA256[:-1], f"{SHA256}\n"])
async def test_what_is_no_digest_is_refused(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is not a SHA-256 digest"):
        await store.stat(digest)
    with pytest.raises(InvalidArgumentError, match="is not a SHA-256 digest"):
        await store.put(_chunks(CONTENT), expected_sha256=digest, max_bytes=MAX_BYTES)


async def test_another_digest_than_announced_stores_nothing(subject: Subject) -> None:
    with pytest.raises(DigestMismatchError, match=SHA256):
        await subject.store.put(_chunks(CONTENT), expected_sha256="0" * 64, max_bytes=MAX_BYTES)
    assert not await subject.store.exists(SHA256)
    assert subject.leftovers() == []


async def test_too_many_bytes_store_nothing(subject: Subject) -> None:
    with pytest.raises(ArtifactTooLargeError, match="19 bytes"):
        await subject.store.put(_chunks(CONTENT), max_bytes=len(CONTENT) - 1)
    assert not await subject.store.exists(SHA256)
    assert subject.leftovers() == []


async def test_exactly_the_limit_is_accepted(store: ArtifactStore) -> None:
    await store.put(_chunks(CONTENT), max_bytes=len(CONTENT))


async def test_an_endless_upload_is_stopped_at_the_limit(store: ArtifactStore) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += BLOCK_BYTES
            yield bytes(BLOCK_BYTES)

    with pytest.raises(ArtifactTooLargeError):
        await store.put(endless(), max_bytes=4 * BLOCK_BYTES)
    assert taken == 5 * BLOCK_BYTES


async def test_an_upload_that_breaks_off_leaves_nothing(subject: Subject) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(2 * BLOCK_BYTES)
        raise ConnectionResetError("client left")

    with pytest.raises(ConnectionResetError, match="client left"):
        await subject.store.put(broken(), max_bytes=MAX_BYTES)
    assert subject.leftovers() == []


async def test_a_cancelled_upload_leaves_nothing(subject: Subject) -> None:
    started = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield bytes(2 * BLOCK_BYTES)
        started.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(subject.store.put(stalled(), max_bytes=MAX_BYTES))
    await started.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert subject.leftovers() == []


async def test_equal_content_put_twice_is_one_artifact(store: ArtifactStore) -> None:
    assert await _put(store) == await _put(store)
    assert await _read(store, SHA256) == CONTENT


async def test_equal_content_put_by_many_at_once_is_one_artifact(subject: Subject) -> None:
    stored = await asyncio.gather(*(_put(subject.store) for _ in range(8)))
    assert len(set(stored)) == 1
    assert await _read(subject.store, SHA256) == CONTENT
    assert subject.leftovers() == []


async def test_damage_is_found_before_the_last_block_is_given_out(subject: Subject, tmp_path: Path) -> None:
    content = b"".join(_pattern(3 * BLOCK_BYTES))
    sha256 = (await _put(subject.store, content)).sha256
    subject.damage(sha256, content[:-1] + b"X")
    received = 0

    async def read() -> None:
        nonlocal received
        async for block in subject.store.open(sha256):
            received += len(block)

    with pytest.raises(ArtifactCorruptError, match=sha256):
        await read()
    assert received < len(content)
    target = tmp_path / "fetched"
    target.mkdir()
    with pytest.raises(ArtifactCorruptError):
        await subject.store.fetch_to(sha256, target / "model")
    assert _names(target) == []


async def test_a_truncated_artifact_is_damage(subject: Subject) -> None:
    await _put(subject.store)
    subject.damage(SHA256, b"")
    with pytest.raises(ArtifactCorruptError):
        await _read(subject.store, SHA256)


async def test_fetch_writes_the_content_and_replaces_what_was_there(store: ArtifactStore, tmp_path: Path) -> None:
    target = tmp_path / "fetched" / "model"
    target.parent.mkdir()
    target.write_bytes(b"old")
    await _put(store)
    await store.fetch_to(SHA256, target)
    assert target.read_bytes() == CONTENT
    assert _names(target.parent) == ["model"]


async def test_a_deleted_artifact_is_gone_and_deleting_again_is_fine(store: ArtifactStore) -> None:
    await _put(store)
    await store.delete(SHA256)
    assert not await store.exists(SHA256)
    await store.delete(SHA256)


async def test_a_reader_may_stop_early(store: ArtifactStore) -> None:
    content = b"".join(_pattern(3 * BLOCK_BYTES))
    sha256 = (await _put(store, content)).sha256
    reader = store.open(sha256)
    assert await anext(reader) == content[:BLOCK_BYTES]
    await reader.aclose()
    assert await _read(store, sha256) == content
