"""What the log wants becomes what the cluster runs, and what became of it is told."""

import asyncio

import pytest

from libs.messaging import cloudevents
from libs.messaging.records import Record
from schemas.registry import DeploymentStatus, Replica
from schemas.serving import DeploymentChanged, DeploymentFailed, DeploymentReady, DeploymentRemoved
from schemas.topics import EVENTS, STATE_DEPLOYMENTS
from services.serving.reconcile import AppStatus
from tests.unit.serving.conftest import ID, NOW, deployment

ONE = Replica(replica_id="a", address="unix:/a")
TWO = Replica(replica_id="b", address="unix:/b")
ABOUT = {"endpoint_name": "shop", "deployment_id": ID, "generation": 1}
RUNS = {"status": AppStatus.RUNNING, "replicas": (ONE,)}
READY = DeploymentReady(**ABOUT, replicas=(ONE,))


async def test_what_is_asked_for_is_applied_and_ready_is_told_with_its_replicas(world, run):
    await world.publish(deployment(min_replicas=2, max_replicas=2))
    async with run(world.controller()):
        await world.until(lambda: ID in world.cluster.apps)
        world.cluster.change(status=AppStatus.RUNNING, replicas=(ONE,))
        await asyncio.sleep(0.02)
        assert world.facts() == []
        world.cluster.change(replicas=(ONE, TWO))
        await world.until(world.facts)
    assert world.cluster.calls == [("apply", ID, 1, 2)]
    assert world.facts() == [DeploymentReady(**ABOUT, replicas=(ONE, TWO))]


async def test_a_fact_belongs_to_the_story_of_the_command(world, run):
    command = cloudevents.new_event(deployment(), "/test", now=NOW, event_id="command-1")
    snapshot = cloudevents.caused_event(deployment(), command, "/millrace/registry", now=NOW)
    world.cluster.becomes = lambda _: RUNS
    await world.broker.append([cloudevents.write(snapshot)])
    async with run(world.controller()):
        await world.until(world.facts)
    (fact,) = [cloudevents.read(record) for record in world.broker.records(EVENTS.name)]
    assert (fact.correlation_id, fact.causation_id) == ("command-1", snapshot.id)


async def test_a_lost_runner_is_told_and_its_return_too(world, run):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(lambda: world.facts() == [READY])
        await world.publish(world.ready(ONE))
        world.cluster.change(replicas=(), message="the runner was ended by SIGKILL")
        await world.until(lambda: len(world.facts()) == 2)
        await world.publish(world.ready())
        world.cluster.change(replicas=(ONE,), message="")
        await world.until(lambda: len(world.facts()) == 3)
    lost = DeploymentChanged(**ABOUT, replicas=(), reason="the runner was ended by SIGKILL")
    assert world.facts() == [READY, lost, DeploymentChanged(**ABOUT, replicas=(ONE,))]


async def test_nothing_is_told_twice_while_the_log_has_not_answered(world, run):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(world.facts)
        await asyncio.sleep(0.05)
    assert world.facts() == [READY]


async def test_a_fact_that_the_log_moved_past_without_taking_it_in_is_told_again(world, run):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(lambda: world.facts() == [READY])
        await world.publish(deployment(pending_traffic_percent=10))
        await world.until(lambda: world.facts() == [READY, READY])


async def test_a_removed_deployment_is_deleted_and_told_when_it_is_gone(world, run):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(world.facts)
        await world.publish(deployment(status=DeploymentStatus.REMOVING, generation=2))
        await world.until(lambda: ("delete", ID) in world.cluster.calls)
        await asyncio.sleep(0.02)
        assert world.facts() == [READY]
        del world.cluster.apps[ID]
        await world.until(lambda: len(world.facts()) == 2)
        await world.forget(STATE_DEPLOYMENTS.name, ID)
    assert world.facts()[1] == DeploymentRemoved(**{**ABOUT, "generation": 2})
    assert world.cluster.calls.count(("delete", ID)) == 1


async def test_a_model_that_cannot_be_loaded_is_told_with_its_reason_and_tried_again_when_asked_again(world, run):
    world.cluster.becomes = lambda _: {"status": AppStatus.FAILED, "message": "the model raised ValueError: no"}
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(world.facts)
        await world.publish(deployment(status=DeploymentStatus.FAILED, pending_traffic_percent=None))
        await asyncio.sleep(0.02)
        assert world.facts() == [DeploymentFailed(**ABOUT, reason="the model raised ValueError: no")]
        world.cluster.becomes = lambda _: RUNS
        await world.publish(deployment(generation=2))
        await world.until(lambda: len(world.facts()) == 2)
    assert world.cluster.calls == [("apply", ID, 1, 1), ("apply", ID, 2, 1)]
    assert world.facts()[1] == DeploymentReady(**{**ABOUT, "generation": 2}, replicas=(ONE,))


