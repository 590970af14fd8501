"""The data plane against a pool of runners that answer when they are told to."""

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from libs.errors import DeadlineExceededError, MillraceError, NotFoundError, NotReadyError, OverloadedError
from libs.inference.errors import InvalidInputError, ModelError, RunnerGoneError, RunnerHungError
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import NoReplicaError, Route
from schemas.inference import Signature, TensorSpec
from schemas.registry import Replica
from services.gateway.batching import Batch, BatchLimits, Pace, Pending
from services.gateway.changes import Changes
from services.gateway.dataplane import DataPlane, DataPlaneLimits
from services.gateway.errors import InternalError, RunnersLostError
from services.gateway.exchange import Outgoing
from services.gateway.predictions import Ask, Caller, Outcome, Protocol, Target

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP64", shape=(-1, -1)),), outputs=(TensorSpec(name="y", datatype="FP64", shape=(-1,)),)
)
R0, R1 = (Replica(replica_id=f"r{number}", address=f"unix:/r{number}") for number in range(2))


@dataclass
class Asked:
    """One batch at a runner."""

    replica: Replica
    inputs: dict[str, Any]
    outputs: tuple[str, ...] | None
    done: Callable[[Any], None]
    timeout_s: float | None
    is_answered: bool = False

    @property
    def rows(self) -> list[float]:
        return self.inputs["x"][:, 0].tolist()

    def answer(self, error: MillraceError | None = None, model_s: float = 0.001) -> None:
        """The sum of each row, or an error."""
        self.is_answered = True
        self.done(error or InferResponse({"y": self.inputs["x"].sum(axis=1)}, model_s=model_s))


class Pool:
    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.pinged = asyncio.Event()

    def open(self) -> None: ...

    async def close(self) -> None: ...

    def keep(self, live: Any) -> None: ...

    def send(self, route: Route, replica: Replica, inputs: Any, outputs: Any, _: Any, done: Any, *, timeout_s: float) -> None:
        self.asked.append(Asked(replica, inputs, outputs, done, timeout_s))

    def each_after(self, index: int) -> Iterator[Asked]:
        """Each batch as it comes."""
        while (index := index + 1) < len(self.asked):
            yield self.asked[index]

    async def ping(self, _: Replica, *, timeout_s: float) -> float:
        await self.pinged.wait()
        return 0.0


@dataclass
class Recorder:
    refuses: MillraceError | None = None
    notes: list[tuple[Any, ...]] = field(default_factory=list)
    logged: list[tuple[int, int, int | None]] = field(default_factory=list)

    def refusal(self, _: str) -> MillraceError | None:
        return self.refuses

    def refused(self, endpoint_name: str, _: Protocol, reason: str) -> None:
        self.notes.append(("refused", endpoint_name, reason))

    def accepted(self, pending: Pending) -> None:
        self.notes.append(("accepted", pending.caller.request_id))

    def ended(self, pending: Pending, outcome: Outcome, error: MillraceError | None) -> None:
        self.notes.append((outcome, pending.caller.request_id))

    def batch_sent(self, batch: Batch) -> None:
        self.notes.append(("sent", batch.reason, batch.rows))

    def batch_ended(self, batch: Batch, error: MillraceError | None) -> None:
        if (kept := batch.logged()) is not None:
            self.logged.append((kept.rows, len(kept.inputs["x"]), None if kept.outputs is None else len(kept.outputs["y"])))

    def ends(self) -> dict[str, list[Outcome]]:
        found: dict[str, list[Outcome]] = {}
        for note in self.notes:
            if isinstance(note[0], Outcome):
                found.setdefault(note[1], []).append(note[0])
        return found


@dataclass
class Bench:
    """A data plane with everything around it."""

    plane: DataPlane
    pool: Pool
    recorder: Recorder
    catalog: Any
    results: dict[str, Any] = field(default_factory=dict)

    def ask(self, *rows: tuple[float, ...], name: str = "", timeout_ms: int | None = None, target: str = "sums") -> Pending:
        """Submit a request of these rows; its id is the first number unless it has a name."""
        name = name or str(int(rows[0][0]))

        def parse(_: Signature) -> InferRequest:
            if rows[0][0] < 0:
                raise InvalidInputError("negative")
            return InferRequest({"x": np.array(rows, dtype=float)})

        ask = Ask(Target(target), Protocol.V1, parse, lambda p: Outgoing(repr(p.response.outputs["y"].tolist()).encode()), timeout_ms)
        return self.plane.submit(ask, Caller(name), lambda result: self.results.setdefault(name, result))

    def route_to(self, *replicas: Replica, signature: Signature = SIGNATURE, version: int = 1, is_cluster_away: bool = False) -> None:
        self.catalog.route = Route("sums", f"sums.sums.{version}", "sums", version, signature, replicas, is_cluster_away)
        self.catalog.deployments = {f"sums.sums.{version}": SimpleNamespace(replicas=replicas)}
        self.catalog.changes.notify()

    def answers(self) -> dict[str, str]:
        return {name: result.body.decode() for name, result in self.results.items() if isinstance(result, Outgoing)}

    def errors(self) -> dict[str, type]:
        return {name: type(result) for name, result in self.results.items() if isinstance(result, MillraceError)}


