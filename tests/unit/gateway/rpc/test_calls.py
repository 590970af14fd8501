"""Calls over a connection whose peer sends frame by frame."""

import hpack
import pytest

from libs.errors import DeadlineExceededError
from services.gateway.access import Principal
from services.gateway.rpc.calls import Budget, CallLimits, Head, StreamCall, UnaryCall
from services.gateway.rpc.framing import framed
from services.gateway.rpc.http2 import Receiver, Stream
from tests.unit.gateway.rpc.test_http2 import DATA, HEADERS, Peer

PACE = 1024


class Session:
    """Keeps the messages of a stream."""

    def __init__(self, call: StreamCall) -> None:
        self.call = call
        self.heard: list[bytes] = []
        self.is_gone = False

    def message(self, message: bytes) -> None:
        self.heard.append(message)

    def ended(self) -> None:
        self.call.finish()

    def drained(self) -> None: ...

    def gone(self) -> None:
        self.is_gone = True


class Caller(Peer):
    """A peer whose first stream is a call."""

    def __init__(self, *, is_unary: bool = False, message_bytes: int = 2**20) -> None:
        super().__init__(body_s=60.0, bytes_per_s=PACE)
        self.budget = Budget(2**20)
        self.limits = CallLimits(message_bytes, self.budget)
        self.is_unary = is_unary
        self.sessions: list[Session] = []
        self.messages: list[bytes] = []
        self.open(1)
        self.wire.frames()

    def accept(self, stream: Stream, headers: dict[bytes, bytes]) -> Receiver:
        head = Head("/s/m", "r-1", headers, Principal("ann", frozenset()), None, None)
        if self.is_unary:
            return UnaryCall(stream, head, self.limits, lambda _, message: self.messages.append(message), None)
        return StreamCall(stream, head, self.limits, self._session)

    def _session(self, call: StreamCall) -> Session:
        self.sessions.append(Session(call))
        return self.sessions[-1]

    def data(self, data: bytes, *, is_last: bool = False) -> None:
        self.send(DATA, data, int(is_last), 1)

    def wait(self, seconds: float) -> None:
        """Let time pass, as the server's sweep sees it."""
        for _ in range(round(seconds)):
            self.clock.now += 1
            for stream in self.connection.late(self.clock.now):
                stream.receiver.expire(DeadlineExceededError("late"))  # type: ignore[union-attr]

    def status(self) -> int | None:
        """The status that the call ended with, if it has ended."""
        ends = [payload for kind, flags, _, payload in self.wire.frames() if kind == HEADERS and flags & 1]
        return int(dict(hpack.Decoder().decode(ends[0]))["grpc-status"]) if ends else None


def test_a_message_of_a_stream_that_stops_half_way_ends_it_and_frees_its_memory():
    caller = Caller()
    caller.data(framed(bytes(1000))[:500])
    caller.wait(60)
    assert (caller.status(), caller.budget.held_bytes) == (None, 500)
    caller.wait(1)
    assert (caller.status(), caller.budget.held_bytes) == (4, 0)
    assert caller.sessions[0].is_gone


def test_a_stream_may_be_silent_between_messages_and_each_message_has_its_own_time():
    caller = Caller()
    caller.wait(50)
    message = framed(b"x" * 10)
    for _ in range(5):
        caller.data(message[:7])
        caller.wait(59)
        caller.data(message[7:] + message[:3])
        caller.wait(59)
        caller.data(message[3:])
        caller.wait(500)
    assert caller.status() is None
    assert caller.sessions[0].heard == [b"x" * 10] * 10


def test_a_long_message_may_take_its_time_as_long_as_it_comes_at_the_pace():
    caller = Caller()
    message = framed(bytes(500_000))
    caller.data(message[:1])
    for second in range(480):
        caller.data(message[1 + second * PACE : 1 + (second + 1) * PACE])
        caller.wait(1)
    assert (caller.status(), caller.budget.held_bytes) == (None, 1 + 480 * PACE)
    caller.wait(121)
    assert (caller.status(), caller.budget.held_bytes) == (4, 0)


def test_a_stream_that_is_not_read_at_the_moment_does_not_expire():
    caller = Caller()
    caller.sessions[0].call.is_full = True
    caller.data(framed(b"x"))
    caller.wait(500)
    assert caller.status() is None
    caller.sessions[0].call.is_full = False
    caller.sessions[0].call.resume()
    assert caller.sessions[0].heard == [b"x"]


@pytest.mark.parametrize("is_unary", [False, True])
def test_what_came_quickly_may_not_stand_still(is_unary):
    caller = Caller(is_unary=is_unary)
    caller.data(framed(bytes(300_000))[:200_000])
    caller.wait(60)
    assert caller.status() is None
    caller.wait(62)
    assert (caller.status(), caller.budget.held_bytes) == (4, 0)


def test_padding_is_no_progress():
    caller = Caller(is_unary=True)
    caller.data(framed(bytes(1000))[:500])
    for _ in range(61):
        for _ in range(5):
            caller.send(DATA, b"\xff" + bytes(255), 8, 1)
        caller.wait(1)
    assert caller.status() == 4


def test_more_than_the_one_message_of_a_call_is_refused_as_soon_as_it_comes():
    caller = Caller(is_unary=True)
    caller.data(framed(b"one"))
    assert caller.status() is None
    caller.data(b"x")
    assert (caller.status(), caller.messages, caller.budget.held_bytes) == (3, [], 0)
