"""The chunked transfer coding of a request (RFC 9112, 7.1), read strictly and within bounds."""

import re
from http import HTTPStatus

from services.gateway.http.heads import RefusedError

MAX_LINE_BYTES = 256
"""Longest line with a chunk's size and extensions, in bytes."""

MAX_TRAILER_BYTES = 8_192
"""Most bytes of fields after the last chunk; they are checked and thrown away."""

FREE_FRAMING_BYTES = 16_384
"""Size lines and extensions may take so many bytes beyond those of the content: one-byte chunks cost much and say little."""

_SIZE_LINE, _CHUNK_END, _TRAILER_LINE = range(3)
"""What the next line is: a chunk's size, the empty end of a chunk, or a trailer."""

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;" + _TOKEN + rb"(?:=(?:" + _TOKEN + rb'|"[\t\x20\x21\x23-\x5b\x5d-\x7e]*+"))?)*+')
_SIZE_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,15}(?:;[\t\x20-\x7e]*+)?+\r?")
_TRAILER = re.compile(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+")
_TRAILER_BEGUN = re.compile(rb"[\t\x20-\x7e\x80-\xff]*+\r?")


class ChunkReader:
    """Takes chunked content apart as it comes.

    Attributes
    ----------
    is_complete
        Whether the last chunk and the trailers have come.
    rest
        What came after them; it belongs to the next request.
    """

    __slots__ = ("_content_bytes", "_expected", "_framing_bytes", "_held", "_left", "_trailer_bytes", "is_complete", "rest")

    def __init__(self) -> None:
        self._held = b""
        self._expected = _SIZE_LINE
        self._left = 0
        self._content_bytes = 0
        self._framing_bytes = 0
        self._trailer_bytes = 0
        self.is_complete = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """The content in what came.

        Raises
        ------
        RefusedError
            It is malformed or over a bound.
        """
        if self._held:
            data, self._held = self._held + data, b""
        content: list[bytes] = []
        at = 0
        while at < len(data) and not self.is_complete:
            if self._left:
                content.append(data[at : at + self._left])
                at += len(content[-1])
                self._left -= len(content[-1])
                self._content_bytes += len(content[-1])
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._hold(data[at:])
                break
            self._line(data[at:end])
            at = end + 2
        if self.is_complete:
            self.rest = data[at:]
        return content[0] if len(content) == 1 else b"".join(content)

    def _line(self, line: bytes) -> None:
        if self._expected == _SIZE_LINE:
            self._size(line)
        elif self._expected == _TRAILER_LINE:
            self._trailer(line)
        elif line:
            raise _malformed()
        else:
            self._expected = _SIZE_LINE

    def _size(self, line: bytes) -> None:
        match = _SIZE.fullmatch(line) if len(line) <= MAX_LINE_BYTES else None
        if match is None:
            raise _malformed()
        self._framing_bytes += len(line) + 4
        if self._framing_bytes > FREE_FRAMING_BYTES + self._content_bytes:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the framing of the chunks outweighs their content")
        self._left = int(match.group(1), 16)
        self._expected = _CHUNK_END if self._left else _TRAILER_LINE

    def _trailer(self, line: bytes) -> None:
        if not line:
            self.is_complete = True
            return
        self._trailer_bytes += len(line) + 2
        if self._trailer_bytes > MAX_TRAILER_BYTES:
            raise _trailers_too_large()
        if not _TRAILER.fullmatch(line):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a trailer is not a header field")

    def _hold(self, line: bytes) -> None:
        """Keep a line whose end has not come, unless it is bad already."""
        if self._expected == _SIZE_LINE:
            is_good = len(line) <= MAX_LINE_BYTES and _SIZE_BEGUN.fullmatch(line) is not None
        elif self._expected == _CHUNK_END:
            is_good = line == b"\r"
        else:
            if self._trailer_bytes + len(line) > MAX_TRAILER_BYTES:
                raise _trailers_too_large()
            is_good = _TRAILER_BEGUN.fullmatch(line) is not None
        if not is_good:
            raise _malformed()
        self._held = line


def _malformed() -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, "the chunks of the request body are malformed")


def _trailers_too_large() -> RefusedError:
    return RefusedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the trailers are larger than the {MAX_TRAILER_BYTES} bytes accepted")