async def turn() -> None:
    """Let everything that is due happen."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def bench():
    async with running() as found:
        yield found


class running:
    """A running bench."""

    def __init__(self, **limits: Any) -> None:
        self._limits = DataPlaneLimits(**{"replica_wait_s": 0.05, **limits})

    async def __aenter__(self) -> Bench:
        catalog = SimpleNamespace(changes=Changes(), deployments={}, route=None)

        def choose(endpoint_name: str, *_: Any, random: float) -> Route:
            if endpoint_name != "sums":
                raise NotFoundError("there is no such endpoint")
            if not catalog.route.replicas:
                raise NoReplicaError("away")
            return catalog.route

        catalog.routing = SimpleNamespace(choose=choose, check=lambda *_: None)
        pool, recorder = Pool(), Recorder()
        self._bench = Bench(DataPlane(catalog, pool, recorder, self._limits), pool, recorder, catalog)
        self._bench.route_to(R0)
        await self._bench.plane.start()
        self._task = asyncio.create_task(self._bench.plane.run())
        return self._bench

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await self._bench.plane.stop()


async def test_requests_of_one_turn_leave_together_and_each_gets_its_own_rows(bench):
    bench.ask((1, 1))
    bench.ask((2, 2), (3, 3))
    bench.ask((4, 4))
    await turn()
    (asked,) = bench.pool.asked
    assert asked.rows == [1, 2, 3, 4]
    asked.answer()
    assert bench.answers() == {"1": "[2.0]", "2": "[4.0, 6.0]", "4": "[8.0]"}
    assert bench.recorder.ends() == {"1": ["completed"], "2": ["completed"], "4": ["completed"]}


async def test_what_comes_while_a_batch_is_under_way_leaves_when_it_returns(bench):
    bench.ask((1, 0))
    await turn()
    bench.ask((2, 0))
    bench.ask((3, 0))
    await turn()
    assert [asked.rows for asked in bench.pool.asked] == [[1]]
    bench.pool.asked[0].answer()
    assert [asked.rows for asked in bench.pool.asked] == [[1], [2, 3]]
    assert ("sent", "idle", 1) in bench.recorder.notes
    assert ("sent", "returned", 2) in bench.recorder.notes


async def test_a_replica_is_given_the_next_batch_before_it_is_done_with_one_only_while_its_model_is_quick(bench):
    def in_flight() -> int:
        return bench.plane.lanes["sums.sums.1"].in_flight

    async def answered(batches: int, model_s: float) -> None:
        for _ in range(batches):
            bench.ask((1, 0))
            await turn()
            asked = next(asked for asked in bench.pool.asked if not asked.is_answered)
            asked.answer(model_s=model_s)

    await answered(20, model_s=0.0)
    for number in (1, 2, 3):
        bench.ask((number, 0))
        await turn()
    assert (in_flight(), [asked.rows for asked in bench.pool.asked[-2:]]) == (2, [[1], [2]])
    for asked in bench.pool.each_after(19):
        asked.answer(model_s=0.0)
    await answered(20, model_s=0.001)
    for number in (1, 2):
        bench.ask((number, 0))
        await turn()
    assert in_flight() == 1


async def test_only_rows_of_one_shape_share_a_batch(bench):
    for rows in ((1, 0), (2, 0, 0), (3, 0), (4, 0, 0)):
        bench.ask(rows)
    await turn()
    bench.pool.asked[0].answer()
    bench.pool.asked[1].answer()
    assert [asked.rows for asked in bench.pool.asked] == [[1, 3], [2, 4]]
    assert sorted(bench.answers()) == ["1", "2", "3", "4"]


async def test_a_batch_is_full_at_its_limit_of_rows():
    async with running(batch=BatchLimits(rows=3)) as bench:
        for number in range(1, 6):
            bench.ask((number, 0))
        await turn()
        bench.pool.asked[0].answer()
        assert [asked.rows for asked in bench.pool.asked] == [[1, 2, 3], [4, 5]]


async def test_replicas_share_the_work(bench):
    bench.route_to(R0, R1)
    bench.ask((1, 0))
    await turn()
    bench.ask((2, 0))
    await turn()
    assert {asked.replica for asked in bench.pool.asked} == {R0, R1}


@pytest.mark.parametrize("error", [InvalidInputError("NaN"), ModelError("raised")])
async def test_a_bad_request_fails_alone_and_its_neighbours_are_answered(bench, error):
    for number in (1, 2, 3):
        bench.ask((number, 0))
    await turn()
    bench.pool.asked[0].answer(error)
    for asked in bench.pool.each_after(0):
        asked.answer(error if 2 in asked.rows else None)
    assert bench.answers() == {"1": "[1.0]", "3": "[3.0]"}
    assert bench.errors() == {"2": type(error)}
    assert bench.recorder.ends() == {"1": ["completed"], "2": ["failed"], "3": ["completed"]}


async def test_one_bad_request_costs_its_many_neighbours_few_batches(bench):
    for number in range(1, 101):
        bench.ask((number, 0))
    await turn()
    bench.pool.asked[0].answer(ModelError("raised"))
    for asked in bench.pool.each_after(0):
        asked.answer(ModelError("raised") if 42 in asked.rows else None)
    assert (len(bench.answers()), bench.errors()) == (99, {"42": ModelError})
    assert len(bench.pool.asked) <= 1 + 2 * 7


async def test_a_model_that_mixes_rows_is_asked_one_at_a_time_from_then_on(bench):
    bench.ask((1, 0))
    bench.ask((2, 0))
    await turn()
    bench.pool.asked[0].done(InferResponse({"y": np.zeros(1)}))
    bench.pool.asked[1].answer()
    bench.pool.asked[2].answer()
    assert bench.answers() == {"1": "[1.0]", "2": "[2.0]"}
    bench.ask((3, 0))
    bench.ask((4, 0))
    await turn()
    assert bench.pool.asked[3].rows == [3]


async def test_a_request_that_cannot_be_read_fails_without_asking_anybody(bench):
    bench.ask((-1, 0))
    await turn()
    assert bench.errors() == {"-1": InvalidInputError}
    assert bench.pool.asked == []
    assert bench.recorder.notes == [("accepted", "-1"), ("failed", "-1")]


async def test_an_unknown_endpoint_is_refused_and_not_accepted(bench):
    with pytest.raises(NotFoundError):
        bench.ask((1, 0), target="nowhere")
    assert bench.recorder.notes == [("refused", "", "not_found")]


async def test_a_full_queue_refuses_what_comes_next():
    async with running(batch=BatchLimits(queued=2)) as bench:
        bench.ask((1, 0))
        await turn()
        bench.ask((2, 0))
        bench.ask((3, 0))
        with pytest.raises(OverloadedError, match="2 requests wait"):
            bench.ask((4, 0))
        bench.pool.asked[0].answer()
        bench.ask((5, 0))


async def test_an_endpoint_whose_log_must_be_complete_refuses_while_it_cannot_be_written(bench):
    bench.recorder.refuses = NotReadyError("the prediction log cannot be written")
    with pytest.raises(NotReadyError, match="prediction log"):
        bench.ask((1, 0))
    assert bench.recorder.notes == [("refused", "sums", "not_ready")]


async def test_a_request_expires_in_the_queue_and_is_not_asked(bench):
    bench.ask((1, 0))
    await turn()
    bench.ask((2, 0), timeout_ms=5)
    async with asyncio.timeout(5):
        while "2" not in bench.results:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    bench.pool.asked[0].answer()
    await turn()
    assert bench.errors() == {"2": DeadlineExceededError}
    assert len(bench.pool.asked) == 1
    assert bench.recorder.ends() == {"1": ["completed"], "2": ["expired"]}


async def test_a_request_expires_inside_the_model_and_its_late_answer_is_dropped(bench):
    bench.ask((1, 0), timeout_ms=5)
    bench.ask((2, 0))
    async with asyncio.timeout(5):
        while "1" not in bench.results:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    bench.pool.asked[0].answer()
    assert bench.errors() == {"1": DeadlineExceededError}
    assert bench.answers() == {"2": "[2.0]"}
    assert bench.recorder.ends() == {"1": ["expired"], "2": ["completed"]}


async def test_a_client_that_goes_away_frees_its_place():
    async with running(batch=BatchLimits(queued=1)) as bench:
        bench.ask((1, 0))
        await turn()
        gone = bench.ask((2, 0))
        bench.plane.cancel(gone)
        bench.plane.cancel(gone)
        bench.ask((3, 0))
        bench.pool.asked[0].answer()
        assert bench.pool.asked[1].rows == [3]
        assert bench.recorder.ends()["2"] == ["failed"]
        assert "2" not in bench.results


async def test_a_lost_replica_s_requests_are_asked_once_more_elsewhere(bench):
    bench.route_to(R0, R1)
    bench.ask((1, 0))
    await turn()
    (first,) = bench.pool.asked
    first.answer(RunnerGoneError("gone"))
    second = bench.pool.asked[1]
    assert second.replica != first.replica
    second.answer()
    assert bench.answers() == {"1": "[1.0]"}


async def test_a_request_that_loses_two_runners_fails(bench):
    bench.route_to(R0, R1)
    bench.ask((1, 0))
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    bench.pool.asked[1].answer(RunnerGoneError("gone"))
    assert bench.errors() == {"1": RunnersLostError}
    assert len(bench.pool.asked) == 2


async def test_the_only_replica_is_asked_again_once_it_answers_a_ping(bench):
    bench.ask((1, 0))
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    await turn()
    assert len(bench.pool.asked) == 1
    bench.pool.pinged.set()
    await turn()
    bench.pool.asked[1].answer()
    assert bench.answers() == {"1": "[1.0]"}


async def test_a_request_waits_only_so_long_for_a_replica(bench):
    bench.route_to()
    bench.ask((1, 0))
    async with asyncio.timeout(5):
        while "1" not in bench.results:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert bench.errors() == {"1": NotReadyError}


async def test_a_request_that_waits_is_answered_by_the_replica_that_comes(bench):
    bench.route_to()
    bench.ask((1, 0))
    bench.route_to(R1)
    await turn()
    (asked,) = bench.pool.asked
    asked.answer()
    assert (asked.replica, bench.answers()) == (R1, {"1": "[1.0]"})


async def test_retries_are_bounded_when_everything_dies():
    async with running(retries_per_request=0.0, retries_at_least=0.1) as bench:
        bench.route_to(R0, R1)
        for number in range(1, 4):
            bench.ask((number, 0))
        await turn()
        bench.pool.asked[0].answer(RunnerGoneError("gone"))
        bench.pool.asked[1].answer()
        assert len(bench.answers()) == 1
        assert list(bench.errors().values()) == [NotReadyError, NotReadyError]


async def test_every_request_ends_when_the_data_plane_stops(bench):
    bench.ask((1, 0))
    bench.ask((2, 0))
    await turn()
    await bench.plane.stop()
    assert bench.recorder.ends() == {"1": ["failed"], "2": ["failed"]}
    assert bench.plane.in_flight == 0


async def test_a_cancelled_call_frees_its_place(bench):
    ask = Ask(Target("sums"), Protocol.V1, lambda _: InferRequest({"x": np.ones((1, 2))}), lambda _: Outgoing(b"ok"))
    call = asyncio.create_task(bench.plane.infer(ask, Caller("9")))
    await turn()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert bench.recorder.ends() == {"9": ["failed"]}


async def test_a_request_that_kills_its_runner_kills_the_next_one_alone(bench):
    bench.route_to(R0, R1)
    for number in (1, 2, 3):
        bench.ask((number, 0))
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    for index in range(1, 4):
        assert len(bench.pool.asked[index].rows) == 1
        bench.pool.asked[index].answer(RunnerGoneError("gone") if bench.pool.asked[index].rows == [2] else None)
        bench.pool.pinged.set()
        await turn()
    assert bench.answers() == {"1": "[1.0]", "3": "[3.0]"}
    assert bench.errors() == {"2": RunnersLostError}


async def test_what_was_with_a_runner_that_died_is_asked_alone_and_in_order_also_when_the_replica_was_away(bench):
    for number in (1, 2, 3, 4, 5):
        bench.ask((number, 0))
    await turn()
    bench.route_to()
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    await turn()
    bench.route_to(R0)
    await turn()
    for number in (1, 2, 3, 4, 5):
        assert bench.pool.asked[number].rows == [number]
        bench.pool.asked[number].answer()
        await turn()


async def test_neighbours_of_a_request_that_hangs_are_asked_again_alone(bench):
    bench.route_to(R0, R1)
    for number in (1, 2, 3):
        bench.ask((number, 0), timeout_ms=60_000)
    await turn()
    bench.pool.asked[0].answer(RunnerHungError("busy for too long"))
    await turn()
    for asked in bench.pool.each_after(0):
        assert (asked.replica, len(asked.rows)) == (R1, 1)
        asked.answer(RunnerHungError("busy for too long") if asked.rows == [3] else None)
        await turn()
    assert bench.answers() == {"1": "[1.0]", "2": "[2.0]"}
    assert bench.recorder.ends()["3"] == ["expired"]


async def test_a_first_batch_that_was_slow_refuses_nobody(bench):
    bench.ask((1, 0))
    await turn()
    bench.pool.asked[0].answer(model_s=0.5)
    for number in range(2, 12):
        bench.ask((number, 0))
    assert bench.errors() == {}


async def test_tensors_of_accepted_requests_have_a_bound():
    async with running(held_bytes=64) as bench:
        bench.ask((1, 0), (2, 0), (3, 0))
        bench.ask((4, 0), (5, 0))
        assert bench.errors() == {"4": OverloadedError}
        await turn()
        bench.pool.asked[0].answer()
        bench.ask((6, 0), (7, 0), (8, 0), (9, 0))
        await turn()
        bench.pool.asked[1].answer()
        assert set(bench.answers()) == {"1", "6"}


async def test_looking_for_the_only_answer_keeps_nobody_from_anything_and_ends_with_it():
    async with running(look_s=60.0) as bench:
        bench.ask((1, 0))
        await turn()
        assert bench.plane._is_looking
        bench.ask((2, 0))
        await turn()
        assert not bench.plane._is_looking
        bench.pool.asked[0].answer()
        bench.pool.asked[1].answer()
        bench.ask((3, 0))
        await turn()
        assert bench.plane._is_looking
        bench.pool.asked[2].answer()
        await turn()
        assert (bench.plane._is_looking, set(bench.answers())) == (False, {"1", "2", "3"})


async def test_a_batch_that_fails_after_its_deployment_went_is_asked_of_another(bench):
    bench.ask((1, 0))
    await turn()
    bench.catalog.route = Route("sums", "sums.sums.2", "sums", 2, SIGNATURE, (R1,))
    bench.catalog.deployments = {"sums.sums.2": SimpleNamespace(replicas=(R1,))}
    bench.catalog.changes.notify()
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    await turn()
    assert bench.pool.asked[1].replica == R1
    bench.pool.asked[1].answer()
    assert bench.answers() == {"1": "[1.0]"}
    assert list(bench.plane.lanes) == ["sums.sums.2"]


async def test_a_bad_batch_that_returns_after_its_deployment_went_is_asked_of_another(bench):
    bench.ask((1, 0))
    bench.ask((2, 0))
    await turn()
    bench.catalog.route = Route("sums", "sums.sums.2", "sums", 2, SIGNATURE, (R1,))
    bench.catalog.deployments = {"sums.sums.2": SimpleNamespace(replicas=(R1,))}
    bench.catalog.changes.notify()
    await turn()
    bench.pool.asked[0].answer(ModelError("raised"))
    await turn()
    bench.pool.asked[1].answer()
    bench.pool.asked[2].answer()
    assert bench.answers() == {"1": "[1.0]", "2": "[2.0]"}


async def test_requests_that_come_while_all_replicas_are_lost_wait_only_so_long(bench):
    bench.ask((1, 0))
    await turn()
    bench.ask((2, 0))
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    bench.ask((3, 0))
    async with asyncio.timeout(5):
        while len(bench.results) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert bench.errors() == {"1": NotReadyError, "2": NotReadyError, "3": NotReadyError}


async def test_a_request_that_lost_its_runner_waits_for_a_busy_one_until_its_deadline(bench):
    bench.route_to(R0, R1)
    bench.ask((1, 0))
    await turn()
    bench.ask((2, 0))
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    await asyncio.sleep(0.1)  # twice as long as it would wait for a replica
    assert bench.results == {}
    bench.pool.asked[1].answer()
    bench.pool.asked[2].answer()
    assert bench.answers() == {"1": "[1.0]", "2": "[2.0]"}


async def test_a_caller_that_cannot_be_told_costs_its_neighbours_nothing(bench, caplog):
    def done(_: Any) -> None:
        raise RuntimeError("a bug")

    ask = Ask(Target("sums"), Protocol.V1, lambda _: InferRequest({"x": np.ones((1, 2))}), lambda _: Outgoing(b"ok"))
    bench.plane.submit(ask, Caller("0"), done)
    bench.ask((1, 0))
    await turn()
    bench.pool.asked[0].answer()
    assert bench.answers() == {"1": "[1.0]"}
    assert bench.plane.in_flight == 0
    assert "nobody could be told" in caplog.text


async def test_a_batch_that_cannot_be_sent_ends_and_the_replica_goes_on(bench, caplog):
    send = bench.pool.send

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    bench.pool.send = fail
    bench.ask((1, 0))
    await turn()
    bench.pool.send = send
    bench.ask((2, 0))
    await turn()
    bench.pool.asked[0].answer()
    assert (bench.errors(), bench.answers()) == ({"1": InternalError}, {"2": "[2.0]"})
    assert "could not be sent" in caplog.text


async def test_an_answer_that_cannot_be_handled_ends_its_requests(bench, caplog):
    bench.ask((1, 0))
    bench.ask((2, 0))
    await turn()
    bench.pool.asked[0].done(InferResponse({"y": None}))  # type: ignore[dict-item]
    assert bench.errors() == {"1": InternalError, "2": InternalError}
    assert bench.recorder.ends() == {"1": ["failed"], "2": ["failed"]}
    assert "could not be handled" in caplog.text


async def test_a_replica_that_is_lost_again_when_it_is_found_is_looked_for_again(bench):
    bench.pool.pinged.set()
    send = bench.pool.send

    def lose(*arguments: Any, **named: Any) -> None:
        send(*arguments, **named)
        if len(bench.pool.asked) == 2:
            bench.pool.asked[-1].answer(RunnerGoneError("gone"))

    bench.pool.send = lose
    bench.ask((1, 0))
    bench.ask((2, 0))
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    async with asyncio.timeout(5):
        while len(bench.pool.asked) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
    bench.pool.asked[2].answer()
    assert len(bench.answers()) == 1


@pytest.mark.parametrize("error", [RunnerGoneError("gone"), DeadlineExceededError("late"), NotReadyError("whose key?")])
async def test_a_batch_that_was_not_answered_says_nothing_of_how_long_batches_take(bench, error):
    bench.ask((1, 0))
    await turn()
    bench.pool.asked[0].answer(error)
    assert bench.plane.lanes["sums.sums.1"].pace.seconds(100) == 0


async def test_a_full_queue_goes_to_the_replica_that_takes_over_although_somebody_was_refused_first():
    async with running(batch=BatchLimits(queued=1), replica_wait_s=5.0) as bench:
        bench.ask((1, 0))
        await turn()
        bench.ask((2, 0))
        bench.pool.asked[0].answer(RunnerGoneError("gone"))
        bench.route_to(R1)
        with pytest.raises(OverloadedError):
            bench.ask((3, 0))
        await turn()
        bench.pool.asked[1].answer()
        assert bench.answers() == {"1": "[1.0]", "2": "[2.0]"}


async def test_a_replica_that_is_lost_by_a_later_deployment_is_looked_for_too(bench):
    bench.ask((1, 0))
    await turn()
    bench.pool.asked[0].answer(RunnerGoneError("gone"))
    bench.route_to(R0, version=2)
    await turn()
    bench.pool.asked[1].answer(RunnerGoneError("gone"))
    bench.pool.pinged.set()
    bench.ask((2, 0))
    await turn()
    bench.pool.asked[2].answer()
    assert bench.answers() == {"2": "[2.0]"}


async def test_a_stopped_data_plane_looks_for_no_replica(bench):
    bench.ask((1, 0))
    await turn()
    await bench.plane.stop()
    bench.pool.asked[0].answer(RunnerGoneError("closed"))
    await turn()
    assert bench.plane._probes == {}


def pace_of(row_s: float, fixed_s: float = 0.0) -> Pace:
    pace = Pace()
    for rows in (1, 9, 4, 6) * 10:
        pace.add(rows, fixed_s + rows * row_s)
    return pace


async def test_a_slow_model_gets_batches_that_end_in_time(bench):
    bench.ask((1, 0))
    await turn()
    bench.plane.lanes["sums.sums.1"].pace = pace_of(0.03)
    for number in range(2, 8):
        bench.ask((number, 0))
    await turn()
    bench.plane.lanes["sums.sums.1"].returned = lambda batch: bench.plane.lanes["sums.sums.1"].release(batch.replica)
    bench.pool.asked[0].answer()
    assert bench.pool.asked[1].rows == [2, 3, 4]


async def test_a_model_whose_time_does_not_depend_on_rows_gets_all_that_wait(bench):
    bench.ask((1, 0))
    await turn()
    bench.plane.lanes["sums.sums.1"].pace = pace_of(0.0, fixed_s=0.05)
    for number in range(2, 8):
        bench.ask((number, 0))
    await turn()
    bench.pool.asked[0].answer()
    assert bench.pool.asked[1].rows == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("row_s", "timeout_ms", "most"), [(0.25, None, 5), (0.05, 250, 6), (0.000001, None, 100)])
async def test_what_could_not_be_answered_in_time_is_refused_at_once(bench, row_s, timeout_ms, most):
    bench.ask((1, 0))
    await turn()
    bench.plane.lanes["sums.sums.1"].pace = pace_of(row_s)
    accepted = 1
    for number in range(2, 100):
        try:
            bench.ask((number, 0), timeout_ms=timeout_ms)
        except OverloadedError:
            break
        accepted += 1
    assert accepted <= most
    assert bench.plane.lanes["sums.sums.1"].wait_s() < 1.5


@pytest.mark.parametrize("seed", [*range(20), 326])
async def test_whatever_happens_every_request_ends_exactly_once_and_nothing_is_left(seed):
    rng = random.Random(seed)
    failures: list[Any] = [RunnerGoneError("gone"), ModelError("raised"), InvalidInputError("no"), DeadlineExceededError("late"), None]
    strange: list[Any] = [
        *failures,
        NotReadyError("key"),
        MillraceError("strange"),
        InferResponse({"y": np.zeros(1)}),
        InferResponse({"y": None}),
    ]
    async with running(replica_wait_s=0.02, batch=BatchLimits(rows=8, queued=30, in_flight=2)) as bench:
        asked: list[Pending] = []
        answered = 0

        def answer(of: list[Any]) -> None:
            nonlocal answered
            asked, answered = bench.pool.asked[answered], answered + 1
            what = rng.choice(of)
            asked.done(what) if isinstance(what, InferResponse) else asked.answer(what)

        for number in range(300):
            match rng.randrange(10):
                case 0 | 1 | 2 | 3:
                    with suppress(OverloadedError):
                        width = rng.choice([1, 1, 2])
                        rows = rng.choice([1, 2, 3, 30])
                        asked.append(bench.ask(*[(number, *range(width))] * rows, timeout_ms=rng.choice([None, None, 5])))
                case 4 | 5 | 6 if answered < len(bench.pool.asked):
                    answer(strange)
                case 7 if asked:
                    bench.plane.cancel(rng.choice(asked))
                case 8:
                    replicas = tuple(rng.sample([R0, R1], rng.randint(0, 2)))
                    bench.route_to(*replicas, version=rng.choice([1, 1, 1, 2]))
                    rng.choice([bench.pool.pinged.set, bench.pool.pinged.clear])()
                case _:
                    await asyncio.sleep(rng.choice([0, 0, 0.002]))
        bench.route_to(R0)
        bench.pool.pinged.set()
        async with asyncio.timeout(10):
            while bench.plane.in_flight or answered < len(bench.pool.asked) or bench.plane._probes:
                while answered < len(bench.pool.asked):
                    answer([None])
                await asyncio.sleep(0.001)
        ends = bench.recorder.ends()
        assert len(ends) == len(asked) > 30
        assert all(len(outcomes) == 1 for outcomes in ends.values())
        assert all(pending.is_over and pending.timer is None and pending.patience is None for pending in asked)
        lanes = bench.plane.lanes.values()
        assert [(lane.queued, lane.in_flight, lane._rows_queued) for lane in lanes] == [(0, 0, 0)] * len(lanes)
        assert {Outcome.COMPLETED, Outcome.FAILED} <= {outcomes[0] for outcomes in ends.values()}


UNBATCHABLE = SIGNATURE.model_copy(update={"batchable": False})


def large(bench: Bench, first: int, rows: int, **arguments: Any) -> Pending:
    """A request of rows whose first numbers count up."""
    return bench.ask(*((number, 0) for number in range(first, first + rows)), **arguments)


def sums(first: int, rows: int) -> str:
    return repr([float(number) for number in range(first, first + rows)])


async def test_requests_to_a_model_whose_rows_depend_on_each_other_are_never_joined_cut_or_halved():
    async with running(batch=BatchLimits(rows=4)) as bench:
        bench.route_to(R0, signature=UNBATCHABLE)
        large(bench, 1, 10)
        large(bench, 100, 2)
        large(bench, 200, 2)
        await turn()
        bench.pool.asked[0].answer()
        bench.pool.asked[1].answer(ModelError("raised"))
        bench.pool.asked[2].answer()
        assert [len(asked.rows) for asked in bench.pool.asked] == [10, 2, 2]
        assert bench.answers() == {"1": sums(1, 10), "200": sums(200, 2)}
        assert bench.errors() == {"100": ModelError}


async def test_a_large_request_is_asked_piece_by_piece_and_others_get_their_turn_between():
    async with running(batch=BatchLimits(rows=4)) as bench:
        large(bench, 1, 10)
        await turn()
        bench.ask((50, 0))
        bench.ask((51, 0))
        await turn()
        for asked in bench.pool.each_after(-1):
            asked.answer()
        assert [asked.rows for asked in bench.pool.asked] == [[1, 2, 3, 4], [50, 51], [5, 6, 7], [8, 9, 10]]
        assert bench.answers() == {"1": sums(1, 10), "50": "[50.0]", "51": "[51.0]"}
        assert bench.recorder.ends() == {"1": ["completed"], "50": ["completed"], "51": ["completed"]}
        assert next(note for note in bench.recorder.notes if note[0] == "sent") == ("sent", "piece", 4)
        assert bench.recorder.logged == [(2, 2, 2), (10, 10, 10)]


async def test_what_is_recorded_of_a_cut_request_is_that_of_all_its_pieces():
    async with running(batch=BatchLimits(rows=4, takes_s=10)) as bench:
        pending = large(bench, 1, 8)
        await turn()
        left_s = pending.sent_s
        for asked in bench.pool.each_after(-1):
            asked.answer(model_s=0.25)
        assert (pending.rows, pending.attempts, pending.model_s, pending.sent_s) == (8, 1, 0.5, left_s)


async def test_a_piece_has_so_many_rows_as_take_the_time_of_a_batch():
    async with running(batch=BatchLimits(takes_s=0.1)) as bench:
        large(bench, 1, 2500)
        await turn()
        assert len(bench.pool.asked[0].rows) <= 1024
        first = bench.pool.asked[0]
        first.answer(model_s=0.01 * len(first.rows))
        assert len(bench.pool.asked[1].rows) in range(5, 11)


async def test_where_one_row_takes_as_long_as_many_a_large_request_is_not_cut_into_rows():
    async with running(batch=BatchLimits(takes_s=0.1)) as bench:
        bench.ask((1, 0))
        await turn()
        bench.pool.asked[0].answer()
        pace = bench.plane.lanes["sums.sums.1"].pace
        for _ in range(200):
            pace.add(1, 0.5)
            pace.add(100, 0.501)
        large(bench, 1000, 5000)
        await turn()
        assert len(bench.pool.asked[1].rows) >= 1000


async def test_pieces_have_a_limit_of_bytes():
    async with running(batch=BatchLimits(size_bytes=64)) as bench:
        large(bench, 1, 10)
        await turn()
        for asked in bench.pool.each_after(-1):
            asked.answer()
        assert max(len(asked.rows) for asked in bench.pool.asked) == 4
        assert bench.answers() == {"1": sums(1, 10)}


async def test_a_piece_that_loses_its_runner_is_asked_again_and_those_before_it_are_not():
    async with running(batch=BatchLimits(rows=4)) as bench:
        bench.route_to(R0, R1)
        pending = large(bench, 1, 12)
        await turn()
        bench.pool.asked[0].answer()
        bench.pool.asked[1].answer(RunnerGoneError("gone"))
        bench.pool.asked[2].answer()
        bench.pool.asked[3].answer()
        assert [asked.rows[0] for asked in bench.pool.asked] == [1, 5, 5, 9]
        assert bench.pool.asked[2].replica != bench.pool.asked[1].replica
        assert bench.answers() == {"1": sums(1, 12)}
        assert pending.attempts == 2


async def test_a_large_request_that_loses_two_runners_fails_whichever_pieces_they_had():
    async with running(batch=BatchLimits(rows=4)) as bench:
        bench.pool.pinged.set()
        bench.route_to(R0, R1)
        large(bench, 1, 12)
        await turn()
        bench.pool.asked[0].answer(RunnerGoneError("gone"))
        bench.pool.asked[1].answer()
        await turn()
        bench.pool.asked[2].answer(RunnerGoneError("gone"))
        await turn()
        assert bench.errors() == {"1": RunnersLostError}
        assert bench.recorder.ends() == {"1": ["failed"]}


@pytest.mark.parametrize("error", [InvalidInputError("NaN"), ModelError("raised"), RunnerHungError("hung")])
async def test_a_piece_that_fails_fails_its_request_and_no_more_of_it_is_asked(error):
    async with running(batch=BatchLimits(rows=4)) as bench:
        large(bench, 1, 12)
        await turn()
        bench.pool.asked[0].answer()
        bench.pool.asked[1].answer(error)
        await turn()
        assert len(bench.pool.asked) == 2
        assert bench.errors() == {"1": type(error)}
        assert len(bench.recorder.ends()["1"]) == 1
        assert bench.recorder.logged == [(12, 12, None)]


async def test_no_more_is_asked_of_a_large_request_whose_client_went_away():
    async with running(batch=BatchLimits(rows=4)) as bench:
        pending = large(bench, 1, 12)
        await turn()
        bench.plane.cancel(pending)
        bench.pool.asked[0].answer()
        await turn()
        assert len(bench.pool.asked) == 1
        assert bench.plane.in_flight == 0


@pytest.mark.parametrize("outputs", [{"y": np.zeros(1)}, {"z": np.zeros(4)}, {"y": np.zeros((4, 2))}])
async def test_a_large_request_is_asked_whole_when_its_pieces_do_not_fit_together(outputs):
    async with running(batch=BatchLimits(rows=4)) as bench:
        large(bench, 1, 8)
        await turn()
        bench.pool.asked[0].answer()
        bench.pool.asked[1].done(InferResponse(outputs))
        bench.pool.asked[2].answer()
        assert [len(asked.rows) for asked in bench.pool.asked] == [4, 4, 8]
        assert bench.answers() == {"1": sums(1, 8)}
        assert bench.recorder.logged == [(8, 8, 8)]


async def test_a_large_request_that_another_version_goes_on_with_begins_again():
    async with running(batch=BatchLimits(rows=4)) as bench:
        large(bench, 1, 12)
        await turn()
        bench.pool.asked[0].answer()
        bench.route_to(R1, version=2)
        await turn()
        bench.pool.asked[1].answer()
        await turn()
        for asked in bench.pool.each_after(1):
            asked.answer()
        assert [asked.rows[0] for asked in bench.pool.asked if asked.replica == R1] == [1, 5, 9]
        assert bench.answers() == {"1": sums(1, 12)}


async def test_a_large_request_that_waits_has_nobody_refused():
    async with running(batch=BatchLimits(takes_s=0.1, wait_s=1.0)) as bench:
        bench.ask((1, 0))
        await turn()
        pace = bench.plane.lanes["sums.sums.1"].pace
        for _ in range(200):
            pace.add(1, 0.001)
            pace.add(100, 0.1)
        large(bench, 1000, 20_000)
        for number in range(2, 10):
            bench.ask((number, 0))
        assert bench.plane.lanes["sums.sums.1"].wait_s() < 1.0


async def test_a_lost_runner_that_nobody_will_replace_is_not_waited_for():
    async with running(replica_wait_s=30.0) as bench:
        bench.route_to(R0, is_cluster_away=True)
        bench.ask((1, 0))
        await turn()
        bench.pool.asked[0].answer(RunnerGoneError("gone"))
        await turn()
        bench.ask((2, 0))
        await turn()
        assert bench.errors() == {"1": NotReadyError, "2": NotReadyError}
        assert "before Ray is back" in bench.results["2"].message


async def test_a_runner_that_lives_answers_also_when_nobody_would_replace_it():
    async with running() as bench:
        bench.route_to(R0, is_cluster_away=True)
        bench.ask((1, 0))
        await turn()
        bench.pool.asked[0].answer()
        await turn()
        assert bench.answers() == {"1": "[1.0]"}
