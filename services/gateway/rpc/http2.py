"""HTTP/2, the server's side, as far as gRPC needs it: frames, streams, flow control in both directions, and limits on all of it.

A connection is an asyncio protocol. What arrives is handed to the streams' receivers in the call of ``data_received`` in which it is
complete; what is answered is written as one piece if the peer's windows allow. There are no tasks and no locks here.

References
----------
RFC 9113, "HTTP/2". Left out, because gRPC does not use them: server push, priorities, upgrade from HTTP/1.1.
"""

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol as Interface
from typing import cast

from services.gateway.rpc.hpack import CompressionError, Fields, HeaderDecoder, is_sound

log = logging.getLogger(__name__)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD_BYTES = 9
_HEAD = struct.Struct(">BHBBI")
_U32 = struct.Struct(">I")
_SETTING = struct.Struct(">HI")

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = range(10)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20

_DEFAULT_WINDOW = 65_535
_MAX_WINDOW = 2**31 - 1
_DEFAULT_FRAME_BYTES = 16_384
_MAX_FRAME_BYTES = 2**24 - 1
_MOST_SENT_BYTES = 65_536
"""Data leaves in frames of at most this size, whatever the peer takes: so a transport that is full holds little more than it says."""


_PONG_S = 0.005
"""An answer to a PING waits so long for something to travel with: grpc-go sends one with nearly every call, to measure the path, and an
answer of its own would double the system calls."""


class ErrorCode(IntEnum):
    """Why a stream or a connection is ended (RFC 9113 §7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class ConnectionFault(Exception):  # noqa: N818 - an error of the peer
    """The peer broke the protocol beyond one stream: GOAWAY, and the connection is closed."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _StreamFault(Exception):  # noqa: N818 - an error of the peer
    """The peer broke the protocol on one stream: RST_STREAM."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code.name)
        self.code = code


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may take.

    Attributes
    ----------
    stream_window_bytes
        What a peer may send on one stream before something of it was consumed; at least the largest message and its prefix.
    header_block_bytes
        Longest header block, compressed; a longer one costs the connection.
    strikes
        Frames that cost us work and bring no request forward (resets, pings, settings, empty data, …) which a peer may send between two
        sweeps; more cost the connection.
    first_request_s, block_s
        Seconds until the preface must be complete, and a header block or frame that has begun.
    idle_s
        Seconds without a stream after which a connection is told to go away.
    bytes_per_s
        Slowest pace of what the peer sends and takes, in bytes per second.
    body_s
        A message must be complete after so many seconds, or come at the pace: each such period is looked at by itself.
    write_s
        In every period of so many seconds a client must take what waits for it at the pace; a connection may not be full for longer.
    """

    streams: int = 1_000
    stream_window_bytes: int = 2**20
    frame_bytes: int = 2**18
    header_block_bytes: int = 16_384
    strikes: int = 10_000
    first_request_s: float = 10.0
    block_s: float = 10.0
    idle_s: float = 600.0
    bytes_per_s: float = 1024.0
    body_s: float = 60.0
    write_s: float = 60.0


class Receiver(Interface):
    """What is done with what arrives on a stream; none of these raises."""

    def data(self, chunk: bytes, is_last: bool) -> None:
        """A piece of the peer's data; ``is_last``: the peer sends no more. It is consumed by ``Stream.consumed``."""
        ...

    def drained(self) -> None:
        """What had to wait for the peer's windows has been sent."""
        ...

    def gone(self) -> None:
        """The peer gave the stream up, or the connection is lost; called unless the stream was ended from here."""
        ...


