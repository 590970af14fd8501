import stat
from collections import namedtuple
from pathlib import Path

import pytest

from libs.local.errors import AlreadyRunningError, HomeUnusableError
from libs.local.home import Home


def test_secrets_are_made_once_and_readable_by_the_owner_only(home: Home) -> None:
    first = home.runner_key.read_text()
    home.create()
    assert home.runner_key.read_text() == first
    assert len(bytes.fromhex(first)) == 32
    assert stat.S_IMODE(home.runner_key.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.runner_key.parent.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeUnusableError, match=r"the home .*/file/home cannot be used: Not a directory; choose another"):
        Home.at(tmp_path / "file" / "home").create()


def test_a_full_disk_is_refused_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 2**29)
    monkeypatch.setattr("libs.local.home.shutil.disk_usage", lambda path: usage)
    with pytest.raises(HomeUnusableError, match=r"has 0\.5 GiB free, at least 1 are needed; make room"):
        Home.at(tmp_path).create()


def test_only_one_holds_the_home(home: Home) -> None:
    with home.locked(), pytest.raises(AlreadyRunningError, match="is already running"), home.locked():
        pass
    assert home.holder() is None


def test_the_instance_is_the_same_at_every_start_and_another_elsewhere(tmp_path: Path) -> None:
    assert Home.at(tmp_path / "a").instance == Home.at(tmp_path / "b" / ".." / "a").instance != Home.at(tmp_path / "b").instance


def test_a_home_that_is_a_file_is_named_by_whoever_looks_for_its_holder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeUnusableError, match="file cannot be used: Not a directory"):
        Home.at(tmp_path / "file").holder()
