"""Copies of artifacts: verified each time, and fetched again when they are damaged."""

import hashlib
from pathlib import Path

import pytest

from libs.artifacts.cache import ArtifactCache
from libs.artifacts.directory import DirectoryStore
from libs.artifacts.store import ArtifactNotFoundError

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
