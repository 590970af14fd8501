import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from libs.environments import EnvironmentCache, EnvironmentUnavailableError, this_platform, this_python
from services.builder.adapters import UvResolver
from services.builder.environment import EnvironmentRequest, environment_request
from services.builder.errors import BuildFailed
from tests.unit.packages import PackageDirectory, program

WEEK_S = 7 * 24 * 3600


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageDirectory:
    directory = PackageDirectory(tmp_path / "packages")
    directory.use(monkeypatch, tmp_path / "uv-cache")
    directory.add_wheel("numpy", "2.0")
    return directory


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def resolver(tmp_path: Path, clock: Clock) -> UvResolver:
    return UvResolver(tmp_path / "resolutions", clock=clock)


@pytest.fixture
def offline(tmp_path: Path, clock: Clock) -> UvResolver:
    """A resolver with the same memory that reaches no index."""
    broken = program(tmp_path / "uv", "echo 'error: Request failed\n  cause: Failed to fetch: simple/pump' >&2; exit 2")
    return UvResolver(tmp_path / "resolutions", uv=broken, clock=clock)


def _request(*requirements: str) -> EnvironmentRequest:
    return environment_request(requirements, python=this_python(), platform=this_platform())


async def test_everything_needed_is_pinned_and_hashed(packages: PackageDirectory, resolver: UvResolver) -> None:
    pump = packages.add_wheel("pump", "1.5", requires=("shaft>=2",))
    shaft = packages.add_wheel("shaft", "2.1")
    lock = await resolver.resolve(_request("pump<2"))
    assert pump in lock.lock
    assert shaft in lock.lock
    assert lock.lock.count("==") == 3


async def test_a_lock_can_be_installed(packages: PackageDirectory, resolver: UvResolver, tmp_path: Path) -> None:
    packages.add_wheel("pump")
    python = await EnvironmentCache(tmp_path / "environments").ensure(await resolver.resolve(_request("pump")))
    assert python.exists()


async def test_equal_requirements_resolve_once(packages: PackageDirectory, resolver: UvResolver, offline: UvResolver) -> None:
    packages.add_wheel("pump")
    lock = await resolver.resolve(_request("pump", "numpy"))
    packages.add_wheel("pump", "2.0")
    assert await offline.resolve(_request("numpy", "Pump")) == lock


async def test_an_old_resolution_is_made_again(packages: PackageDirectory, resolver: UvResolver, clock: Clock) -> None:
    packages.add_wheel("pump")
    old = await resolver.resolve(_request("pump"))
    newer = packages.add_wheel("pump", "2.0")
    clock.now += WEEK_S
    assert await resolver.resolve(_request("pump")) == old
    clock.now += 1
    assert newer in (await resolver.resolve(_request("pump"))).lock


async def test_an_old_resolution_is_better_than_none(
    packages: PackageDirectory, resolver: UvResolver, offline: UvResolver, clock: Clock
) -> None:
    packages.add_wheel("pump")
    lock = await resolver.resolve(_request("pump"))
    clock.now += WEEK_S + 1
    assert await offline.resolve(_request("pump")) == lock


async def test_without_index_and_memory_the_build_can_be_tried_again(offline: UvResolver) -> None:
    with pytest.raises(EnvironmentUnavailableError, match="package index cannot be reached"):
        await offline.resolve(_request("pump"))


@pytest.mark.parametrize("damage", [lambda p: p.write_text(""), lambda p: p.write_text("[]"), lambda p: p.write_text('{"lock": 1}')])
async def test_a_damaged_memory_is_forgotten(
    packages: PackageDirectory, resolver: UvResolver, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    packages.add_wheel("pump")
    lock = await resolver.resolve(_request("pump"))
    for path in _remembered(tmp_path):
        damage(path)
    assert await resolver.resolve(_request("pump")) == lock


async def test_requirements_that_contradict_each_other_are_explained(packages: PackageDirectory, resolver: UvResolver) -> None:
    packages.add_wheel("pump", requires=("shaft>=2",))
    packages.add_wheel("shaft", "1.0")
    packages.add_wheel("shaft", "2.0")
    with pytest.raises(BuildFailed, match=r"The requirements cannot be met: .*pump depend on shaft>=2.*you require shaft<2") as caught:
        await resolver.resolve(_request("pump", "shaft<2"))
    assert "No solution found" in caught.value.evidence


async def test_failures_are_not_remembered(packages: PackageDirectory, resolver: UvResolver) -> None:
    with pytest.raises(BuildFailed, match="pump"):
        await resolver.resolve(_request("pump"))
    pump = packages.add_wheel("pump")
    assert pump in (await resolver.resolve(_request("pump"))).lock


async def test_a_package_without_wheels_is_refused_and_its_setup_never_runs(
    packages: PackageDirectory, resolver: UvResolver, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    packages.add_source("trap", f"open({str(ran)!r}, 'w')")
    with pytest.raises(BuildFailed, match=r"trap.* has no usable wheels.*Only packages with ready-made wheels"):
        await resolver.resolve(_request("trap"))
    assert not _exists(ran)


def _remembered(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "resolutions").iterdir())


def _exists(path: Path) -> bool:
    return path.exists()


async def test_equal_requirements_asked_for_at_once_are_resolved_once(tmp_path: Path, clock: Clock) -> None:
    count = tmp_path / "count"
    lock = f"pump==1.0 --hash=sha256:{'0' * 64}"
    uv = program(tmp_path / "uv", f"echo . >> {count}; echo '{lock}'")
    resolver = UvResolver(tmp_path / "resolutions", uv=uv, clock=clock)
    first, second = await asyncio.gather(resolver.resolve(_request("pump")), resolver.resolve(_request("pump")))
    assert first == second
    assert count.read_text().splitlines() == ["."]
