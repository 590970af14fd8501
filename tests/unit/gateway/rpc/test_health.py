"""The health service's watches, with a clock that stands for the event loop."""

import asyncio
from collections.abc import Callable

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from libs.errors import OverloadedError
from services.gateway.health import Health
from services.gateway.rpc.health import MOST_WATCHES, HealthService
from tests.unit.gateway.rpc.test_http2 import Clock

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


class Call:
    """A call on a connection; keeps what it is sent."""

    def __init__(self, connection: object) -> None:
        self.stream = self
        self.connection = connection
        self.sent: list[int] = []

    def send(self, message: bytes) -> None:
        self.sent.append(HealthCheckResponse.FromString(message).status)


class Watched:
    """A health service, and watches of it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.health = Health()
        self.health.caught_up = True
        self.service = HealthService(self.health, ("s",))

    def watch(self, connection: object, name: str = "") -> tuple[Call, Callable[[], None]]:
        """A watch's call, and what ends it."""
        call = Call(connection)
        watch = self.service.watch(call)  # type: ignore[arg-type]
        watch.message(HealthCheckRequest(service=name).SerializeToString())
        return call, watch.gone


@pytest.fixture
def watched(monkeypatch) -> Watched:
    clock = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    return Watched(clock)


def test_all_watches_share_one_timer_and_the_last_one_stops_it(watched: Watched):
    watches = [watched.watch(connection) for connection in range(100)]
    assert len(watched.clock.later) == 1
    watched.clock.run()
    assert len(watched.clock.later) == 1
    for _, gone in watches:
        gone()
    watched.clock.run()
    assert watched.clock.later == []


def test_every_watch_is_told_the_state_at_once_and_each_change_once(watched: Watched):
    calls = [watched.watch(connection, name)[0] for connection in range(2) for name in ("", "s", "unknown" * 100)]
    watched.clock.run()
    watched.health.close()
    for _ in range(2):
        watched.clock.run()
    assert [call.sent for call in calls] == [[SERVING, NOT_SERVING], [SERVING, NOT_SERVING], [HealthCheckResponse.SERVICE_UNKNOWN]] * 2


def test_a_connection_has_so_many_watches_and_no_more(watched: Watched):
    watches = [watched.watch("one") for _ in range(MOST_WATCHES)]
    with pytest.raises(OverloadedError, match="8 watches"):
        watched.watch("one")
    assert watched.watch("other")[0].sent == [SERVING]
    watches[0][1]()
    assert watched.watch("one")[0].sent == [SERVING]


def test_a_watch_that_never_began_ends_without_harm(watched: Watched):
    watched.watch("one")
    watched.service.watch(Call("one")).gone()  # type: ignore[arg-type]
    watched.service.watch(Call("other")).gone()  # type: ignore[arg-type]
    assert len(watched.clock.later) == 1
