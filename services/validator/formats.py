"""What a file is, by its content; its name is never asked."""

import mmap
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from schemas.registry import ArtifactFormat
from schemas.validation import Finding
from services.validator.content import READABLE_COMPRESSIONS, compression_of, open_content
from services.validator.errors import BrokenArtifactError, BrokenPickleError, LongPickleError, OversizedContentError
from services.validator.onnx_graph import OnnxSummary, read_onnx
from services.validator.pickle_stream import PickleFacts, read_pickle
from services.validator.rules import rejection

HEAD_BYTES = 4096
_LARGEST_PICKLE_PROTOCOL = 5
MODEL_SUFFIXES = (".joblib", ".pkl", ".pickle", ".onnx")
_ZIP_OF_FILES = "a zip archive (unpack it"
_MAX_CENTRAL_DIRECTORY_BYTES = 4 * 1024 * 1024

_KNOWN_PREFIXES = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras, PyTables)",
    b"\x93NUMPY": "a NumPy array file",
    b"GGUF": "a GGUF file",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
    b"MZ": "a Windows program",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"PAR1": "a Parquet file",
    b"SQLite format 3\x00": "an SQLite database",
    b"ZF0x": "a compressed file of joblib before 0.10; load it there and save it again",
}
_TEXT_KINDS = {
    b"version https://git-lfs.github.com/spec": "a Git LFS pointer, not the file it points to (run `git lfs pull` first)",
    b"<!doctype html": "an HTML page, perhaps the error page of a download",
    b"<html": "an HTML page, perhaps the error page of a download",
    b"<?xml": "an XML document",
    b"#!": "a script",
}


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a file is.

    Attributes
    ----------
    format
        How it is served, or ``None`` when it cannot be.
    kind
        The same in words, as it follows "the artifact is".
    compression
        How the whole file is compressed.
    pickle, onnx
        What was read on the way, for the format it is.
    findings
        Why it cannot be served, or not yet.
    """

    format: ArtifactFormat | None
    kind: str
    compression: str | None = None
    pickle: PickleFacts | None = None
    onnx: OnnxSummary | None = None
    findings: tuple[Finding, ...] = ()


def archive_kind(path: Path) -> str | None:
    """Tell whether a file is an archive of files, ``tar``, ``tar.gz`` or ``zip``, and not a format that happens to be one."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if _is_tar(head):
        return "tar"
    if compression_of(head) == "gzip":
        with suppress(BrokenArtifactError), open_content(path, "gzip", HEAD_BYTES * 1024) as reader:
            return "tar.gz" if _is_tar(reader.read(HEAD_BYTES)) else None
    if head.startswith(b"PK\x03\x04"):
        with suppress(zipfile.BadZipFile, BrokenArtifactError, OSError, ValueError, NotImplementedError):
            return "zip" if _zip_kind(list(_zip_names(path))).startswith(_ZIP_OF_FILES) else None
    return None


