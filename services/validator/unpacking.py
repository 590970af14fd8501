"""Archives: what they hold is written to a folder, or they are refused as a whole.

Nothing in an archive is trusted. Names are relative and normal, there are only files and folders, no name comes twice, also not with other
case, nothing comes before the beginning or behind the end, and sizes are counted while they are read, whatever the headers say.

References
----------
POSIX.1-2017 ``pax``, "ustar Interchange Format" and "pax Header Block"; GNU tar, "Basic Tar Format" (long names); PKWARE APPNOTE 6.3.
"""

import hashlib
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from libs.artifacts.manifest import MAX_FILES, File, Manifest, Paths
from libs.artifacts.store import os_errors_of
from libs.errors import InvalidArgumentError
from services.validator.content import ContentReader, open_content
from services.validator.errors import BrokenArtifactError, ForbiddenEntryError, OversizedContentError

MOST_EXPANSION = 200
"""Content over ``UNQUESTIONED_BYTES`` that is so many times as large as its archive is no model: weights hardly shrink at all."""

UNQUESTIONED_BYTES = 64 * 2**20

_CHUNK_BYTES = 256 * 1024
_BLOCK = 512
_MAX_HEADER_BYTES = 1 << 20
_MAX_ENTRIES = 3 * MAX_FILES
"""Folders and headers of headers count, too."""

_MAX_DIRECTORY_BYTES = 8 << 20
_END_RECORD_BYTES, _LONGEST_COMMENT = 22, 65_535
_TAR_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_LEFT_OUT = (".DS_Store",)
_LEFT_OUT_FOLDERS = ("__MACOSX", "__pycache__")
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    struct.error,
    zlib.error,
)


