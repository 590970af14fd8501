import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs.artifacts import ArtifactStoreUnavailableError, DirectoryStore
from libs.artifacts.store import os_errors_of

CONTENT = b"a model"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DAY_S = 24 * 3600


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def _content() -> AsyncIterator[bytes]:
    yield CONTENT


def _age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


async def test_nothing_is_created_before_the_first_upload(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "artifacts")
    assert not await store.exists(SHA256)
    assert _names(tmp_path) == []


async def test_an_artifact_is_a_file_that_cannot_be_written_and_is_named_by_its_uri(tmp_path: Path) -> None:
    stored = await DirectoryStore(tmp_path / "with space").put(_content(), max_bytes=100)
    path = tmp_path / "with space" / "sha256" / SHA256[:2] / SHA256[2:]
    assert stored.uri == path.as_uri()
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


async def test_storing_again_heals_what_was_damaged(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    await store.put(_content(), max_bytes=100)
    path = tmp_path / "sha256" / SHA256[:2] / SHA256[2:]
    path.chmod(0o644)
    path.write_bytes(b"rotten")
    await store.put(_content(), max_bytes=100)
    assert path.read_bytes() == CONTENT


async def test_what_a_killed_process_left_is_swept_after_a_day(tmp_path: Path) -> None:
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    old, new = incoming / "old", incoming / "new"
    old.touch()
    new.touch()
    _age(old, DAY_S + 60)
    _age(new, DAY_S - 60)
    await DirectoryStore(tmp_path).put(_content(), max_bytes=100)
    assert _names(incoming) == ["new"]


async def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.touch()
    with pytest.raises(ArtifactStoreUnavailableError, match=f"Cannot use the artifact directory {root}"):
        await DirectoryStore(root).put(_content(), max_bytes=100)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_can_be_tried_again(number: int) -> None:
    with pytest.raises(ArtifactStoreUnavailableError, match="There is no space left in the cellar") as caught, os_errors_of("the cellar"):
        raise OSError(number, os.strerror(number))
    assert caught.value.retryable