def _is_tar(head: bytes) -> bool:
    """Tell a tar archive by its first header, also one without the magic that came with POSIX."""
    if head[257:262] != b"\0" * 5:
        return head[257:262] == b"ustar"
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def recognise(path: Path, expanded_limit_bytes: int) -> Recognition:
    """Tell what a non-empty file is. Nothing of it runs and little of it is held in memory."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    compression = compression_of(head)
    if compression == "zlib" and not _expands(path, compression):
        compression = None
    if compression is not None:
        return _compressed(path, compression, expanded_limit_bytes)
    if head[:1] == b"\x80" and head[1:2] and head[1] <= _LARGEST_PICKLE_PROTOCOL:
        return _pickle(path, None, expanded_limit_bytes)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip(path)
    known = _known(head)
    if known is not None:
        return _unknown(known)
    return _by_trial(path, head, expanded_limit_bytes)


def _known(head: bytes) -> str | None:
    for prefix, kind in _KNOWN_PREFIXES.items():
        if head.startswith(prefix):
            return kind
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for prefix, kind in _TEXT_KINDS.items():
        if start.startswith(prefix):
            return kind
    if not head.strip(b"\0"):
        return "nothing but zeros at its beginning, as an empty tar archive has"
    if _is_tar(head):
        return "a tar archive (unpack it, and upload the model's file that is in it)"
    return "a safetensors file" if head[8:10] == b'{"' and head[4:8] == b"\0\0\0\0" else None


def _by_trial(path: Path, head: bytes, limit_bytes: int) -> Recognition:
    """Try what has no unmistakable beginning: an ONNX graph, then a pickle of protocol 0 or 1; else it is text or unknown."""
    onnx = _onnx(path)
    if onnx is not None:
        return onnx
    if head[:1] in b"(]})lcNIVSFGKMJX":
        try:
            with open_content(path, None, limit_bytes) as reader:
                facts = read_pickle(reader)
            return Recognition(ArtifactFormat.SKLEARN, "a pickle", pickle=facts)
        except (BrokenPickleError, LongPickleError, BrokenArtifactError):
            pass
    return _unknown(_text_or_data(head))


def _text_or_data(head: bytes) -> str:
    try:
        text = head.decode("utf-8", "strict" if len(head) < HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return "of no kind that is known here"
    if not all(character.isprintable() or character.isspace() for character in text):
        return "of no kind that is known here"
    return "a JSON text" if text.lstrip().startswith(("{", "[")) else "a text file"


def _unknown(kind: str) -> Recognition:
    message = f"the artifact is {kind}; a model is a scikit-learn model saved by joblib or pickle, or an ONNX graph"
    return Recognition(None, kind, findings=(rejection("format.unknown", message, kind=kind),))


def _broken(kind: str, reason: str, compression: str | None = None) -> Recognition:
    message = f"the artifact begins as {kind} but {reason}"
    return Recognition(None, kind, compression, findings=(rejection("artifact.broken", message, kind=kind),))


def _expands(path: Path, compression: str) -> bool:
    try:
        with open_content(path, compression, HEAD_BYTES * 1024) as reader:
            return bool(reader.read(1))
    except (BrokenArtifactError, OversizedContentError):
        return False


def _compressed(path: Path, compression: str, limit_bytes: int) -> Recognition:
    kind = f"a file compressed by {compression}"
    if compression not in READABLE_COMPRESSIONS:
        return _unknown(f"{kind}, which is not read here (save it without, or with gzip)")
    try:
        with open_content(path, compression, limit_bytes) as reader:
            head = reader.read(HEAD_BYTES)
    except BrokenArtifactError as error:
        return _broken(kind, error.message, compression)
    if head[:1] == b"\x80" and head[1:2] and head[1] <= _LARGEST_PICKLE_PROTOCOL:
        return _pickle(path, compression, limit_bytes)
    inner = _known(head) or ("a zip archive (unpack both)" if head.startswith(b"PK\x03\x04") else None)
    return _unknown(f"{kind}, and inside is {inner}" if inner else f"{kind}, and inside is not a pickle")


def _pickle(path: Path, compression: str | None, limit_bytes: int) -> Recognition:
    kind = f"a pickle compressed by {compression}" if compression else "a pickle"
    try:
        with open_content(path, compression, limit_bytes) as reader:
            facts = read_pickle(reader)
    except BrokenPickleError as error:
        finding = rejection("pickle.broken", f"the artifact begins as {kind} but {error.message}")
    except LongPickleError as error:
        finding = rejection("pickle.too_long", f"the artifact is {kind} that {error.message}")
    except BrokenArtifactError as error:
        finding = rejection("artifact.broken", f"the artifact begins as {kind} but {error.message}", kind=kind)
    except OversizedContentError as error:
        finding = rejection("artifact.expanded_size", f"the artifact is {kind}, and {error.message}", limit_bytes=limit_bytes)
    else:
        return Recognition(ArtifactFormat.SKLEARN, kind, compression, pickle=facts)
    return Recognition(None, kind, compression, findings=(finding,))


def _onnx(path: Path) -> Recognition | None:
    """Return ``None`` when the file does not even begin as an ONNX graph."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
        try:
            summary = read_onnx(view)
        except BrokenArtifactError as error:
            return _broken("an ONNX graph", error.message)
    return Recognition(ArtifactFormat.ONNX, "an ONNX graph", onnx=summary) if summary is not None else None


def _zip(path: Path) -> Recognition:
    """Tell an intact archive from one whose end is missing, and say what is inside if that is plain."""
    try:
        names = list(_zip_names(path))
    except (zipfile.BadZipFile, BrokenArtifactError, OSError, ValueError, NotImplementedError):
        return _broken("a zip archive", "its end is missing or damaged: the file is truncated")
    return _unknown(_zip_kind(names))


def _zip_names(path: Path) -> Iterator[str]:
    """Yield the names inside, unless the directory of the archive is so large that it is not worth reading."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 65_557))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise BrokenArtifactError("no end record")
    directory_bytes = int.from_bytes(tail[end + 12 : end + 16], "little")
    if directory_bytes > _MAX_CENTRAL_DIRECTORY_BYTES:
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.header_offset + entry.compress_size > size:
                raise BrokenArtifactError("an entry reaches beyond the end")
            yield entry.filename


def _zip_kind(names: list[str]) -> str:
    if any(name.endswith("data.pkl") for name in names):
        return "a zip archive with a PyTorch model, which is not a format that is served yet"
    if "model.weights.h5" in names:
        return "a zip archive with a Keras model, which is not a format that is served yet"
    if names and all(name.endswith(".npy") for name in names):
        return "a zip archive of NumPy arrays"
    if "schema.json" in names:
        return "a skops file (load it with skops.io.load, and save the model with joblib.dump)"
    models = [name for name in names if name.endswith(MODEL_SUFFIXES)]
    inside = f", and upload '{models[0]}'" if len(models) == 1 else ", and upload the model's file that is in it"
    return f"{_ZIP_OF_FILES}{inside})"
