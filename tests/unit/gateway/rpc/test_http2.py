"""The HTTP/2 connection alone, frame by frame."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.rpc.http2 import PREFACE, Connection, ErrorCode, Limits

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/s/m"), (":authority", "localhost")]


class Clock:
    """Stands for an event loop: a clock, and what was to be called later."""

    def __init__(self) -> None:
        self.now = 100.0
        self.later: list[Later] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, call: Callable[[], None]) -> "Later":
        self.later.append(Later(call))
        return self.later[-1]

    def run(self) -> None:
        """Call all that was to be called later."""
        later, self.later = self.later, []
        for each in later:
            each.call()


@dataclass
class Later:
    call: Callable[[], None]

    def cancel(self) -> None:
        self.call = lambda: None


class Wire:
    """The transport: what was written, as frames."""

    def __init__(self) -> None:
        self.written = b""
        self.is_closed = False
        self.reads = True

    def write(self, data: bytes | memoryview) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return ("127.0.0.1", 5)

    def is_reading(self) -> bool:
        return self.reads

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of each frame since the last look."""
        found, position = [], 0
        while position < len(self.written):
            length = int.from_bytes(self.written[position : position + 3], "big")
            kind, flags, stream = struct.unpack_from(">BBI", self.written, position + 3)
            found.append((kind, flags, stream, self.written[position + 9 : position + 9 + length]))
            position += 9 + length
        self.written = b""
        return found


@dataclass
class Heard:
    """A receiver that keeps what it hears."""

    stream: object
    headers: dict
    chunks: list[bytes] = field(default_factory=list)
    has_ended: bool = False
    is_gone: bool = False
    drains: int = 0

    def data(self, chunk: bytes, is_last: bool) -> None:
        self.chunks.append(chunk)
        self.has_ended = is_last

    def drained(self) -> None:
        self.drains += 1

    def gone(self) -> None:
        self.is_gone = True


