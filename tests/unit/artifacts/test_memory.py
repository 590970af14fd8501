"""An artifact of any size takes a few blocks of memory; the full 2 GB are in ``benchmarks/artifact_store.py``."""

import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

from libs.artifacts import DirectoryStore
from libs.artifacts.store import BLOCK_BYTES

CHUNK = bytes(64 * 1024)
SIZE_BYTES = 64 << 20
FEW_BYTES = 8 * BLOCK_BYTES


async def _content() -> AsyncIterator[bytes]:
    for _ in range(SIZE_BYTES // len(CHUNK)):
        yield CHUNK


async def test_storing_and_reading_a_large_artifact_takes_little_memory(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    tracemalloc.start()
    try:
        stored = await store.put(_content(), max_bytes=SIZE_BYTES)
        async for _ in store.open(stored.sha256):
            pass
        await store.fetch_to(stored.sha256, tmp_path / "fetched")
        assert tracemalloc.get_traced_memory()[1] < FEW_BYTES
    finally:
        tracemalloc.stop()
