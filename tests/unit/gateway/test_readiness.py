import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from libs import reports
from libs.reports import EndpointReport
from schemas.serving import DeploymentFailed
from services.gateway import readiness
from tests.unit.gateway.conftest import World


@pytest.fixture(autouse=True)
def _short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "LOOK_S", 0.01)
    monkeypatch.setattr(readiness, "SETTLED_S", 0.05)


def path_of(world: World) -> Path:
    return world.directory / "run" / reports.ENDPOINTS_FILE


async def told(world: World, condition: Callable[[EndpointReport], bool], name: str = "cancer") -> EndpointReport:
    """What the gateway says of an endpoint once it is as wanted."""
    async with asyncio.timeout(20):
        while True:
            for each in reports.read_endpoints(path_of(world)) or ():
                if each.name == name and condition(each):
                    return each
            await asyncio.sleep(0.01)


async def test_an_endpoint_is_ready_when_its_runner_answers_and_not_when_the_log_says_so(world: World) -> None:
    await world.deployed(0.0)
    assert await told(world, lambda each: each.is_ready) == EndpointReport("cancer", is_ready=True)
    await world.runners[0].stop()
    silent = await told(world, lambda each: not each.is_ready)
    assert silent.is_awaited, "the log still lists the runner, as after a restart of the platform"
    assert silent.reason.startswith("cancer@1: no runner answers (")
    await world.runners[0].start()
    await told(world, lambda each: each.is_ready)


async def test_one_of_two_runners_is_enough(world: World) -> None:
    await world.deployed(0.0, 0.0)
    await world.runners[0].stop()
    await asyncio.sleep(0.2)
    assert (await told(world, lambda each: True)).is_ready


async def test_an_endpoint_with_nothing_is_not_awaited(world: World) -> None:
    await world.http.post("/api/v1/endpoints", json={"name": "cancer"})
    assert await told(world, lambda each: True) == EndpointReport("cancer", is_ready=False, reason="nothing is deployed")


async def test_a_pending_deployment_is_awaited_and_a_failed_one_is_not(world: World) -> None:
    version = await world.validated()
    await world.http.post("/api/v1/endpoints", json={"name": "cancer"})
    body = {"model": "cancer", "version": version["version"]}
    deployment = (await world.http.post("/api/v1/endpoints/cancer/deployments", json=body)).json()
    pending = await told(world, lambda each: each.is_awaited)
    assert pending.reason == "cancer@1: pending"
    places = {name: deployment[name] for name in ("endpoint_name", "deployment_id", "generation")}
    await world.publish(DeploymentFailed(**places, reason="out of memory"))
    failed = await told(world, lambda each: not each.is_awaited and "failed" in each.reason)
    assert failed.reason == "cancer@1: failed (out of memory)"


async def test_what_was_said_goes_with_the_gateway(world: World) -> None:
    await world.deployed(0.0)
    await told(world, lambda each: each.is_ready)
    (component,) = (each for each in world.gateway.components if isinstance(each, readiness.Readiness))
    await component.stop()
    assert reports.read_endpoints(path_of(world)) is None
