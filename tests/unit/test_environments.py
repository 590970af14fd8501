import asyncio
import fcntl
import logging
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from libs.environments import (
    EnvironmentCache,
    EnvironmentUnavailableError,
    ImpossibleEnvironmentError,
    find_uv,
    first_cause,
    make_lock,
    run_uv,
    this_platform,
    this_python,
)
from libs.errors import DeadlineExceededError, InvalidArgumentError
from schemas.environment import EnvironmentLock
from tests.unit.packages import PackageDirectory, program

HASH = f"--hash=sha256:{'0' * 64}"
OTHER_HASH = f"--hash=sha256:{'1' * 64}"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageDirectory:
    directory = PackageDirectory(tmp_path / "packages")
    directory.use(monkeypatch, tmp_path / "uv-cache")
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "environments"


def _import(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-I", "-B", "-c", code], capture_output=True, text=True, check=False)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _forged(lock: EnvironmentLock, **changes: str) -> EnvironmentLock:
    return lock.model_copy(update=changes)


class TestLock:
    def test_order_layout_and_comments_do_not_change_the_id(self) -> None:
        one = make_lock(f"# made by uv\nb==2 \\\n    {HASH} \\\n    {OTHER_HASH}\na==1 {HASH}\n")
        other = make_lock(f"a==1 {HASH}\nb==2 {OTHER_HASH} {HASH}  # via a\n")
        assert one == other

    @pytest.mark.parametrize(
        "other",
        [
            make_lock(f"a==2 {HASH}"),
            make_lock(f"a==1 {OTHER_HASH}"),
            make_lock(f"a==1 {HASH}", python="3.99"),
            make_lock(f"a==1 {HASH}", platform="m68k-plan9"),
        ],
    )
    def test_packages_hashes_python_and_platform_are_the_id(self, other: EnvironmentLock) -> None:
        assert other.environment_id != make_lock(f"a==1 {HASH}").environment_id

    @pytest.mark.parametrize(
        "line", [f"--index-url x\na==1 {HASH}", f"a @ file:///x {HASH}", f"a>=1 {HASH}", "-e .", HASH, f"../a==1 {HASH}", f"a==1 ; {HASH}"]
    )
    def test_only_pins_and_hashes_are_a_lock(self, line: str) -> None:
        with pytest.raises(InvalidArgumentError, match="is neither name==version nor"):
            make_lock(line)

    def test_a_pin_without_a_hash_is_no_lock(self) -> None:
        with pytest.raises(InvalidArgumentError, match="'b==1' in a lock has no hash"):
            make_lock(f"a==1 {HASH}\nb==1")

    def test_a_lock_that_events_cannot_carry_is_refused(self) -> None:
        with pytest.raises(InvalidArgumentError, match="longer than"):
            make_lock("".join(f"p{i}==1 {HASH}\n" for i in range(7_000)))


class TestCache:
    async def test_an_environment_holds_its_packages_and_nothing_else(self, packages: PackageDirectory, root: Path) -> None:
        lock = make_lock(packages.add_wheel("pump", "2.5") + packages.add_wheel("wheel-pit"))
        python = await EnvironmentCache(root).ensure(lock)
        assert _import(python, "import pump, wheel_pit; print(pump.version)").stdout == "2.5\n"
        for absent in ("libs", "schemas", "pydantic", "pip"):
            assert "ModuleNotFoundError" in _import(python, f"import {absent}").stderr

    async def test_a_known_environment_is_there_without_uv(self, packages: PackageDirectory, root: Path) -> None:
        lock = make_lock(packages.add_wheel("pump"))
        cache = EnvironmentCache(root)
        assert not cache.holds(lock)
        python = await cache.ensure(lock)
        without_uv = EnvironmentCache(root, uv=Path("no-such-uv"))
        assert without_uv.holds(lock)
        assert await without_uv.ensure(lock) == python

    async def test_many_at_once_build_it_once(self, packages: PackageDirectory, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "libs.environments")
        lock = make_lock(packages.add_wheel("pump"))
        pythons = await asyncio.gather(*(EnvironmentCache(root).ensure(lock) for _ in range(4)))
        assert len(set(pythons)) == 1
        assert sum("built environment" in message for message in caplog.messages) == 1

    async def test_packages_are_compiled_and_their_tests_are_not(self, packages: PackageDirectory, root: Path) -> None:
        python = await EnvironmentCache(root).ensure(make_lock(packages.add_wheel("pump")))
        compiled = [path.parent.parent.name for path in python.parent.parent.glob("lib/*/site-packages/pump/**/*.pyc")]
        assert compiled == ["pump"]

    async def test_a_traceback_names_the_file_where_it_is(self, packages: PackageDirectory, root: Path) -> None:
        python = await EnvironmentCache(root).ensure(make_lock(packages.add_wheel("pump", source="def dry(): return 1 / 0\n")))
        assert f'File "{python.parent.parent}/lib' in _import(python, "import pump; pump.dry()").stderr

    async def test_what_a_killed_process_left_is_not_taken_for_an_environment(self, packages: PackageDirectory, root: Path) -> None:
        lock = make_lock(packages.add_wheel("pump"))
        half = root / ".building" / f"{lock.environment_id}.dead" / "bin"
        half.mkdir(parents=True)
        cache = EnvironmentCache(root)
        assert not cache.holds(lock)
        await cache.ensure(lock)
        assert _names(root / ".building") == []

    async def test_a_wheel_with_another_hash_is_refused_and_nothing_stays(self, packages: PackageDirectory, root: Path) -> None:
        packages.add_wheel("pump")
        cache, lock = EnvironmentCache(root), make_lock(f"pump==1.0 {HASH}")
        with pytest.raises(ImpossibleEnvironmentError, match="cannot be installed") as caught:
            await cache.ensure(lock)
        assert "ash mismatch" in caught.value.evidence
        assert not cache.holds(lock)
        assert _names(root / ".building") == []

    async def test_nothing_is_built_from_source(self, packages: PackageDirectory, root: Path, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        lock = make_lock(packages.add_source("trap", f"open({str(ran)!r}, 'w')"))
        with pytest.raises(ImpossibleEnvironmentError, match="trap"):
            await EnvironmentCache(root).ensure(lock)
        assert _names(tmp_path) == ["environments", "packages", "packages.toml", "uv-cache"]

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
    async def test_a_damaged_environment_is_installed_again(
        self, packages: PackageDirectory, root: Path, caplog: pytest.LogCaptureFixture, damage: str
    ) -> None:
        lock = make_lock(packages.add_wheel("pump", "2.5"))
        damaged: list[None] = []
        cache = EnvironmentCache(root, on_damaged=lambda: damaged.append(None))
        python = await cache.ensure(lock)
        assert damaged == []
        (module,) = python.parent.parent.glob("lib/*/site-packages/pump/__init__.py")
        right = module.read_bytes()
        if damage == "remove":
            module.unlink()
        elif damage == "manifest":
            (python.parent.parent / "manifest.json").write_text("{")
        else:
            module.write_bytes(right[:-1] if damage == "cut" else bytes([right[0] ^ 1]) + right[1:])
        assert await cache.ensure(lock) == python
        assert module.read_bytes() == right
        assert _import(python, "import pump; print(pump.version)").stdout == "2.5\n"
        assert "is damaged" in caplog.text
        assert _names(root / ".building") == []
        caplog.clear()
        await cache.ensure(lock)
        assert (caplog.text, len(damaged)) == ("", 1)

    async def test_damaged_bytecode_is_made_again(self, packages: PackageDirectory, root: Path) -> None:
        lock = make_lock(packages.add_wheel("pump", "2.5"))
        python = await EnvironmentCache(root).ensure(lock)
        (compiled,) = python.parent.parent.glob("lib/*/site-packages/pump/__pycache__/*.pyc")
        compiled.write_bytes(b"no bytecode")
        await EnvironmentCache(root).ensure(lock)
        assert _import(python, "import pump; print(pump.version)").stdout == "2.5\n"

    async def test_a_file_damaged_in_the_cache_of_packages_is_not_installed(self, packages: PackageDirectory, root: Path) -> None:
        pump, other = packages.add_wheel("pump", "2.5"), packages.add_wheel("wheel-pit")
        first = await EnvironmentCache(root).ensure(make_lock(pump))
        (module,) = first.parent.parent.glob("lib/*/site-packages/pump/__init__.py")
        module.write_bytes(b"version = '9.9'\n")
        second = await EnvironmentCache(root).ensure(make_lock(pump + other))
        assert _import(second, "import pump; print(pump.version)").stdout == "2.5\n"

    async def test_an_environment_without_a_manifest_is_compared_with_its_packages_once(
        self, packages: PackageDirectory, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        lock = make_lock(packages.add_wheel("pump"))
        environment = (await EnvironmentCache(root).ensure(lock)).parent.parent
        (environment / "manifest.json").unlink()
        inode = environment.stat().st_ino
        await EnvironmentCache(root, uv=Path("no-such-uv")).ensure(lock)
        assert (environment / "manifest.json").exists()
        assert environment.stat().st_ino == inode
        assert caplog.text == ""

    async def test_a_lock_under_a_false_id_is_refused(self, root: Path) -> None:
        lock = make_lock(f"a==1 {HASH}")
        with pytest.raises(ImpossibleEnvironmentError, match="does not have that id"):
            await EnvironmentCache(root).ensure(_forged(lock, environment_id="0" * 32))

    async def test_a_lock_for_another_platform_is_refused(self, root: Path) -> None:
        with pytest.raises(ImpossibleEnvironmentError, match=f"is for m68k-plan9, and this machine is {this_platform()}"):
            await EnvironmentCache(root).ensure(make_lock(f"a==1 {HASH}", platform="m68k-plan9"))

    async def test_a_python_that_is_not_there_is_named(self, root: Path) -> None:
        with pytest.raises(ImpossibleEnvironmentError, match=r"no Python 3\.99"):
            await EnvironmentCache(root).ensure(make_lock(f"a==1 {HASH}", python="3.99"))

    async def test_a_full_disk_can_be_tried_again(self, root: Path, tmp_path: Path) -> None:
        full = program(tmp_path / "uv", "echo 'error: Failed to install\n  cause: No space left on device (os error 28)' >&2; exit 2")
        with pytest.raises(EnvironmentUnavailableError, match="no space left"):
            await EnvironmentCache(root, uv=full).ensure(make_lock(f"a==1 {HASH}"))
        assert _names(root / ".building") == []

    async def test_an_installation_over_its_time_is_killed_with_its_children(self, root: Path, tmp_path: Path) -> None:
        children = tmp_path / "children"
        slow = program(tmp_path / "uv", f"sleep 60 & echo $! > {children}; wait")
        with pytest.raises(DeadlineExceededError, match=r"uv venv .* within 3 s"):
            await EnvironmentCache(root, uv=slow, timeout_s=3).ensure(make_lock(f"a==1 {HASH}"))
        await _until_ended(int(children.read_text()))

    async def test_a_cancelled_installation_is_killed_and_leaves_nothing(self, root: Path, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        stuck = program(tmp_path / "uv", f"echo $$ > {pipe}; sleep 60")
        cache, lock = EnvironmentCache(root, uv=stuck), make_lock(f"a==1 {HASH}")
        building = asyncio.create_task(cache.ensure(lock))
        pid = int(await asyncio.to_thread(pipe.read_text))
        building.cancel()
        with pytest.raises(asyncio.CancelledError):
            await building
        await _until_ended(pid)
        assert not cache.holds(lock)
        assert _names(root / ".building") == []

    async def test_waiting_for_another_process_has_an_end(self, root: Path) -> None:
        lock = make_lock(f"a==1 {HASH}")
        (root / ".locks").mkdir(parents=True)
        with (root / ".locks" / lock.environment_id).open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(EnvironmentUnavailableError, match="Another process"):
                await EnvironmentCache(root, timeout_s=0.1).ensure(lock)


class TestUv:
    async def test_an_index_that_is_not_there_can_be_tried_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UV_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("UV_HTTP_RETRIES", "0")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
        asked = tmp_path / "requirements.txt"
        asked.write_text("pump\n")
        with pytest.raises(EnvironmentUnavailableError, match="index cannot be reached"):
            await run_uv(find_uv(), "pip", "compile", str(asked), timeout_s=30)

    @pytest.mark.parametrize("status", ["408 Request Timeout", "429 Too Many Requests"])
    async def test_an_index_that_is_too_busy_can_be_tried_again(self, status: str, tmp_path: Path) -> None:
        said = f"error: Failed to fetch: http://index/pump/\n  cause: HTTP status client error ({status}) for url (http://index/pump/)"
        busy = program(tmp_path / "uv", f"echo '{said}' >&2; exit 2")
        with pytest.raises(EnvironmentUnavailableError, match=status):
            await run_uv(busy, "pip", "compile", timeout_s=30)

    async def test_an_index_that_says_no_has_said_it(self, tmp_path: Path) -> None:
        said = (
            "error: Failed to fetch: http://index/pump/\n  cause: HTTP status client error (400 Bad Request) for url (http://index/pump/)"
        )
        assert (await run_uv(program(tmp_path / "uv", f"echo '{said}' >&2; exit 2"), "pip", "compile", timeout_s=30)).status == 2

    def test_causes_are_told_in_one_line(self) -> None:
        stderr = "error: Request failed\n  cause: Failed to fetch\n  cause: Connection\n         refused\n\nhint: try again"
        assert first_cause(stderr) == "Failed to fetch: Connection refused"

    def test_an_error_without_cause_is_told_itself(self) -> None:
        assert first_cause("error: No such thing\n") == "No such thing"

    def test_this_python_is_a_minor_version(self) -> None:
        assert this_python().count(".") == 1


async def _until_ended(pid: int) -> None:
    """A killed process whose parent is gone as well is seen to end a moment later."""
    async with asyncio.timeout(30):
        while _runs(pid):  # noqa: ASYNC110 (a process that is not ours tells nobody)
            await asyncio.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
