"""A replica brings its runner back, and says when it cannot."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from libs.errors import DeadlineExceededError
from libs.inference.errors import RunnerStartError
from services.serving.errors import ReplicaUnhealthyError
from services.serving.keeper import Announcement, Restarts, RunnerKeeper


@dataclass(frozen=True)
class Ended:
    description: str = "was ended by SIGKILL"


class FakeRunner:
    def __init__(self, address: str) -> None:
        self.address = address
        self.answers = True
        self.busy_s = 0.0
        self.stopped = False
        self._ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()

    async def ping(self) -> float:
        if not self.answers:
            raise DeadlineExceededError("the runner did not answer within 5 s")
        return self.busy_s

    async def wait_exit(self) -> Ended:
        return await asyncio.shield(self._ended)

    async def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None:
        if not self._ended.done():
            self._ended.set_result(Ended())


class Machine:
    """Starts fake runners, keeps their announcements, and lets time pass only when told."""

    def __init__(self) -> None:
        self.runners: list[FakeRunner] = []
        self.announced: asyncio.Queue[Announcement] = asyncio.Queue()
        self.pauses: list[float] = []
        self.failures = 0
        self.now = 0.0

    async def start(self) -> FakeRunner:
        if self.runners and self.failures:
            self.failures -= 1
            raise RunnerStartError("the model does not load")
        self.runners.append(FakeRunner(f"unix:/runner-{len(self.runners)}"))
        return self.runners[-1]

    async def announce(self, announcement: Announcement) -> None:
        self.announced.put_nowait(announcement)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    def keeper(self, restarts: Restarts | None = None) -> RunnerKeeper:
        return RunnerKeeper(self.start, self.announce, restarts, predict_timeout_s=60.0, sleep=self.sleep, clock=lambda: self.now)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
async def run(machine: Machine):
    keepers: list[RunnerKeeper] = []

    async def start(restarts: Restarts | None = None) -> RunnerKeeper:
        keepers.append(machine.keeper(restarts))
        await keepers[-1].start()
        await machine.announced.get()
        return keepers[-1]

    yield start
    for keeper in keepers:
        await keeper.stop()


Start = Callable[..., Awaitable[RunnerKeeper]]


async def test_the_address_of_a_started_runner_is_announced(machine: Machine) -> None:
    keeper = machine.keeper()
    await keeper.start()
    assert await machine.announced.get() == Announcement("unix:/runner-0")
    await keeper.stop()


async def test_a_model_that_does_not_load_is_not_announced(machine: Machine) -> None:
    async def fail() -> FakeRunner:
        raise RunnerStartError("the model does not load")

    keeper = RunnerKeeper(fail, machine.announce)
    with pytest.raises(RunnerStartError, match="does not load"):
        await keeper.start()
    assert machine.announced.empty()


async def test_a_runner_that_died_is_withdrawn_then_replaced(machine: Machine, run: Start) -> None:
    await run()
    machine.runners[0].kill()
    assert await machine.announced.get() == Announcement(None, "the runner was ended by SIGKILL")
    assert await machine.announced.get() == Announcement("unix:/runner-1")
    assert machine.runners[0].stopped


async def test_the_first_restart_of_a_runner_follows_at_once_and_early_deaths_wait_longer_each(machine: Machine, run: Start) -> None:
    await run()
    for generation in range(4):
        machine.runners[generation].kill()
        await machine.announced.get()
        await machine.announced.get()
    assert machine.pauses == [0.0, 0.1, 0.2, 0.4]


async def test_a_runner_that_was_stable_is_restarted_at_once_again(machine: Machine, run: Start) -> None:
    await run()
    for generation in range(3):
        machine.now += 60
        machine.runners[generation].kill()
        await machine.announced.get()
        await machine.announced.get()
    assert machine.pauses == [0.0, 0.0, 0.0]


async def test_a_failed_restart_is_tried_again(machine: Machine, run: Start) -> None:
    keeper = await run()
    machine.failures = 2
    machine.runners[0].kill()
    await machine.announced.get()
    assert await machine.announced.get() == Announcement("unix:/runner-1")
    await keeper.check()


async def test_a_replica_whose_runner_cannot_be_brought_back_is_unhealthy(machine: Machine, run: Start) -> None:
    keeper = await run(Restarts(most_failed_starts=3))
    machine.failures = 3
    machine.runners[0].kill()
    await machine.announced.get()
    assert "the model does not load" in (await machine.announced.get()).reason
    with pytest.raises(ReplicaUnhealthyError, match="does not load"):
        await keeper.check()


async def test_a_runner_that_does_not_answer_is_killed_and_replaced(machine: Machine, run: Start) -> None:
    keeper = await run()
    machine.runners[0].answers = False
    with pytest.raises(ReplicaUnhealthyError, match="does not answer"):
        await keeper.check()
    assert (await machine.announced.get()).address is None
    assert (await machine.announced.get()).address == "unix:/runner-1"
    await keeper.check()


async def test_a_runner_whose_model_hangs_is_killed_and_replaced(machine: Machine, run: Start) -> None:
    keeper = await run()
    machine.runners[0].busy_s = 59.0
    await keeper.check()
    machine.runners[0].busy_s = 61.0
    with pytest.raises(ReplicaUnhealthyError, match="busy with one request for 61 s"):
        await keeper.check()
    assert (await machine.announced.get()).address is None
    assert (await machine.announced.get()).address == "unix:/runner-1"


async def test_stopping_withdraws_the_address_before_the_runner_ends(machine: Machine) -> None:
    keeper = machine.keeper()
    await keeper.start()
    await keeper.stop()
    await machine.announced.get()
    assert (await machine.announced.get()).address is None
    assert machine.runners[0].stopped