class _Content(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry; ``content`` is to be read before the next entry is asked for, and is None for a folder."""

    name: str
    size_bytes: int
    content: _Content | None


def unpack(path: Path, kind: str, folder: Path, limit_bytes: int) -> Manifest:
    """Write the files of an archive (``tar``, ``tar.gz`` or ``zip``) below a folder, which is empty, and say what they are.

    Raises
    ------
    BrokenArtifactError
        The archive ends too early, is damaged, or something follows its end.
    ForbiddenEntryError
        It has something that no set of files may have, or nothing at all.
    OversizedContentError
        It has more than ``limit_bytes``, or expands beyond what a model could.
    ArtifactStoreUnavailableError
        The disk is full, or cannot be used now.
    """
    limit = min(limit_bytes, max(UNQUESTIONED_BYTES, MOST_EXPANSION * path.stat().st_size))
    entries = _zip_entries(path, limit) if kind == "zip" else _tar_entries(path, "gzip" if kind == "tar.gz" else None, limit)
    files: list[File] = []
    paths = Paths()
    left = limit
    for entry in entries:
        name = _normal(entry.name)
        if not name or entry.content is None or _is_left_out(name):
            continue
        try:
            paths.add(name)
        except InvalidArgumentError as error:
            raise ForbiddenEntryError(f"in it, {error.message}") from error
        files.append(_write(entry, name, folder, left))
        left -= files[-1].size_bytes
    if not files:
        raise ForbiddenEntryError("it has no files")
    return Manifest.of(files)


def _normal(name: str) -> str:
    """A name without what ``tar -C folder .`` puts before each, and the slash of a folder."""
    while name.startswith("./"):
        name = name[2:]
    return "" if name == "." else name


def _is_left_out(name: str) -> bool:
    """Whether this is what an operating system or Python left beside the files."""
    *folders, last = name.split("/")
    return last in _LEFT_OUT or last.startswith("._") or any(folder in _LEFT_OUT_FOLDERS for folder in folders)


def _write(entry: _Entry, name: str, folder: Path, left: int) -> File:
    path = folder / name
    digest, size = hashlib.sha256(), 0
    assert entry.content is not None  # noqa: S101 (folders were passed over; for the type checker)
    with os_errors_of(f"the directory {folder}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")
    with os_errors_of(f"the directory {folder}"), file:
        while data := entry.content.read(_CHUNK_BYTES):
            size += len(data)
            if size > left:
                raise OversizedContentError("it expands to more than a model may have")
            digest.update(data)
            file.write(data)
    if size != entry.size_bytes:
        raise BrokenArtifactError(f"'{name}' in it has {size} bytes instead of {entry.size_bytes}")
    return File(name, digest.hexdigest(), size)


# Tar ---------------------------------------------------------------------------------------------------------------------


class _TarContent:
    """The content of one entry: reads no further."""

    def __init__(self, reader: ContentReader, size: int) -> None:
        self._reader = reader
        self.left = size

    def read(self, size: int, /) -> bytes:
        data = self._reader.read(min(size, self.left))
        if not data and self.left:
            raise BrokenArtifactError("ends too early: the file is truncated")
        self.left -= len(data)
        return data


def _tar_entries(path: Path, compression: str | None, limit_bytes: int) -> Iterator[_Entry]:
    # Headers and padding are not content: a set of 10 000 files of a byte each takes 10 MB.
    with open_content(path, compression, limit_bytes + _MAX_ENTRIES * 2 * _BLOCK) as reader:
        renamed: str | None = None
        resized: int | None = None
        for _ in range(_MAX_ENTRIES):
            header = _tar_header(reader)
            if header is None:
                if renamed is not None or resized is not None:
                    raise BrokenArtifactError("ends too early: the file is truncated")
                _check_end(reader)
                return
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = _tar_text(reader, header)
                renamed = text.rstrip(b"\0").decode("utf-8", "surrogateescape") if header.type == tarfile.GNUTYPE_LONGNAME else renamed
                continue
            if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
                records = _pax_records(_tar_text(reader, header))
                if header.type == tarfile.XGLTYPE:
                    if records.keys() & {"path", "size", "linkpath"}:
                        raise ForbiddenEntryError("it names all its files the same")
                    continue
                renamed, resized = records.get("path", renamed), _size(records, resized)
                continue
            name, size = renamed if renamed is not None else header.name, header.size if resized is None else resized
            renamed = resized = None
            if header.isdir():
                if size:
                    raise BrokenArtifactError(f"the folder '{name}' in it has content")
                yield _Entry(name, 0, None)
                continue
            if not header.isreg() or header.type == tarfile.GNUTYPE_SPARSE:
                raise ForbiddenEntryError(f"'{name}' in it is {_TAR_KINDS.get(header.type, 'neither a file nor a folder')}")
            content = _TarContent(reader, size)
            yield _Entry(name, size, content)
            if not reader.skip(content.left + -size % _BLOCK):
                raise BrokenArtifactError("ends too early: the file is truncated")
        raise ForbiddenEntryError(f"it has more than {MAX_FILES} files")


def _tar_header(reader: ContentReader) -> tarfile.TarInfo | None:
    """The next header; None at the end."""
    block = reader.read(_BLOCK)
    if len(block) < _BLOCK:
        raise BrokenArtifactError("ends too early: the file is truncated")
    if not block.strip(b"\0"):
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise BrokenArtifactError(f"has a damaged header ({error})") from error
    if header.size < 0:
        raise BrokenArtifactError("has a damaged header (a negative size)")
    return header


def _tar_text(reader: ContentReader, header: tarfile.TarInfo) -> bytes:
    if header.size > _MAX_HEADER_BYTES:
        raise ForbiddenEntryError("it has a header of more than a MiB")
    text = reader.read(header.size)
    if len(text) < header.size or not reader.skip(-header.size % _BLOCK):
        raise BrokenArtifactError("ends too early: the file is truncated")
    return text


def _pax_records(text: bytes) -> dict[str, str]:
    """Records ``<length> <key>=<value>\\n``, the length being that of the whole record."""
    records: dict[str, str] = {}
    while text:
        number, _, _ = text.partition(b" ")
        length = int(number) if number.isdigit() and len(number) < 8 else 0
        record, text = text[:length], text[length:]
        key, separator, value = record[len(number) + 1 :].partition(b"=")
        if not separator or not value.endswith(b"\n"):
            raise BrokenArtifactError("has a damaged header (pax)")
        with suppress(UnicodeDecodeError):  # names of users and groups, say, which do not matter here
            records[key.decode()] = value[:-1].decode("utf-8", "surrogateescape" if key == b"path" else "strict")
    if any(key.startswith("GNU.sparse") for key in records):
        raise ForbiddenEntryError("it has a sparse file")
    return records


def _size(records: dict[str, str], before: int | None) -> int | None:
    text = records.get("size")
    if text is None:
        return before
    if not text.isdecimal() or len(text) > 20:
        raise BrokenArtifactError("has a damaged header (pax)")
    return int(text)


def _check_end(reader: ContentReader) -> None:
    """Two blocks of zeros end an archive, and nothing but zeros follows them."""
    if reader.read(_BLOCK) != bytes(_BLOCK):
        raise BrokenArtifactError("ends too early, or something follows its end")
    while rest := reader.read(_CHUNK_BYTES):
        if rest.strip(b"\0"):
            raise BrokenArtifactError("is followed by something else")


# Zip ---------------------------------------------------------------------------------------------------------------------


class _ZipContent:
    """The content of one entry; what its reader raises says that it is damaged."""

    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self._read = read
        self._name = name

    def read(self, size: int, /) -> bytes:
        try:
            return self._read(size)
        except _ZIP_ERRORS as error:
            raise BrokenArtifactError(f"'{self._name}' in it is damaged ({error})") from error


def _zip_entries(path: Path, limit_bytes: int) -> Iterator[_Entry]:
    directory_start, count = _check_zip_end(path)
    try:
        archive = zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise BrokenArtifactError(f"has a damaged directory ({error})") from error
    with archive:
        entries = archive.infolist()
        if len(entries) > _MAX_ENTRIES:
            raise ForbiddenEntryError(f"it has more than {MAX_FILES} files")
        if len(entries) != count:
            raise BrokenArtifactError("has a damaged directory (entries are missing)")
        _check_zip_places(entries, directory_start)
        if sum(entry.file_size for entry in entries) > limit_bytes:
            raise OversizedContentError(f"it expands to more than {limit_bytes} bytes")
        for entry in entries:
            name = entry.orig_filename
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ForbiddenEntryError(f"'{name}' in it is {'a symbolic link' if kind == stat.S_IFLNK else 'no file'}")
            if name.endswith("/") or kind == stat.S_IFDIR:
                if entry.file_size:
                    raise BrokenArtifactError(f"the folder '{name}' in it has content")
                yield _Entry(name, 0, None)
                continue
            if entry.flag_bits & 1:
                raise ForbiddenEntryError(f"'{name}' in it is encrypted")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ForbiddenEntryError(f"'{name}' in it is compressed in another way than by deflate")
            try:
                content = archive.open(entry)
            except _ZIP_ERRORS as error:
                raise BrokenArtifactError(f"'{name}' in it is damaged ({error})") from error
            with content:
                yield _Entry(name, entry.file_size, _ZipContent(content.read, name))


def _check_zip_end(path: Path) -> tuple[int, int]:
    """Return where the directory begins and how many entries it has; the archive ends with its end record, and so with the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END_RECORD_BYTES - _LONGEST_COMMENT))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + _END_RECORD_BYTES:
        raise BrokenArtifactError("its end is missing or damaged: the file is truncated")
    count, directory_bytes, directory_start, comment_bytes = struct.unpack_from("<HIIH", tail, end + 10)
    if end + _END_RECORD_BYTES + comment_bytes != len(tail):
        raise BrokenArtifactError("is followed by something else")
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise ForbiddenEntryError("it has a directory of more than 8 MiB (make a .tar.gz of it)")
    if directory_start + directory_bytes != size - len(tail) + end and directory_start != 0xFFFFFFFF:
        raise BrokenArtifactError("its directory is not where it is said to be: something comes before or in between")
    return size - len(tail) + end - directory_bytes, count


def _check_zip_places(entries: list[zipfile.ZipInfo], directory_start: int) -> None:
    """Entries lie one after the other from the first byte on: none in another, nothing before the first."""
    before = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < before or (before == 0 and entry.header_offset != 0):
            raise BrokenArtifactError("its entries overlap, or something comes before them")
        before = entry.header_offset + 30 + len(entry.orig_filename) + entry.compress_size
    if before > directory_start:
        raise BrokenArtifactError("its entries overlap, or something comes before them")