class Peer:
    """A client that has greeted the connection, unless told not to."""

    def __init__(self, greets: bool = True, **limits: float) -> None:
        self.clock, self.wire, self.heard = Clock(), Wire(), []
        self.lost: list[Connection] = []
        self.encoder = hpack.Encoder()
        self.connection = Connection(self.clock, self.accept, Limits(**limits), lambda _: True, self.lost.append)  # type: ignore[arg-type]
        self.connection.connection_made(self.wire)  # type: ignore[arg-type]
        if greets:
            self.connection.data_received(PREFACE)
            self.send(SETTINGS)
        self.wire.frames()

    def accept(self, stream, headers):
        self.heard.append(Heard(stream, headers))
        return self.heard[-1]

    def send(self, kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> None:
        self.connection.data_received(frame(kind, payload, flags, stream))

    def open(self, stream: int, flags: int = 4, fields=REQUEST) -> Heard | None:
        before = len(self.heard)
        self.send(HEADERS, self.encoder.encode(fields), flags, stream)
        return self.heard[-1] if len(self.heard) > before else None

    def goaway(self) -> ErrorCode | None:
        """Why the connection was ended, if it was."""
        for kind, _, _, payload in self.wire.frames():
            if kind == GOAWAY:
                return ErrorCode(int.from_bytes(payload[4:8], "big"))
        return None

    def reset(self) -> ErrorCode | None:
        """Why a stream was ended, if it was."""
        for kind, _, _, payload in self.wire.frames():
            if kind == RST_STREAM:
                return ErrorCode(int.from_bytes(payload, "big"))
        return None


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


@pytest.fixture
def peer() -> Peer:
    return Peer()


def test_a_greeting_is_answered_by_settings_that_say_what_is_taken():
    clock, wire = Clock(), Wire()
    connection = Connection(clock, lambda *_: None, Limits(streams=7), lambda _: True, lambda _: None)  # type: ignore[arg-type]
    connection.connection_made(wire)  # type: ignore[arg-type]
    (kind, _, _, payload), (update, _, stream, _) = wire.frames()
    assert (kind, update, stream) == (SETTINGS, WINDOW_UPDATE, 0)
    assert dict(struct.iter_unpack(">HI", payload))[3] == 7
    connection.data_received(PREFACE + frame(SETTINGS))
    assert wire.frames() == [(SETTINGS, 1, 0, b"")]


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", PREFACE[:-1] + b"x", PREFACE + frame(PING, b"12345678")])
def test_what_does_not_greet_is_told_to_go(greeting):
    peer = Peer(greets=False)
    peer.connection.data_received(greeting)
    assert peer.goaway() is ErrorCode.PROTOCOL_ERROR
    assert peer.wire.is_closed


def test_a_greeting_may_come_byte_by_byte_and_so_may_a_request():
    peer = Peer(greets=False)
    sent = PREFACE + frame(SETTINGS) + frame(HEADERS, peer.encoder.encode(REQUEST), 4, 1) + frame(DATA, b"hello", 1, 1)
    for octet in sent:
        peer.connection.data_received(bytes([octet]))
    (heard,) = peer.heard
    assert (heard.chunks, heard.has_ended, heard.headers[b":path"]) == ([b"hello"], True, b"/s/m")


def test_an_answer_is_head_data_and_trailers_in_one_piece(peer: Peer):
    heard = peer.open(1, 5)
    assert heard is not None
    heard.stream.respond(b"\x88", b"body", b"\x88")
    kinds = [(kind, flags, stream) for kind, flags, stream, _ in peer.wire.frames()]
    assert kinds == [(HEADERS, 4, 1), (DATA, 0, 1), (HEADERS, 5, 1)]
    assert peer.connection.open_streams == 0


def test_an_answer_before_the_request_has_ended_stops_the_request(peer: Peer):
    heard = peer.open(1)
    assert heard is not None
    heard.stream.respond(b"\x88", b"body", b"\x88")
    assert peer.wire.frames()[-1] == (RST_STREAM, 0, 1, bytes(4))
    peer.send(DATA, b"still under way", 0, 1)
    peer.send(DATA, b"the last", 1, 1)
    assert (peer.wire.frames(), heard.chunks) == ([], [])
    peer.send(DATA, b"too much", 1, 1)
    assert peer.reset() is ErrorCode.STREAM_CLOSED


def test_data_waits_for_the_windows_of_stream_and_connection(peer: Peer):
    peer.send(SETTINGS, struct.pack(">HI", 4, 10))
    heard = peer.open(1, 5)
    assert heard is not None
    peer.wire.frames()
    heard.stream.respond(b"\x88", b"x" * 25, b"\x88")
    assert [len(payload) for kind, _, _, payload in peer.wire.frames() if kind == DATA] == [10]
    peer.send(WINDOW_UPDATE, struct.pack(">I", 10), 0, 1)
    assert [len(payload) for kind, _, _, payload in peer.wire.frames() if kind == DATA] == [10]
    assert heard.stream.is_open
    peer.send(SETTINGS, struct.pack(">HI", 4, 15))
    assert [(kind, flags) for kind, flags, *_ in peer.wire.frames()] == [(DATA, 0), (HEADERS, 5), (SETTINGS, 1)]


def test_data_of_many_streams_waits_for_the_connections_window_and_goes_on(peer: Peer):
    peer.send(SETTINGS, struct.pack(">HI", 4, 2**20))
    first, second = peer.open(1, 5), peer.open(3, 5)
    assert first is not None
    assert second is not None
    peer.wire.frames()
    first.stream.respond(b"\x88", b"a" * 60_000, b"\x88")
    second.stream.respond(b"\x88", b"b" * 60_000, b"\x88")
    sent = sum(len(payload) for kind, _, _, payload in peer.wire.frames() if kind == DATA)
    assert sent == 65_535
    peer.send(WINDOW_UPDATE, struct.pack(">I", 100_000), 0, 0)
    frames = peer.wire.frames()
    assert sum(len(payload) for kind, _, _, payload in frames if kind == DATA) == 120_000 - 65_535
    assert max(len(payload) for *_, payload in frames) <= 16_384
    assert peer.connection.open_streams == 0


def test_a_receiver_hears_when_what_had_to_wait_has_left(peer: Peer):
    peer.send(SETTINGS, struct.pack(">HI", 4, 10))
    heard = peer.open(1)
    assert heard is not None
    heard.stream.send_head(b"\x88")
    heard.stream.send(b"x" * 15)
    assert (heard.drains, heard.stream.is_waiting) == (0, True)
    peer.send(WINDOW_UPDATE, struct.pack(">I", 5), 0, 1)
    assert (heard.drains, heard.stream.is_waiting) == (1, False)


def test_a_peer_that_does_not_read_is_not_read_either(peer: Peer):
    peer.connection.pause_writing()
    assert not peer.wire.reads
    peer.connection.resume_writing()
    assert peer.wire.reads


def test_a_stream_is_held_to_its_window_and_gets_back_what_was_consumed():
    peer = Peer(stream_window_bytes=100)
    heard = peer.open(1)
    assert heard is not None
    peer.send(DATA, b"x" * 80, 0, 1)
    heard.stream.consumed(80)
    assert peer.wire.frames() == [(WINDOW_UPDATE, 0, 1, struct.pack(">I", 80))]
    peer.send(DATA, b"x" * 100, 0, 1)
    peer.send(DATA, b"x", 0, 1)
    assert peer.reset() is ErrorCode.FLOW_CONTROL_ERROR
    assert heard.is_gone


def test_the_connections_window_is_opened_again_before_it_is_used_up(peer: Peer):
    peer.open(1)
    peer.connection._recv_window = 2**30 + 50
    peer.send(DATA, bytes(50), 0, 1)
    assert peer.wire.frames() == []
    peer.send(DATA, bytes(50), 0, 1)
    assert peer.wire.frames() == [(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30 + 49))]