class Stream:
    """One request and its answer.

    Attributes
    ----------
    opened_s
        Time of the event loop's clock when the headers were complete, in seconds.
    has_ended
        Whether the peer has sent all that it will.
    """

    __slots__ = (
        "_coming_s",
        "_expected",
        "_has_waited",
        "_outbox",
        "_received",
        "_recv_window",
        "_send_window",
        "_stuck_s",
        "_taken",
        "_trailers",
        "connection",
        "has_ended",
        "id",
        "is_open",
        "opened_s",
        "receiver",
    )

    def __init__(self, connection: "Connection", stream_id: int, opened_s: float, send_window: int, recv_window: int) -> None:
        self.connection = connection
        self.id = stream_id
        self.opened_s = opened_s
        self.receiver: Receiver | None = None
        self.has_ended = False
        self.is_open = True
        self._send_window = send_window
        self._recv_window = recv_window
        self._outbox: deque[memoryview] | None = None
        self._has_waited = False
        self._stuck_s: float | None = None
        self._taken = 0
        self._coming_s = opened_s
        self._received = 0
        self._expected: int | None = None
        self._trailers: bytes | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether data waits because the peer's windows are used up, or the connection is full."""
        return bool(self._outbox)

    def respond(self, head: bytes, data: bytes, trailers: bytes) -> None:
        """A whole answer: header block, data, and the block of trailers that ends the stream; nothing once the stream has ended."""
        if not self.is_open:
            return
        connection = self.connection
        size = len(data)
        if self._outbox or size > connection.frame_room or size > self._send_window or not size:
            self.send_head(head)
            self.send(data)
            self.end(trailers)
            return
        stream_id = self.id
        connection.send_window -= size
        connection.write(
            b"".join(
                (
                    _head(len(head), _HEADERS, _END_HEADERS, stream_id),
                    head,
                    _head(size, _DATA, 0, stream_id),
                    data,
                    _head(len(trailers), _HEADERS, _END_HEADERS | _END_STREAM, stream_id),
                    trailers,
                )
            )
        )
        connection.close_stream(self)

    def send_head(self, block: bytes, *, is_last: bool = False) -> None:
        """A header block; ``is_last`` ends the stream with it."""
        if self.is_open:
            flags = _END_HEADERS | _END_STREAM if is_last else _END_HEADERS
            self.connection.write(_head(len(block), _HEADERS, flags, self.id) + block)
            if is_last:
                self.connection.close_stream(self)

    def send(self, data: bytes) -> None:
        """Data, as soon as the peer's windows allow."""
        if self.is_open and data:
            if self._outbox is None:
                self._outbox = deque()
            self._outbox.append(memoryview(data))
            self.pump()

    def end(self, trailers: bytes, *, at_once: bool = False) -> None:
        """The trailers, after all data, or ``at_once`` instead of what has to wait; they end the stream."""
        if self.is_open:
            if at_once:
                self._outbox = None
            self._trailers = trailers
            self.pump()

    def reset(self, code: ErrorCode) -> None:
        """End the stream at once."""
        if self.is_open:
            self.connection.write(_head(4, _RST_STREAM, 0, self.id) + _U32.pack(code))
            self.connection.close_stream(self)

    def consumed(self, size: int) -> None:
        """So many bytes of the peer's data need no more room: it may send as many again."""
        if size and self.is_open and not self.has_ended:
            self._recv_window += size
            self.connection.write(_head(4, _WINDOW_UPDATE, 0, self.id) + _U32.pack(size))

    def pump(self) -> None:
        """Send what the windows allow."""
        connection, outbox, has_waited = self.connection, self._outbox, self._has_waited
        while outbox:
            room = min(self._send_window, connection.frame_room)
            if room <= 0:
                connection.is_blocked = self._has_waited = True
                if self._stuck_s is None:
                    self._stuck_s, self._taken = connection.now_s, 0
                return
            piece = outbox[0]
            if len(piece) <= room:
                outbox.popleft()
            else:
                outbox[0] = piece[room:]
                piece = piece[:room]
            self._send_window -= len(piece)
            self._taken += len(piece)
            connection.send_window -= len(piece)
            connection.write(_head(len(piece), _DATA, 0, self.id))
            connection.write(piece)
        self._has_waited, self._stuck_s = False, None
        if self._trailers is not None:
            trailers, self._trailers = self._trailers, None
            self.send_head(trailers, is_last=True)
        elif has_waited and self.receiver is not None:
            self.receiver.drained()

    def grow(self, size: int) -> None:
        """The peer takes so many bytes more (fewer, if negative) on this stream."""
        self._send_window += size
        if self._send_window > _MAX_WINDOW:
            raise _StreamFault(ErrorCode.FLOW_CONTROL_ERROR)
        if self._outbox:
            self.pump()

    def expect(self, length: bytes) -> None:
        """Hold the peer to the length of data that it has announced."""
        if not (length.isdigit() and len(length) < 19):
            raise _StreamFault(ErrorCode.PROTOCOL_ERROR)
        self._expected = int(length)

    def count(self, size: int) -> None:
        """Count data: towards what was announced, and as progress."""
        self._received += size
        if self._expected is not None:
            self._expected -= size

    def close_remote(self) -> None:
        """The peer has sent all; raises unless that is what it has announced."""
        self.has_ended = True
        if self._expected:
            raise _StreamFault(ErrorCode.PROTOCOL_ERROR)

    def is_stuck(self, now_s: float, limits: Limits) -> bool:
        """Whether the peer took too little of what waits for it in the period that is over now; then the next one begins."""
        if self._stuck_s is None or now_s - self._stuck_s <= limits.write_s:
            return False
        is_slow = self._taken < limits.write_s * limits.bytes_per_s
        self._stuck_s, self._taken = now_s, 0
        return is_slow

    def is_late(self, now_s: float, limits: Limits) -> bool:
        """Whether what the peer has to send came too slowly in the period that is over now; then the next one begins."""
        if self.has_ended or now_s - self._coming_s <= limits.body_s:
            return False
        is_slow = self._received < limits.body_s * limits.bytes_per_s
        self._coming_s, self._received = now_s, 0
        return is_slow

    def begin_message(self, size: int) -> None:
        """A message that has a time of its own has begun; so many bytes of it are there."""
        self._coming_s, self._received = self.connection.now_s, size

    def arrived(self, size: int) -> None:
        """Account for data of the peer."""
        self._recv_window -= size
        if self._recv_window < 0:
            raise _StreamFault(ErrorCode.FLOW_CONTROL_ERROR)


