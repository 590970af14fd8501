"""What becomes of every kind of record, through a whole stream: over the log in memory, the embedded broker and real Kafka."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from libs.artifacts import MemoryStore
from libs.inference.pool import RunnerPool
from libs.inference.spans import RunnerSpans
from libs.messaging import cloudevents
from libs.messaging.records import Headers, Record
from libs.metrics import Metrics
from schemas.registry import EndpointSnapshot
from schemas.topics import DLQ, STATE_DEPLOYMENTS, STATE_ENDPOINTS, inference_requests
from services.streaming.answering import AnswerParts
from services.streaming.claims import Claims
from services.streaming.state import State
from services.streaming.streams import Stream, StreamParts
from tests.contract.test_stream_log import PATIENCE_S, Place, place  # noqa: F401 - a fixture
from tests.unit.runners import KEY, FakeRunner
from tests.unit.streaming.conftest import NOW, deployment

ROW = b'{"instances": [[1, 2]]}'
REFUSED = b'{"instances": [[1]]}'


async def nothing(_: Sequence[Any]) -> None:
    """The topics are there."""


async def read_all(where: Place, topic: str, is_wanted: Any, count: int) -> list[Record]:
    reader = where.broker.reader([topic])
    await reader.start()
    found: list[Record] = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            while len(found) < count:
                found += [record for record in await reader.get_many(1000, 0.2) if is_wanted(record)]
    finally:
        await reader.stop()
    return found


async def test_every_kind_of_record_has_a_result_and_what_failed_a_dead_letter(place, tmp_path):  # noqa: F811
    requests = inference_requests(place.endpoint_name).name
    deployment_id = f"{place.endpoint_name}.iris.1"
    runner, store, state = FakeRunner("r0", tmp_path / "r0.sock"), MemoryStore(), State()
    await runner.start()
    (tmp_path / "runner.key").write_bytes(KEY)
    times = {"created_at": NOW, "updated_at": NOW}
    for topic, payload in (
        (
            STATE_ENDPOINTS,
            EndpointSnapshot(endpoint_name=place.endpoint_name, traffic={deployment_id: 100}, deployment_ids=(deployment_id,), **times),
        ),
        (STATE_DEPLOYMENTS, deployment(deployment_id=deployment_id, endpoint_name=place.endpoint_name, replicas=(runner.replica,))),
    ):
        state.apply(cloudevents.write(cloudevents.new_event(payload, "/test", now=NOW), topic.name))

    async def stored(body: bytes) -> Headers:
        async def once():
            yield body

        claim = await store.put(once(), max_bytes=2**20)
        return (("ce_dataref", f"sha256:{claim.sha256}".encode()),)

    some_headers: tuple[Headers, ...] = (
        (),
        (("empty", b""),),
        (("nothing", None),),
        (("same", b"1"), ("same", b"2")),
        (("ce_source", None), ("traceparent", None), ("content-type", b"")),
        (("ce_correlationid", b"\xff"), ("traceparent", b"\xff")),
    )
    some_bodies = {
        "good": (ROW, ()),
        "refused": (REFUSED, ()),
        "broken": (b"{", ()),
        "empty": (b"", ()),
        "null": (None, ()),
        "claimed": (b"", await stored(ROW)),
        "claimed and refused": (b"", await stored(REFUSED)),
        "lost": (b"", (("ce_dataref", b"sha256:" + b"0" * 64),)),
        "claimed elsewhere": (None, (("ce_dataref", b"https://example.com"),)),
    }
    good = {"good", "claimed"}
    sent: dict[str, str] = {}
    records = []
    for name, (value, more) in some_bodies.items():
        for number, headers in enumerate(some_headers):
            # A partition of the embedded broker keeps 5 MB; aiokafka, with which this test writes, has no record without key and value.
            for key in (*([None] if value is not None else []), b"", b"key", *([b"k" * 100_000] if number < 2 else [])):
                identity = f"{name} {number} {None if key is None else len(key)}"
                sent[identity] = "completed" if name in good else "failed"
                records.append(Record(requests, key, value, (("ce_id", identity.encode()), *more, *headers)))
    producer = place.broker.producer()
    await producer.start()
    await producer.send(records)
    await producer.stop()

    pool = RunnerPool(tmp_path / "runner.key", RunnerSpans(None))
    pool.open()
    answering = AnswerParts(state, pool, Claims(store, 2**20), clock=lambda: NOW, metrics=Metrics())
    stream = Stream(place.endpoint_name, StreamParts(state, place.make, nothing, answering))
    running = asyncio.create_task(stream.run())
    try:
        results = await read_all(place, place.results, lambda record: True, len(sent))
        failed = [identity for identity, status in sent.items() if status == "failed"]
        letters = await read_all(place, DLQ.name, lambda record: requests.encode() in (record.value or b""), len(failed))
    finally:
        await stream.stop(running)
        await pool.close()
        await runner.stop()
    assert {record.header("ce_causationid"): json.loads(record.value or b"")["status"] for record in results} == sent
    assert len(results) == len(sent)
    assert sorted(str(cloudevents.read(letter).data.event_id) for letter in letters) == sorted(failed)
