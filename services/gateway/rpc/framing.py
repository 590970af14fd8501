"""Messages of gRPC as they stand in HTTP/2's data: a flag, a length, and the message, compressed or not; and its words in headers.

References
----------
gRPC, "gRPC over HTTP2" and "Compression".
"""

import re
import struct
import zlib

from libs.errors import InvalidArgumentError, PayloadTooLargeError
from services.gateway.doors.compression import MIN_COMPRESSED_BYTES, decompressed
from services.gateway.rpc.statuses import UnimplementedError

PREFIX = struct.Struct(">BI")
ENCODINGS = ("identity", "deflate", "gzip")
MAX_TIMEOUT_MS = 3_600_000

_LEVEL = 1
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_MS = {b"H": 3_600_000.0, b"M": 60_000.0, b"S": 1_000.0, b"m": 1.0, b"u": 1e-3, b"n": 1e-6}
_MOST_MESSAGE_BYTES = 2_000
_ESCAPED = re.compile(rb"[^ -$&-~]")


def announced(body: bytes | bytearray, max_bytes: int) -> int | None:
    """Length of the first framed message, with its prefix; None while the prefix is not complete.

    Raises
    ------
    PayloadTooLargeError
        The message would be longer than ``max_bytes``.
    """
    if len(body) < PREFIX.size:
        return None
    length: int = PREFIX.unpack_from(body)[1]
    if length > max_bytes:
        raise PayloadTooLargeError(f"the message has {length} bytes; at most {max_bytes} are accepted")
    return PREFIX.size + length


def only_announced(body: bytes | bytearray, max_bytes: int) -> int | None:
    """``announced`` for a call that takes one message.

    Raises
    ------
    InvalidArgumentError
        There is more than the message.
    PayloadTooLargeError
        The message would be longer than ``max_bytes``.
    """
    end = announced(body, max_bytes)
    if end is not None and end < len(body):
        raise InvalidArgumentError("the method takes one message; more came")
    return end


def only_message(body: bytes | bytearray, encoding: str | None, max_bytes: int) -> bytes:
    """The message of a call that takes one.

    Raises
    ------
    InvalidArgumentError
        There is none, or more than one, or not all of it, or it is not in its encoding.
    PayloadTooLargeError
        It is longer than ``max_bytes``, or would be when decompressed.
    """
    end = only_announced(body, max_bytes)
    if end is None or end > len(body):
        raise InvalidArgumentError("the request ended before its message was complete")
    return opened(body[0], bytes(memoryview(body)[PREFIX.size :]), encoding, max_bytes)


def opened(flag: int, message: bytes, encoding: str | None, max_bytes: int) -> bytes:
    """A message as it was before compression; raises as ``only_message`` does."""
    if flag == 0:
        return message
    if flag != 1 or encoding is None or encoding == "identity":
        raise InvalidArgumentError("the message is flagged as compressed, and grpc-encoding does not say how")
    return decompressed(message, encoding, max_bytes)


def framed(message: bytes, encoding: str | None = None) -> bytes:
    """A message with its prefix; compressed when there is an encoding and it is worth it."""
    if encoding is None or len(message) < MIN_COMPRESSED_BYTES:
        return PREFIX.pack(0, len(message)) + message
    stream = zlib.compressobj(_LEVEL, wbits=_WINDOWS[encoding])
    packed = stream.compress(message) + stream.flush()
    return PREFIX.pack(1, len(packed)) + packed


def encoding_of(value: bytes | None) -> str | None:
    """The encoding that ``grpc-encoding`` names; None when messages are not compressed.

    Raises
    ------
    UnimplementedError
        One that is not known here.
    """
    if value is None or value == b"identity":
        return None
    name = value.decode("latin-1")
    if name not in _WINDOWS:
        raise UnimplementedError(f"grpc-encoding {name[:40]!r} is not supported; {', '.join(ENCODINGS)} are")
    return name


def timeout_s(value: bytes) -> float:
    """What ``grpc-timeout`` says, in seconds; an hour at most.

    Raises
    ------
    InvalidArgumentError
        It says nothing that can be understood.

    Examples
    --------
    >>> timeout_s(b"1500m")
    1.5
    """
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise InvalidArgumentError(f"grpc-timeout must be up to 8 digits and one of H, M, S, m, u, n, not {value[:40].decode('latin-1')!r}")
    return min(int(match[1]) * _UNIT_MS[match[2]], MAX_TIMEOUT_MS) / 1000


def told(message: str) -> bytes:
    """A sentence as ``grpc-message`` carries it: percent-encoded where it is not printable ASCII.

    >>> told("100 % là")
    b'100 %25 l%C3%A0'
    """
    return _ESCAPED.sub(lambda match: b"%%%02X" % match[0][0], message.encode("utf-8", "replace")[:_MOST_MESSAGE_BYTES])