def test_padding_is_left_out_and_given_back(peer: Peer):
    heard = peer.open(1)
    assert heard is not None
    peer.send(DATA, b"\x03abc" + bytes(3), 8, 1)
    assert heard.chunks == [b"abc"]
    assert peer.wire.frames() == [(WINDOW_UPDATE, 0, 1, struct.pack(">I", 4))]


def test_headers_may_be_continued_and_carry_padding_and_priority(peer: Peer):
    block = peer.encoder.encode(REQUEST)
    first = b"\x02" + struct.pack(">IB", 0, 9) + block[:3] + bytes(2)
    peer.send(HEADERS, first, 8 | 0x20 | 1, 1)
    peer.send(CONTINUATION, block[3:6], 0, 1)
    peer.send(CONTINUATION, block[6:], 4, 1)
    (heard,) = peer.heard
    assert (heard.headers[b":path"], heard.has_ended) == (b"/s/m", True)


def test_trailers_end_a_request(peer: Peer):
    heard = peer.open(1)
    assert heard is not None
    peer.send(DATA, b"abc", 0, 1)
    peer.send(HEADERS, peer.encoder.encode([("x-checksum", "1")]), 5, 1)
    assert (heard.chunks, heard.has_ended) == ([b"abc", b""], True)


@pytest.mark.parametrize("fields", [[("x-a", "1")], [(":path", "/")]])
def test_trailers_that_do_not_end_the_stream_or_name_a_path_are_refused(peer: Peer, fields):
    heard = peer.open(1)
    peer.send(HEADERS, peer.encoder.encode(fields), 4 if fields[0][0] == "x-a" else 5, 1)
    assert peer.reset() is ErrorCode.PROTOCOL_ERROR
    assert heard is not None
    assert heard.is_gone


@pytest.mark.parametrize(
    "fields",
    [
        REQUEST[:2],
        [*REQUEST, (":path", "/other")],
        [("x-a", "1"), *REQUEST],
        [*REQUEST, (":protocol", "websocket")],
        [*REQUEST, ("Upper", "1")],
        [*REQUEST, ("connection", "close")],
        [*REQUEST, ("te", "gzip")],
        [*REQUEST, ("x-a", "1\r\nx-b: 2")],
        [*REQUEST[:2], (":path", "")],
        [*REQUEST, ("content-length", "many")],
        [*REQUEST, ("content-length", "3")],
    ],
)
def test_malformed_requests_cost_their_stream_only(peer: Peer, fields):
    peer.open(1, 5, fields)
    assert (peer.heard, peer.reset()) == ([], ErrorCode.PROTOCOL_ERROR)
    peer.open(3, 5, fields)
    assert (peer.heard, peer.reset()) == ([], ErrorCode.PROTOCOL_ERROR)
    assert peer.open(5, 5) is not None


