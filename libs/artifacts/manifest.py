"""Sets of files: which paths there are, and which content each of them has.

A set is stored as its files, each under its own digest, and a manifest, which is an artifact like them: whoever has the digest of the
manifest can tell whether every file is what was meant.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from libs.artifacts.store import key_of
from libs.errors import InvalidArgumentError

MAX_FILES = 10_000
MAX_MANIFEST_BYTES = 16 << 20
"""10 000 files with paths of the greatest length."""

_MAX_PATH_BYTES = 1024
_MAX_NAME_BYTES = 255


class InvalidPathError(InvalidArgumentError):
    """A path that no set of files may have."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a set."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a set, sorted by path; make one with ``Manifest.of``."""

    files: tuple[File, ...]

    @classmethod
    def of(cls, files: Iterable[File]) -> "Manifest":
        """Put files in order.

        Raises
        ------
        InvalidPathError
            A path is not a relative normal one, or two are equal, at least for a file system that ignores case.
        InvalidArgumentError
            There are none, or too many.
        """
        paths = Paths()
        manifest = cls(tuple(sorted(files, key=lambda file: file.path)))
        for file in manifest.files:
            paths.add(file.path)
            key_of(file.sha256)
        if not manifest.files:
            raise InvalidArgumentError("a set of files has at least one")
        return manifest

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        """Read what ``to_bytes`` wrote; raises ``InvalidArgumentError`` for anything else."""
        try:
            documents: list[dict[str, Any]] = json.loads(content)["files"]
            manifest = cls.of(File(str(each["path"]), str(each["sha256"]), int(each["size_bytes"])) for each in documents)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(f"this is not the manifest of a set of files: {error}") from error
        if manifest.to_bytes() != content:
            raise InvalidArgumentError("this manifest of a set of files is not in canonical form")
        return manifest

    def to_bytes(self) -> bytes:
        """Return the canonical form: equal sets have equal bytes."""
        files = [{"path": file.path, "sha256": file.sha256, "size_bytes": file.size_bytes} for file in self.files]
        return json.dumps({"files": files}, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.files)


class Paths:
    """Paths of a set that is being made; says no to those that would be another's on some file system."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, bool]] = {}
        self._files = 0

    def add(self, path: str) -> None:
        """Take a file's path.

        Raises
        ------
        InvalidPathError
            It is not a relative normal one, or stands for the same as an earlier one.
        InvalidArgumentError
            There are more files than a set may have.
        """
        names = check_path(path).split("/")
        for depth in range(1, len(names)):
            self._enter("/".join(names[:depth]), is_file=False)
        self._enter(path, is_file=True)
        self._files += 1
        if self._files > MAX_FILES:
            raise InvalidArgumentError(f"there are more than {MAX_FILES} files")

    def _enter(self, path: str, *, is_file: bool) -> None:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        if folded not in self._known:
            self._known[folded] = (path, is_file)
            if len(self._known) > 2 * MAX_FILES:
                raise InvalidArgumentError(f"there are more than {2 * MAX_FILES} files and folders")
            return
        known, known_as_file = self._known[folded]
        if known != path:
            raise InvalidPathError(f"'{known}' and '{path}' differ only in case or in how their letters are encoded")
        if is_file != known_as_file:
            raise InvalidPathError(f"'{path}' is both a file and a folder")
        if is_file:
            raise InvalidPathError(f"'{path}' is there twice")


def check_path(path: str) -> str:
    """Return a path if it is a relative normal one: names, joined by '/', that every file system can have; raises ``InvalidPathError``."""
    if not path or path.startswith("/"):
        raise InvalidPathError(f"'{path}' is not a relative path")
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise InvalidPathError("a path is not UTF-8 text") from None
    if len(encoded) > _MAX_PATH_BYTES:
        raise InvalidPathError(f"'{path[:60]}…' is longer than {_MAX_PATH_BYTES} bytes")
    for name in path.split("/"):
        if name in ("", ".", ".."):
            raise InvalidPathError(f"'{path}' is not a normal path")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise InvalidPathError(f"'{name[:60]}…' is longer than {_MAX_NAME_BYTES} bytes")
        if "\\" in name or ":" in name or any(unicodedata.category(character)[0] == "C" for character in name):
            raise InvalidPathError(f"'{path}' has a backslash, a colon or a control character in it")
    return path
