"""Reading an artifact's content in a bounded way: a few buffers of memory, whatever the file claims or expands to."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from services.validator.errors import BrokenArtifactError, OversizedContentError

_CHUNK_BYTES = 256 * 1024
_MAX_LINE_BYTES = 64 * 1024 * 1024

COMPRESSIONS: dict[str, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    "bz2": (b"BZh",),
    "xz": (b"\xfd7zXZ\x00",),
    "lzma": (b"\x5d\x00\x00",),
    "zlib": (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"),
    "lz4": (b"\x04\x22\x4d\x18",),
    "zstd": (b"\x28\xb5\x2f\xfd",),
}
"""First bytes of each compression that joblib writes, and of two more that people use."""

READABLE_COMPRESSIONS = ("gzip", "bz2", "xz", "lzma", "zlib")


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class ContentReader:
    """A position in a stream of bytes, with what a scan of opcodes needs: read, read a line, skip.

    Parameters
    ----------
    source
        Where bytes come from; a broken compressed source raises what its decompressor raises.
    limit_bytes
        Bytes that may come out of it.

    Raises
    ------
    OversizedContentError
        More than ``limit_bytes`` came out.
    BrokenArtifactError
        The compressed data are broken or end too early.
    """

    def __init__(self, source: _Source, limit_bytes: int) -> None:
        self._source = source
        self._limit_bytes = limit_bytes
        self._buffer = b""
        self._start = 0
        self._position = 0

    def tell(self) -> int:
        """Return the number of bytes taken so far."""
        return self._position

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer at the end."""
        end = self._start + size
        if end <= len(self._buffer):
            data = self._buffer[self._start : end]
            self._start = end
            self._position += size
            return data
        parts = [self._buffer[self._start :]]
        missing = size - len(parts[0])
        self._buffer, self._start = b"", 0
        while missing > 0 and self._fill():
            parts.append(self._buffer[:missing])
            self._start = len(parts[-1])
            missing -= self._start
        data = b"".join(parts)
        self._position += len(data)
        return data

    def readline(self) -> bytes:
        """Return bytes up to and including the next newline; without one where the content ends."""
        parts: list[bytes] = []
        length = 0
        while length < _MAX_LINE_BYTES:
            if self._start == len(self._buffer) and not self._fill():
                break
            found = self._buffer.find(b"\n", self._start)
            end = len(self._buffer) if found < 0 else found + 1
            parts.append(self._buffer[self._start : end])
            length += end - self._start
            self._start = end
            if found >= 0:
                break
        self._position += length
        return b"".join(parts)

    def skip(self, size: int) -> bool:
        """Pass over ``size`` bytes; return whether there were so many."""
        while size > 0:
            if self._start == len(self._buffer) and not self._fill():
                return False
            step = min(size, len(self._buffer) - self._start)
            self._start += step
            self._position += step
            size -= step
        return True

    def _fill(self) -> bool:
        """Replace the buffer, which is used up, by the next bytes."""
        try:
            self._buffer = self._source.read(_CHUNK_BYTES)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise BrokenArtifactError(f"its compressed data are broken or end too early ({error})") from error
        self._start = 0
        if self._position + len(self._buffer) > self._limit_bytes:
            raise OversizedContentError(f"it expands to more than {self._limit_bytes} bytes")
        return bool(self._buffer)


class _ZlibSource:
    """A zlib stream as joblib writes it: no gzip header, one stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zlib.decompressobj()

    def read(self, size: int, /) -> bytes:
        while not self._decompressor.eof:
            pending = self._decompressor.unconsumed_tail or self._file.read(_CHUNK_BYTES)
            if not pending:
                raise EOFError("the zlib stream ends too early")
            data = self._decompressor.decompress(pending, size)
            if data:
                return data
        return b""


def compression_of(head: bytes) -> str | None:
    """Tell by its first bytes how content is compressed; ``None`` means not at all."""
    for name, prefixes in COMPRESSIONS.items():
        if head.startswith(prefixes):
            return name
    return None


@contextmanager
def open_content(path: Path, compression: str | None, limit_bytes: int) -> Iterator[ContentReader]:
    """Open an artifact's content, decompressed as it is read; ``compression`` is one of ``READABLE_COMPRESSIONS``."""
    openers: dict[str | None, Callable[[BinaryIO], _Source]] = {
        None: lambda file: file,
        "gzip": lambda file: io.BufferedReader(gzip.GzipFile(fileobj=file)),
        "bz2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
        "lzma": lzma.LZMAFile,
        "zlib": _ZlibSource,
    }
    with path.open("rb") as file:
        yield ContentReader(openers[compression](file), limit_bytes)