async def test_a_restart_in_the_middle_adopts_what_runs(world, run):
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(lambda: ID in world.cluster.apps)
    world.cluster.change(**RUNS)
    async with run(world.controller()):
        await world.until(world.facts)
    assert world.cluster.calls == [("apply", ID, 1, 1)]
    assert world.facts() == [READY]


async def test_what_changed_while_nobody_looked_is_made_up_for(world, run):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(world.facts)
    await world.publish(deployment(status=DeploymentStatus.REMOVING, generation=2))
    del world.cluster.apps[ID]
    async with run(world.controller()):
        await world.until(lambda: len(world.facts()) == 2)
    assert world.facts()[1] == DeploymentRemoved(**{**ABOUT, "generation": 2})


async def test_what_nobody_wants_any_more_is_deleted(world, run):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(world.facts)
    await world.forget(STATE_DEPLOYMENTS.name, ID)
    async with run(world.controller()):
        await world.until(lambda: ("delete", ID) in world.cluster.calls)


@pytest.mark.parametrize("value", [b"not json", b"{}"])
async def test_what_cannot_be_read_is_not_taken_for_unwanted(world, run, value):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(world.facts)
    (genuine,) = world.broker.records(STATE_DEPLOYMENTS.name)
    world.broker._records[STATE_DEPLOYMENTS.name].clear()
    await world.broker.append([Record(genuine.topic, genuine.key, value, genuine.headers)])
    async with run(world.controller()):
        await asyncio.sleep(0.02)
        assert world.cluster.calls == [("apply", ID, 1, 1)]
        await world.publish(world.ready(ONE))
        await asyncio.sleep(0.02)
    assert world.cluster.calls == [("apply", ID, 1, 1)]


async def test_a_cluster_that_is_away_is_waited_for(world, run):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(world.facts)
        await world.publish(world.ready(ONE))
        world.cluster.away = True
        await world.publish(deployment(deployment_id="shop.iris.2", version=2))
        await asyncio.sleep(0.03)
        assert [type(fact) for fact in world.facts()] == [DeploymentReady, DeploymentChanged]
        world.cluster.away = False
        await world.until(lambda: len(world.facts()) == 3)
    assert world.cluster.calls == [("apply", ID, 1, 1), ("apply", "shop.iris.2", 1, 1)]


async def test_a_cluster_that_comes_up_later_is_waited_for_at_the_start(world, run):
    world.cluster.away = True
    asyncio.get_running_loop().call_later(0.02, setattr, world.cluster, "away", False)
    async with run(world.controller()):
        assert not world.cluster.away


async def test_one_deployment_that_the_cluster_refuses_holds_no_other_one_up(world, run):
    world.cluster.becomes = lambda _: RUNS
    world.cluster.refuses = "shop.a.1"
    await world.publish(deployment(deployment_id="shop.a.1", model_name="a"), deployment())
    async with run(world.controller()):
        await world.until(lambda: READY in world.facts())
    assert world.cluster.calls == [("apply", ID, 1, 1)]


async def test_a_fact_is_told_when_the_broker_is_back(world, run):
    world.cluster.becomes = lambda _: {"status": AppStatus.STARTING}
    await world.publish(deployment())
    async with run(world.controller()):
        await world.until(lambda: ID in world.cluster.apps)
        world.broker.is_away = True
        world.cluster.change(**RUNS)
        await asyncio.sleep(0.03)
        world.broker.is_away = False
        await world.until(world.facts)
    assert world.facts() == [READY]


async def test_a_cluster_that_is_away_is_told_once_and_that_it_is_back_too(world, run):
    world.cluster.becomes = lambda _: RUNS
    await world.publish(deployment())
    away = DeploymentChanged(**ABOUT, replicas=(ONE,), reason="Ray does not answer: it plays being away", is_cluster_away=True)
    async with run(world.controller()):
        await world.until(lambda: world.facts() == [READY])
        await world.publish(world.ready(ONE))
        world.cluster.away = True
        await world.until(lambda: len(world.facts()) == 2)
        await asyncio.sleep(0.05)
        await world.publish(world.ready(ONE, is_cluster_away=True))
        await asyncio.sleep(0.05)
        assert world.facts() == [READY, away]
        world.cluster.away = False
        await world.until(lambda: len(world.facts()) == 3)
    assert world.facts()[2] == DeploymentChanged(**ABOUT, replicas=(ONE,))


async def test_a_cluster_that_is_away_when_the_service_starts_is_told(world, run):
    world.cluster.away = True
    await world.publish(world.ready(ONE))
    follower, controller = world.controller()
    await follower.start()
    starting = asyncio.create_task(controller.start())
    await world.until(world.facts)
    world.cluster.away = False
    await starting
    assert [fact.is_cluster_away for fact in world.facts()] == [True]
