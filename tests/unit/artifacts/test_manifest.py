"""Manifests of sets of files: canonical, and strict about paths."""

import hashlib

import pytest

from libs.artifacts.manifest import MAX_FILES, File, InvalidPathError, Manifest, check_path
from libs.errors import InvalidArgumentError

DIGEST = hashlib.sha256(b"x").hexdigest()


def of(*paths: str) -> Manifest:
    return Manifest.of(File(path, DIGEST, 1) for path in paths)


def test_equal_sets_have_equal_bytes_whatever_their_order():
    assert of("b/c", "a").to_bytes() == of("a", "b/c").to_bytes()
    assert of("ü").to_bytes() == f'{{"files":[{{"path":"ü","sha256":"{DIGEST}","size_bytes":1}}]}}'.encode()


def test_a_manifest_is_read_as_it_was_written():
    manifest = of("a", "b/c")
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert (manifest.size_bytes, manifest.paths) == (2, ("a", "b/c"))
    assert manifest.sha256 == hashlib.sha256(manifest.to_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files":[]}', b'{"files": []}', b'{"files":[{"path":"a"}]}', of("a").to_bytes() + b" "])
def test_what_is_no_manifest_is_refused(content: bytes):
    with pytest.raises(InvalidArgumentError):
        Manifest.from_bytes(content)


HOSTILE = [
    "/etc/passwd", "../a", "a/../b", "a//b", "a/", "./a", ".", "", "a\\b", "C:/a", "a\0b", "a\nb", "\ud800", "x" * 256, "x/" * 600 + "x"
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE)
def test_a_path_that_is_not_relative_and_normal_is_refused(path: str):
    with pytest.raises(InvalidPathError):
        check_path(path)


@pytest.mark.parametrize(
    "paths", [("a", "a"), ("a", "A"), ("f/a", "F/b"), ("e\u0301", "\u00e9"), ("straße", "STRASSE"), ("a", "a/b"), ("a/b", "a")]
)
def test_paths_that_are_the_same_on_some_file_system_are_refused(paths: tuple[str, str]):
    with pytest.raises(InvalidPathError):
        of(*paths)


def test_ten_thousand_files_are_the_most():
    assert len(of(*(f"f{n}" for n in range(MAX_FILES))).files) == MAX_FILES
    with pytest.raises(InvalidArgumentError, match="more than 10000 files"):
        of(*(f"f{n}" for n in range(MAX_FILES + 1)))


def test_folders_in_folders_are_bounded_too():
    with pytest.raises(InvalidArgumentError, match="more than 20000 files and folders"):
        of(*(f"{n}/{'d/' * 100}x" for n in range(300)))