def test_a_request_of_another_length_than_announced_is_refused(peer: Peer):
    heard = peer.open(1, 4, [*REQUEST, ("content-length", "5")])
    peer.send(DATA, b"1234", 1, 1)
    assert peer.reset() is ErrorCode.PROTOCOL_ERROR
    assert heard is not None
    assert not heard.has_ended
    heard = peer.open(3, 4, [*REQUEST, ("content-length", "5")])
    peer.send(DATA, b"12345", 1, 3)
    assert heard is not None
    assert heard.has_ended


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(DATA, b"", 0, 0), ErrorCode.PROTOCOL_ERROR),
        (frame(DATA, b"", 0, 9), ErrorCode.PROTOCOL_ERROR),
        (frame(DATA, b"\xff", 8, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(DATA, bytes(300_000), 0, 1), ErrorCode.FRAME_SIZE_ERROR),
        (frame(HEADERS, b"\xff\xff\xff\xff\xff\xff\xff\xff", 4, 3), ErrorCode.COMPRESSION_ERROR),
        (frame(HEADERS, b"", 4, 2), ErrorCode.PROTOCOL_ERROR),
        (frame(HEADERS, struct.pack(">IB", 3, 1), 0x24, 3), ErrorCode.PROTOCOL_ERROR),
        (frame(HEADERS, b"\x82", 0, 3) + frame(PING, bytes(8)), ErrorCode.PROTOCOL_ERROR),
        (frame(HEADERS, bytes(20_000), 4, 3), ErrorCode.ENHANCE_YOUR_CALM),
        (frame(HEADERS, bytes(9_000), 0, 3) + frame(CONTINUATION, bytes(9_000), 0, 3), ErrorCode.ENHANCE_YOUR_CALM),
        (frame(CONTINUATION, b"", 4, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(PRIORITY, bytes(5), 0, 0), ErrorCode.PROTOCOL_ERROR),
        (frame(RST_STREAM, bytes(4), 0, 9), ErrorCode.PROTOCOL_ERROR),
        (frame(RST_STREAM, bytes(3), 0, 1), ErrorCode.FRAME_SIZE_ERROR),
        (frame(SETTINGS, bytes(6), 0, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(SETTINGS, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
        (frame(SETTINGS, bytes(6), 1), ErrorCode.FRAME_SIZE_ERROR),
        (frame(SETTINGS, struct.pack(">HI", 2, 2)), ErrorCode.PROTOCOL_ERROR),
        (frame(SETTINGS, struct.pack(">HI", 4, 2**31)), ErrorCode.FLOW_CONTROL_ERROR),
        (frame(SETTINGS, struct.pack(">HI", 5, 100)), ErrorCode.PROTOCOL_ERROR),
        (frame(PUSH_PROMISE, bytes(4), 4, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(PING, bytes(8), 0, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(PING, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
        (frame(GOAWAY, bytes(8), 0, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(GOAWAY, bytes(4)), ErrorCode.FRAME_SIZE_ERROR),
        (frame(WINDOW_UPDATE, bytes(4)), ErrorCode.PROTOCOL_ERROR),
        (frame(WINDOW_UPDATE, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
        (frame(WINDOW_UPDATE, struct.pack(">I", 2**31 - 1)), ErrorCode.FLOW_CONTROL_ERROR),
        (frame(WINDOW_UPDATE, struct.pack(">I", 1), 0, 9), ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_what_breaks_the_protocol_costs_the_connection(peer: Peer, sent, code):
    heard = peer.open(1)
    peer.connection.data_received(sent)
    assert peer.goaway() is code
    assert peer.wire.is_closed
    peer.connection.connection_lost(None)
    assert heard is not None
    assert heard.is_gone
    assert peer.lost == [peer.connection]
    peer.connection.data_received(frame(PING, bytes(8)))
    assert peer.wire.frames() == []


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(WINDOW_UPDATE, bytes(4), 0, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(WINDOW_UPDATE, struct.pack(">I", 2**31 - 1), 0, 1), ErrorCode.FLOW_CONTROL_ERROR),
        (frame(PRIORITY, bytes(4), 0, 1), ErrorCode.FRAME_SIZE_ERROR),
        (frame(PRIORITY, struct.pack(">IB", 1, 1), 0, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(DATA, b"x", 1, 1) + frame(DATA, b"x", 0, 1), ErrorCode.STREAM_CLOSED),
    ],
)
def test_what_breaks_the_protocol_of_one_stream_costs_that_stream(peer: Peer, sent, code):
    heard = peer.open(1)
    peer.connection.data_received(sent)
    assert peer.reset() is code
    assert heard is not None
    assert heard.is_gone
    assert peer.open(3) is not None


def test_unknown_frames_are_passed_over_and_pings_answered(peer: Peer):
    peer.send(0xFA, b"whatever", 0xFF, 5)
    peer.send(PING, b"12345678")
    peer.clock.run()
    assert peer.wire.frames() == [(PING, 1, 0, b"12345678")]


def test_the_answer_to_a_ping_travels_with_the_next_answer(peer: Peer):
    heard = peer.open(1, 5)
    peer.send(PING, b"12345678")
    peer.send(PING, b"abcdefgh")
    assert peer.wire.frames() == []
    assert heard is not None
    heard.stream.respond(b"\x88", b"body", b"\x88")
    assert [kind for kind, *_ in peer.wire.frames()] == [PING, PING, HEADERS, DATA, HEADERS]
    peer.clock.run()
    assert peer.wire.frames() == []


def test_a_peer_that_resets_or_goes_away_frees_its_streams(peer: Peer):
    first, second = peer.open(1), peer.open(3)
    peer.send(RST_STREAM, struct.pack(">I", 8), 0, 1)
    assert first is not None
    assert second is not None
    assert (first.is_gone, second.is_gone) == (True, False)
    peer.connection.connection_lost(None)
    assert second.is_gone
    second.stream.respond(b"\x88", b"late", b"\x88")


def test_more_streams_than_allowed_are_refused_for_the_client_to_repeat():
    peer = Peer(streams=2)
    assert peer.open(1) is not None
    assert peer.open(3) is not None
    assert peer.open(5) is None
    assert peer.reset() is ErrorCode.REFUSED_STREAM
    peer.send(RST_STREAM, struct.pack(">I", 8), 0, 1)
    assert peer.open(7) is not None


@pytest.mark.parametrize(
    "flood",
    [
        frame(PING, bytes(8)),
        frame(SETTINGS),
        frame(PRIORITY, struct.pack(">IB", 0, 1), 0, 1),
        frame(0xFA),
        frame(DATA, b"", 0, 1),
        frame(RST_STREAM, bytes(4), 0, 1),
    ],
)
def test_floods_of_frames_that_lead_nowhere_cost_the_connection(flood):
    peer = Peer(strikes=100)
    peer.open(1)
    peer.connection.data_received(flood * 101)
    assert peer.goaway() is ErrorCode.ENHANCE_YOUR_CALM


def test_opening_and_resetting_streams_is_such_a_flood():
    peer = Peer(strikes=100)
    for number in range(101):
        peer.open(2 * number + 1)
        peer.send(RST_STREAM, bytes(4), 0, 2 * number + 1)
    assert peer.goaway() is ErrorCode.ENHANCE_YOUR_CALM
    assert all(heard.is_gone for heard in peer.heard)


def test_strikes_are_forgiven_with_time():
    peer = Peer(strikes=100)
    for _ in range(5):
        peer.connection.data_received(frame(PING, bytes(8)) * 90)
        peer.connection.sweep(peer.clock.now)
    assert not peer.wire.is_closed


def test_who_does_not_greet_in_time_is_cut():
    peer = Peer(greets=False, first_request_s=10)
    peer.connection.data_received(PREFACE[:5])
    peer.connection.sweep(peer.clock.now + 9)
    assert not peer.wire.is_closed
    peer.connection.sweep(peer.clock.now + 11)
    assert peer.wire.is_closed


@pytest.mark.parametrize("begun", [frame(HEADERS, b"\x82", 0, 1), frame(PING, bytes(8))[:12]])
def test_a_frame_or_header_block_that_is_not_completed_in_time_costs_the_connection(peer: Peer, begun):
    peer.clock.now += 500
    peer.connection.data_received(begun)
    peer.connection.sweep(peer.clock.now + 9)
    assert not peer.wire.is_closed
    peer.connection.sweep(peer.clock.now + 11)
    assert peer.goaway() is ErrorCode.ENHANCE_YOUR_CALM


def test_a_connection_without_calls_is_told_to_go_away_in_time(peer: Peer):
    heard = peer.open(1, 5)
    peer.connection.sweep(peer.clock.now + 10_000)
    assert not peer.wire.is_closed
    assert heard is not None
    peer.clock.now += 10_000
    heard.stream.respond(b"\x88", b"x", b"\x88")
    peer.connection.sweep(peer.clock.now + 599)
    assert not peer.wire.is_closed
    peer.connection.sweep(peer.clock.now + 601)
    assert peer.goaway() is ErrorCode.NO_ERROR


def test_leaving_lets_open_streams_end_and_takes_no_new_ones(peer: Peer):
    heard = peer.open(1, 5)
    peer.connection.leave()
    assert peer.goaway() is ErrorCode.NO_ERROR
    assert peer.open(3) is None
    assert peer.reset() is ErrorCode.REFUSED_STREAM
    assert not peer.wire.is_closed
    assert heard is not None
    heard.stream.respond(b"\x88", b"x", b"\x88")
    assert peer.wire.is_closed


def test_one_connection_too_many_is_closed_without_a_greeting():
    connection, wire = Connection(Clock(), lambda *_: None, Limits(), lambda _: False, lambda _: None), Wire()  # type: ignore[arg-type]
    connection.connection_made(wire)  # type: ignore[arg-type]
    assert wire.frames() == []
    assert wire.is_closed


def test_a_closed_connection_that_nobody_reads_is_cut_in_time(peer: Peer):
    peer.connection.data_received(frame(PUSH_PROMISE))
    peer.wire.is_closed = False
    peer.connection.sweep(peer.clock.now + 9)
    assert not peer.wire.is_closed
    peer.connection.sweep(peer.clock.now + 11)
    assert peer.wire.is_closed


FRAMES = st.builds(
    frame,
    st.integers(0, 11),
    st.one_of(st.binary(max_size=40), st.just(hpack.Encoder().encode(REQUEST))),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x24, 0x25, 0xFF]),
    st.sampled_from([0, 1, 2, 3, 5, 2**31 - 1]),
)


@given(st.lists(FRAMES, max_size=30), st.randoms(use_true_random=False))
def test_any_frames_in_any_pieces_are_borne(frames, random):
    peer = Peer()
    sent = b"".join(frames)
    while sent:
        size = random.randint(1, 50)
        peer.connection.data_received(sent[:size])
        sent = sent[size:]
        for heard in peer.heard:
            if random.random() < 0.2:
                heard.stream.respond(b"\x88", bytes(random.randint(0, 100)), b"\x88")
    is_closed = peer.wire.is_closed
    peer.connection.connection_lost(None)
    assert all(heard.is_gone or not heard.stream.is_open for heard in peer.heard)
    assert peer.connection.open_streams == 0
    assert is_closed or peer.goaway() is None


def test_late_requests_are_those_that_are_not_complete(peer: Peer):
    complete, incomplete = peer.open(1, 5), peer.open(3)
    assert complete is not None
    assert incomplete is not None
    peer.send(DATA, bytes(61_440), 0, 3)
    assert peer.connection.late(peer.clock.now + 61) == []
    peer.send(DATA, bytes(61_439), 0, 3)
    assert peer.connection.late(peer.clock.now + 121) == []
    assert peer.connection.late(peer.clock.now + 122) == [incomplete.stream]


def taking(peer: Peer, size: int, seconds: int) -> None:
    """Let time pass in which the peer takes so many bytes a second."""
    for _ in range(seconds):
        peer.clock.now += 1
        if size:
            peer.send(WINDOW_UPDATE, struct.pack(">I", size), 0, 0)
            peer.send(WINDOW_UPDATE, struct.pack(">I", size), 0, 1)
        peer.connection.sweep(peer.clock.now)


@pytest.mark.parametrize("size", [0, 1, 1000])
@pytest.mark.parametrize("is_paused", [False, True])
def test_a_stream_whose_answer_is_taken_too_slowly_is_reset_in_time(peer: Peer, size, is_paused):
    heard = peer.open(1, 5)
    assert heard is not None
    heard.stream.respond(b"\x88", bytes(10**6), b"\x88")
    taking(peer, size, 50)
    if is_paused:
        peer.connection.pause_writing()
    taking(peer, size, 10)
    assert heard.stream.is_open
    peer.wire.frames()
    taking(peer, size, 1)
    assert peer.reset() is ErrorCode.CANCEL
    assert heard.is_gone


def test_an_answer_that_is_taken_at_the_pace_may_take_its_time(peer: Peer):
    heard = peer.open(1, 5)
    assert heard is not None
    heard.stream.respond(b"\x88", bytes(10**6), b"\x88")
    taking(peer, 1024, 600)
    assert heard.stream.is_open
    taking(peer, 0, 122)
    assert heard.is_gone


def test_what_the_connection_cannot_write_waits_in_the_streams(peer: Peer):
    peer.send(SETTINGS, struct.pack(">HI", 4, 2**20))
    peer.send(WINDOW_UPDATE, struct.pack(">I", 2**20), 0, 0)
    heard = peer.open(1)
    assert heard is not None
    peer.wire.frames()
    peer.connection.pause_writing()
    heard.stream.send(bytes(100_000))
    assert (peer.wire.frames(), heard.stream.is_waiting) == ([], True)
    peer.connection.resume_writing()
    assert sum(len(payload) for *_, payload in peer.wire.frames()) == 100_000
    assert (heard.drains, heard.stream.is_waiting) == (1, False)


def test_a_large_answer_stops_where_the_connection_is_full_whatever_the_windows_allow(peer: Peer, monkeypatch):
    def write(data: bytes | memoryview) -> None:
        peer.wire.written += data
        if len(peer.wire.written) > 65_536 and peer.wire.reads:
            peer.connection.pause_writing()

    monkeypatch.setattr(peer.wire, "write", write)
    peer.send(SETTINGS, struct.pack(">HIHI", 4, 2**30, 5, 2**24 - 1))
    peer.send(WINDOW_UPDATE, struct.pack(">I", 2**30), 0, 0)
    heard = peer.open(1, 5)
    assert heard is not None
    peer.wire.frames()
    heard.stream.respond(b"\x88", bytes(10**6), b"\x88")
    sent = 0
    while not peer.wire.reads:
        assert len(peer.wire.written) < 150_000
        sent += sum(len(payload) for kind, _, _, payload in peer.wire.frames() if kind == DATA)
        peer.connection.resume_writing()
    assert sent + sum(len(payload) for kind, _, _, payload in peer.wire.frames() if kind == DATA) == 10**6
    assert not heard.stream.is_open


def test_streams_that_wait_for_the_connection_take_turns(peer: Peer):
    peer.send(SETTINGS, struct.pack(">HI", 4, 2**20))
    streams = [peer.open(number, 5) for number in (1, 3, 5)]
    for heard in streams:
        assert heard is not None
        heard.stream.respond(b"\x88", bytes(10**5), b"\x88")
    peer.wire.frames()
    for _ in range(6):
        peer.send(WINDOW_UPDATE, struct.pack(">I", 100), 0, 0)
    assert [stream for _, _, stream, _ in peer.wire.frames()] == [1, 3, 5, 1, 3, 5]


def test_a_connection_that_nobody_reads_is_cut_in_time(peer: Peer):
    peer.connection.pause_writing()
    peer.connection.sweep(peer.clock.now + 59)
    assert not peer.wire.is_closed
    peer.connection.sweep(peer.clock.now + 61)
    assert peer.wire.is_closed