Accept = Callable[[Stream, dict[bytes, bytes]], Receiver | None]
"""Answers a stream whose headers (by name, pseudo-headers included) are complete: by a receiver for its data, or at once (None)."""


class Connection(asyncio.Protocol):
    """One client's connection.

    Parameters
    ----------
    accept
        Is given every stream.
    on_made
        Called once, when the client is known; whether the connection may stay.
    on_lost
        Called once, when the connection is gone.

    Attributes
    ----------
    client
        The client's host and port; None where there are none.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        accept: Accept,
        limits: Limits,
        on_made: "Callable[[Connection], bool]",
        on_lost: "Callable[[Connection], None]",
    ) -> None:
        self._loop = loop
        self._accept = accept
        self._limits = limits
        self._on_made = on_made
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._decoder = HeaderDecoder()
        self._buffer = b""
        self._has_preface = False
        self._has_settings = False
        self._streams: dict[int, Stream] = {}
        self._cut: dict[int, None] = {}
        self._last_id = 0
        self._block: tuple[int, int, bytearray] | None = None
        self._peer_window = _DEFAULT_WINDOW
        self._peer_frame_bytes = _DEFAULT_FRAME_BYTES
        self._recv_window = _MAX_WINDOW
        self._strikes = 0
        self._stalled_s = self._quiet_s = loop.time()
        self._is_leaving = False
        self._is_closed = False
        self._pongs = b""
        self._pong_timer: asyncio.TimerHandle | None = None
        self.send_window = _DEFAULT_WINDOW
        self.is_blocked = False
        self._served_id = 0
        self._paused_s: float | None = None
        self.client: tuple[str, int] | None = None
        self.peer = ""
        self._handlers: tuple[Callable[[int, int, bytes], None], ...] = (
            self._on_data,
            self._on_headers,
            self._on_priority,
            self._on_reset,
            self._on_settings,
            self._on_push,
            self._on_ping,
            self._on_goaway,
            self._on_window,
            self._on_continuation,
        )

    # What the streams use

    @property
    def frame_room(self) -> int:
        """Bytes of data that may leave in one frame now, as far as the connection is concerned."""
        return min(self.send_window, self._peer_frame_bytes) if self._paused_s is None else 0

    @property
    def now_s(self) -> float:
        """The event loop's clock."""
        return self._loop.time()

    @property
    def open_streams(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes; nothing happens once the connection is closed."""
        if self._transport is not None and not self._is_closed:
            if self._pongs:
                data, self._pongs = self._pongs + data, b""
            self._transport.write(data)

    def _write_pongs(self) -> None:
        self._pong_timer = None
        if self._pongs:
            self.write(b"")

    def close_stream(self, stream: Stream) -> None:
        """A stream was ended from here; a peer that still sends on it is asked to stop, and what is under way is passed over."""
        stream.is_open = False
        stream.receiver = None
        del self._streams[stream.id]
        if not stream.has_ended:
            self.write(_head(4, _RST_STREAM, 0, stream.id) + _U32.pack(ErrorCode.NO_ERROR))
            self._pass_over(stream.id)
        self._after_close()

    # The transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.client = peer[:2]
            self.peer = f"{peer[0]}:{peer[1]}"
        if not self._on_made(self):
            # Before any greeting: to a client that was greeted this would be no failure, and it would be back at once.
            self._is_closed = True
            self._transport.abort()
            return
        limits = self._limits
        settings = ((3, limits.streams), (4, limits.stream_window_bytes), (5, limits.frame_bytes), (6, limits.header_block_bytes))
        payload = b"".join(_SETTING.pack(*setting) for setting in settings)
        more = _head(4, _WINDOW_UPDATE, 0, 0) + _U32.pack(_MAX_WINDOW - _DEFAULT_WINDOW)
        self._transport.write(_head(len(payload), _SETTINGS, 0, 0) + payload + more)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._is_closed = True
        if self._pong_timer is not None:
            self._pong_timer.cancel()
        self._give_up_all()
        self._on_lost(self)

    def pause_writing(self) -> None:
        # Whoever does not read what we write is not read either.
        self._paused_s = self._loop.time()
        if self._transport is not None and not self._is_closed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused_s = None
        if self._transport is not None and not self._is_closed:
            self._transport.resume_reading()
            self._pump()

    def data_received(self, data: bytes) -> None:
        if self._is_closed:
            return
        if self._buffer:
            data = self._buffer + data
        try:
            self._read(data)
        except ConnectionFault as fault:
            log.info("closed a gRPC connection from %s: %s", self.peer, fault)
            self._fail(fault.code)

    def eof_received(self) -> bool:
        return False

    # Life

    def sweep(self, now_s: float) -> None:
        """Close what is stalled, and tell what is idle to go away; called every few seconds."""
        self._strikes = 0
        limits = self._limits
        if self._is_closed:
            if now_s - self._quiet_s > limits.block_s:
                self.abort()
        elif not self._has_settings:
            if now_s - self._quiet_s > limits.first_request_s:
                self.abort()
        elif self._paused_s is not None and now_s - self._paused_s > limits.write_s:
            self.abort()
        elif self._paused_s is None and (self._buffer or self._block is not None) and now_s - self._stalled_s > limits.block_s:
            self._fail(ErrorCode.ENHANCE_YOUR_CALM)
        elif not self._streams and now_s - self._quiet_s > limits.idle_s:
            self.leave()
        else:
            for stream in [stream for stream in self._streams.values() if stream.is_stuck(now_s, limits)]:
                self._reset(stream.id, ErrorCode.CANCEL)

    def late(self, now_s: float) -> list[Stream]:
        """Streams on which the peer sends too slowly."""
        return [stream for stream in self._streams.values() if stream.is_late(now_s, self._limits)]

    def leave(self) -> None:
        """Take no new streams; close when those that are open have ended."""
        if not self._is_leaving and not self._is_closed:
            self._is_leaving = True
            self.write(_head(8, _GOAWAY, 0, 0) + _U32.pack(self._last_id) + _U32.pack(ErrorCode.NO_ERROR))
            if not self._streams:
                self._close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, code: ErrorCode) -> None:
        self.write(_head(8, _GOAWAY, 0, 0) + _U32.pack(self._last_id) + _U32.pack(code))
        self._close()
        self._give_up_all()

    def _give_up_all(self) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            _give_up(stream)

    def _close(self) -> None:
        self._is_closed = True
        self._quiet_s = self._loop.time()
        self._buffer = b""
        if self._transport is not None:
            self._transport.close()

    def _pass_over(self, stream_id: int) -> None:
        """What the peer still sends on a stream that was ended from here is nothing wrong."""
        self._cut[stream_id] = None
        if len(self._cut) > self._limits.streams:
            del self._cut[next(iter(self._cut))]

    def _after_close(self) -> None:
        if not self._streams:
            self._quiet_s = self._loop.time()
            if self._is_leaving and not self._is_closed:
                self._close()

    def _strike(self) -> None:
        self._strikes += 1
        if self._strikes > self._limits.strikes:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that bring no request forward")

    # Frames

    def _read(self, data: bytes) -> None:
        position, size = 0, len(data)
        if not self._has_preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "what came first is not HTTP/2's preface")
            if size < len(PREFACE):
                self._buffer = data
                return
            self._has_preface = True
            position = len(PREFACE)
        handlers, longest = self._handlers, self._limits.frame_bytes
        while size - position >= _HEAD_BYTES:
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, position)
            length = high << 16 | low
            if length > longest:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes; {longest} are taken")
            start = position + _HEAD_BYTES
            position = start + length
            if position > size:
                position = start - _HEAD_BYTES
                break
            if not self._has_settings and kind != _SETTINGS:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            if self._block is not None and kind != _CONTINUATION:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a header block was broken off")
            if kind < len(handlers):
                try:
                    handlers[kind](flags, stream_id & _MAX_WINDOW, data[start:position])
                except _StreamFault as fault:
                    self._reset(stream_id & _MAX_WINDOW, fault.code)
                if self._is_closed:
                    return
            else:
                self._strike()
        if position < size:
            if not self._buffer or position:
                self._stalled_s = self._loop.time()
            self._buffer = data[position:]
        else:
            self._buffer = b""

    def _reset(self, stream_id: int, code: ErrorCode) -> None:
        self._strike()
        self.write(_head(4, _RST_STREAM, 0, stream_id) + _U32.pack(code))
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            _give_up(stream)
            self._pass_over(stream_id)
            self._after_close()

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._recv_window -= size
        if self._recv_window < 2**30:
            self.write(_head(4, _WINDOW_UPDATE, 0, 0) + _U32.pack(_MAX_WINDOW - self._recv_window))
            self._recv_window = _MAX_WINDOW
        stream = self._streams.get(stream_id)
        if stream is None:
            self._refuse_data(stream_id, flags)
            return
        if stream.has_ended:
            raise _StreamFault(ErrorCode.STREAM_CLOSED)
        stream.arrived(size)
        if flags & _PADDED:
            payload = _without_padding(payload)
            stream.consumed(size - len(payload))
        stream.count(len(payload))
        is_last = bool(flags & _END_STREAM)
        if is_last:
            stream.close_remote()
        elif not payload:
            self._strike()
        receiver = stream.receiver
        if receiver is not None:
            receiver.data(payload, is_last)

    def _refuse_data(self, stream_id: int, flags: int) -> None:
        if stream_id == 0 or stream_id > self._last_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "data on a stream that was never opened")
        if stream_id not in self._cut:
            raise _StreamFault(ErrorCode.STREAM_CLOSED)
        if flags & _END_STREAM:
            del self._cut[stream_id]

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & _PADDED:
            payload = _without_padding(payload)
        if flags & _HAS_PRIORITY:
            if len(payload) < 5:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            if _U32.unpack_from(payload)[0] & _MAX_WINDOW == stream_id:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")
            payload = payload[5:]
        if flags & _END_HEADERS:
            self._headers(stream_id, flags, payload)
        else:
            self._block = (stream_id, flags, bytearray(payload))
            self._stalled_s = self._loop.time()
            self._check_block()

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without a header block")
        self._strike()
        _, first_flags, block = self._block
        block += payload
        self._check_block()
        if flags & _END_HEADERS:
            self._block = None
            self._headers(stream_id, first_flags, bytes(block))

    def _check_block(self) -> None:
        if self._block is not None and len(self._block[2]) > self._limits.header_block_bytes:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"a header block above {self._limits.header_block_bytes} bytes")

    def _headers(self, stream_id: int, flags: int, block: bytes) -> None:
        if len(block) > self._limits.header_block_bytes:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"a header block above {self._limits.header_block_bytes} bytes")
        try:
            fields = self._decoder.decode(block)
        except CompressionError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, str(error)) from error
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._trailing(stream, flags, fields)
        elif stream_id <= self._last_id:
            self._refuse_headers(stream_id, flags)
        elif stream_id % 2 == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client cannot open stream {stream_id}")
        else:
            self._open(stream_id, flags, fields)

    def _trailing(self, stream: Stream, flags: int, fields: Fields) -> None:
        """Headers after data: they must end the stream, and hold nothing that belongs in front."""
        if stream.has_ended:
            raise _StreamFault(ErrorCode.STREAM_CLOSED)
        if not flags & _END_STREAM or any(name[:1] == b":" or not is_sound(name, value) for name, value in fields):
            raise _StreamFault(ErrorCode.PROTOCOL_ERROR)
        stream.close_remote()
        if stream.receiver is not None:
            stream.receiver.data(b"", True)

    def _refuse_headers(self, stream_id: int, flags: int) -> None:
        if stream_id not in self._cut:
            raise ConnectionFault(ErrorCode.STREAM_CLOSED, f"headers on stream {stream_id}, which has ended")
        if flags & _END_STREAM:
            del self._cut[stream_id]

    def _open(self, stream_id: int, flags: int, fields: Fields) -> None:
        self._last_id = stream_id
        if len(self._streams) >= self._limits.streams or self._is_leaving:
            self._pass_over(stream_id)
            raise _StreamFault(ErrorCode.REFUSED_STREAM)
        headers = _request(fields)
        if headers is None or (self._decoder.is_suspect and not all(is_sound(*field) for field in fields)):
            self._pass_over(stream_id)
            raise _StreamFault(ErrorCode.PROTOCOL_ERROR)
        stream = Stream(self, stream_id, self._loop.time(), self._peer_window, self._limits.stream_window_bytes)
        length = headers.get(b"content-length")
        if length is not None:
            stream.expect(length)
        if flags & _END_STREAM:
            stream.close_remote()
        self._streams[stream_id] = stream
        receiver = self._accept(stream, headers)
        if stream.is_open:
            stream.receiver = receiver
            if receiver is not None and stream.has_ended:
                receiver.data(b"", True)

    def _on_priority(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        self._strike()
        if stream_id == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY of no stream")
        if len(payload) != 5:
            raise _StreamFault(ErrorCode.FRAME_SIZE_ERROR)
        if _U32.unpack_from(payload)[0] & _MAX_WINDOW == stream_id:
            raise _StreamFault(ErrorCode.PROTOCOL_ERROR)

    def _on_reset(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        if stream_id == 0 or stream_id > self._last_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "RST_STREAM of a stream that was never opened")
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM has 4 bytes")
        self._strike()
        self._cut.pop(stream_id, None)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            _give_up(stream)
            self._after_close()

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & _ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "an acknowledgement holds nothing")
            return
        if len(payload) % _SETTING.size:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a broken length")
        self._strike()
        self._has_settings = True
        for name, value in _SETTING.iter_unpack(payload):
            self._set(name, value)
        self.write(_head(0, _SETTINGS, _ACK, 0))

    def _set(self, name: int, value: int) -> None:
        match name:
            case 2 if value > 1:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
            case 4:
                if value > _MAX_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
                change, self._peer_window = value - self._peer_window, value
                try:
                    for stream in list(self._streams.values()):
                        stream.grow(change)
                except _StreamFault:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE makes a window too large") from None
            case 5:
                if not _DEFAULT_FRAME_BYTES <= value <= _MAX_FRAME_BYTES:
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range")
                self._peer_frame_bytes = min(value, _MOST_SENT_BYTES)

    def _on_push(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client cannot push")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PING of a stream")
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PING has 8 bytes")
        if not flags & _ACK:
            self._strike()
            self._pongs += _head(8, _PING, _ACK, 0) + payload
            if self._pong_timer is None:
                self._pong_timer = self._loop.call_later(_PONG_S, self._write_pongs)

    def _on_goaway(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        if stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "GOAWAY of a stream")
        if len(payload) < 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY is too short")
        self.leave()

    def _on_window(self, flags: int, stream_id: int, payload: bytes) -> None:  # noqa: ARG002
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE has 4 bytes")
        size = _U32.unpack(payload)[0] & _MAX_WINDOW
        if stream_id == 0:
            self._widen(size)
            return
        if stream_id > self._last_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of a stream that was never opened")
        stream = self._streams.get(stream_id)
        if stream is None:
            self._strike()
        elif size == 0:
            raise _StreamFault(ErrorCode.PROTOCOL_ERROR)
        else:
            stream.grow(size)

    def _widen(self, size: int) -> None:
        """The peer takes so many bytes more on all streams together."""
        self.send_window += size
        if size == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        if self.send_window > _MAX_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the window is too large")
        self._pump()

    def _pump(self) -> None:
        """Send what waits, as far as there is room now; who was served last is last in turn."""
        if self.is_blocked:
            self.is_blocked = False
            waiting = [stream for stream in self._streams.values() if stream.is_waiting]
            for stream in sorted(waiting, key=lambda stream: stream.id <= self._served_id):
                if self.frame_room > 0:
                    self._served_id = stream.id
                stream.pump()


def _head(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    return _HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream_id)


def _give_up(stream: Stream) -> None:
    stream.is_open = False
    receiver, stream.receiver = stream.receiver, None
    if receiver is not None:
        receiver.gone()


def _without_padding(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]


_REQUIRED = (b":method", b":scheme", b":path")


def _request(fields: Fields) -> dict[bytes, bytes] | None:
    """A request's headers by name, the pseudo-headers among them; None when those are not as they must be (RFC 9113 §8.3)."""
    headers = dict(fields)
    pseudo = 0
    for name, _ in fields:
        if name[:1] != b":":
            break
        pseudo += 1
    found = sum(1 for name in headers if name[:1] == b":")
    if found != pseudo or pseudo > 4 or any(name[:1] == b":" for name, _ in fields[pseudo:]):
        return None
    if not all(name in headers for name in _REQUIRED) or not headers[b":path"].startswith(b"/"):
        return None
    return headers
