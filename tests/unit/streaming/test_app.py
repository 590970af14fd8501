"""The wiring: the whole service in one process."""

from libs.artifacts import MemoryStore
from libs.inference.spans import RunnerSpans
from libs.messaging.memory import MemoryBroker
from libs.settings import ProcessSettings, RunnerSettings
from schemas.registry import EndpointSnapshot
from services.streaming.app import build
from services.streaming.memory import MemoryStreamLog
from services.streaming.settings import Settings
from tests.unit.runners import KEY
from tests.unit.streaming.conftest import GROUP, ID, NOW, REQUESTS, RESULTS, World, deployment


def broker_deletes(broker):
    async def delete(topics) -> None:
        await broker.delete_topics([topic.name for topic in topics])

    return delete


async def test_a_record_is_answered_by_the_components_as_they_are_built(tmp_path, run):
    world, broker = World(tmp_path), MemoryBroker()
    world.broker = broker
    (tmp_path / "key").write_bytes(KEY)
    runner = await world.runner()
    created = []

    async def create(topics) -> None:
        created.extend(topic.name for topic in topics)

    components = build(
        Settings(runner=RunnerSettings(key_file=tmp_path / "key"), process=ProcessSettings(home=tmp_path), metrics_port=0),
        broker=broker,
        logs=lambda endpoint_name: MemoryStreamLog(broker, endpoint_name),
        topics=create,
        deletion=broker_deletes(broker),
        store=MemoryStore(),
        spans=RunnerSpans(None),
        clock=lambda: NOW,
    )
    await world.publish(
        EndpointSnapshot(endpoint_name="shop", traffic={ID: 100}, deployment_ids=(ID,), created_at=NOW, updated_at=NOW),
        deployment(replicas=(runner.replica,)),
    )
    await world.ask({"instances": [[1, 2]]})
    async with run(components):
        await world.until(lambda: broker.committed(GROUP, REQUESTS) == 1)
    await runner.stop()
    assert len(broker.records(RESULTS)) == 1
    assert created == [REQUESTS, RESULTS]
