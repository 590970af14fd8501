"""Archives, honest and hostile: unpacked as a whole or refused, and never a file outside of the folder."""

import gzip
import io
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from libs.artifacts.manifest import Manifest
from libs.errors import MillraceError
from services.validator import unpacking
from services.validator.errors import BrokenArtifactError, ForbiddenEntryError, OversizedContentError
from services.validator.formats import archive_kind
from services.validator.unpacking import unpack
from tests.unit.validator.files import written

LIMIT = 1 << 30
FILES = {"model.joblib": b"the model" * 300, "data/weights.bin": bytes(range(256)), "ü/long" + "g" * 150 + "/name.txt": b"x"}


def tar(files: dict[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT, **changes: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for attribute, value in changes.items():
                setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes], mode: int = 0, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = compression
            archive.writestr(info, content)
    return buffer.getvalue()


def unpacked(content: bytes, folder: Path, limit: int = LIMIT) -> Manifest:
    path = written(content, folder / "artifact")
    kind = archive_kind(path)
    assert kind is not None
    root = folder / "root"
    root.mkdir()
    manifest = unpack(path, kind, root, limit)
    assert sorted(str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()) == list(manifest.paths)
    return manifest


HONEST = {
    "tar": tar(FILES),
    "gnu tar": tar(FILES, form=tarfile.GNU_FORMAT),
    "tar.gz": tar(FILES, "w:gz"),
    "tar of .": tar({f"./{name}": content for name, content in FILES.items()}),
    "zip": zipped(FILES),
    "stored zip": zipped(FILES, compression=zipfile.ZIP_STORED),
    "what macOS adds": tar({**FILES, "._model.joblib": b"?", ".DS_Store": b"?", "__MACOSX/x": b"?", "__pycache__/m.pyc": b"?"}),
}


def test_a_tar_of_the_seventh_edition_is_unpacked(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[257:265] = bytes(8)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert unpacked(bytes(header) + bytes(1024), tmp_path).paths == ("x",)


def test_a_zip_that_was_written_to_a_pipe_is_unpacked(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError("a pipe has no position")

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    assert unpacked(pipe.getvalue(), tmp_path).paths == tuple(sorted(FILES))


@pytest.mark.parametrize("content", HONEST.values(), ids=HONEST)
def test_an_honest_archive_is_unpacked(content: bytes, tmp_path: Path) -> None:
    manifest = unpacked(content, tmp_path)
    assert manifest.paths == tuple(sorted(FILES))
    assert {name: (tmp_path / "root" / name).read_bytes() for name in FILES} == FILES


def linked(kind: bytes) -> bytes:
    return tar({"model.joblib": b""}, type=kind, linkname="/etc/passwd")


def with_bytes(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


FORBIDDEN = {
    "slip": (tar({"../x": b"y"}), "'../x' is not a normal path"),
    "deeper slip": (tar({"a/../../x": b"y"}), "is not a normal path"),
    "absolute": (tar({"/tmp/x": b"y"}), "'/tmp/x' is not a relative path"),
    "symbolic link": (linked(tarfile.SYMTYPE), "'model.joblib' in it is a symbolic link"),
    "hard link": (linked(tarfile.LNKTYPE), "'model.joblib' in it is a hard link"),
    "device": (linked(tarfile.CHRTYPE), "'model.joblib' in it is a device"),
    "pipe": (linked(tarfile.FIFOTYPE), "'model.joblib' in it is a pipe"),
    "unknown kind": (linked(b"Z"), "neither a file nor a folder"),
    "other case": (tar({"Model.pkl": b"y", "model.pkl": b"z"}), "'Model.pkl' and 'model.pkl' differ only in case"),
    "folder of other case": (tar({"A/x": b"y", "a/y": b"z"}), "'A' and 'a' differ only in case"),
    "file and folder": (tar({"a": b"y", "a/b": b"z"}), "'a' is both a file and a folder"),
    "empty": (tar({".DS_Store": b""}), "it has no files"),
    "global path": (tar({"x": b"y"}, pax_headers={}) and b"", ""),
    "zip slip": (zipped({"../x": b"y"}), "'../x' is not a normal path"),
    "zip absolute": (zipped({"/tmp/x": b"y"}), "is not a relative path"),
    "zip backslash": (zipped({"..\\x": b"y"}), "has a backslash"),
    "zip link": (zipped({"x": b"/etc/passwd"}, mode=0o120777), "'x' in it is a symbolic link"),
    "zip device": (zipped({"x": b""}, mode=0o020666), "'x' in it is no file"),
    "zip other case": (zipped({"X": b"y", "x": b"z"}), "differ only in case"),
    "zip bzip2": (zipped({"x": b"y"}, compression=zipfile.ZIP_BZIP2), "compressed in another way"),
}
del FORBIDDEN["global path"]


@pytest.mark.parametrize(("content", "reason"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_hostile_archive_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ForbiddenEntryError, match=reason.replace("\\", ".")):
        unpacked(content, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"artifact", "root"}
    assert not [path for path in (tmp_path / "root").rglob("*") if path.is_symlink()]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_that_is_there_twice_is_refused(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x", b"1")
            archive.writestr("x", b"2")
    else:
        with tarfile.open(fileobj=buffer, mode="w") as files:
            files.addfile(tarfile.TarInfo("x"))
            files.addfile(tarfile.TarInfo("x"))
    with pytest.raises(ForbiddenEntryError, match="'x' is there twice"):
        unpacked(buffer.getvalue(), tmp_path)


def test_a_global_header_names_no_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "../x"}) as files:
        files.addfile(tarfile.TarInfo("x"))
    with pytest.raises(ForbiddenEntryError, match="names all its files the same"):
        unpacked(buffer.getvalue(), tmp_path)


PLAIN, ZIP = tar({"x": b"y" * 1000}), zipped({"x": bytes(random.Random(1).randbytes(1000))})
BROKEN = {
    "tar with a tail": PLAIN + b"MZ",
    "tar.gz with a tail": gzip.compress(PLAIN) + b"PK\x03\x04",
    "two archives in one": gzip.compress(PLAIN) + gzip.compress(PLAIN),
    "tar without an end": PLAIN[: 512 + 1024],
    "tar cut in content": PLAIN[:900],
    "tar with one block of zeros": PLAIN[: 512 + 1024 + 512],
    "tar.gz cut": gzip.compress(tar({"x": random.Random(1).randbytes(20_000)}))[:-500],
    "zip with a tail": ZIP + b"MZ",
    "zip behind something": b"PK\x03\x04 and more" + ZIP,
    "zip cut off before its end": None,
}


@pytest.mark.parametrize("content", [each for each in BROKEN.values() if each], ids=[name for name, each in BROKEN.items() if each])
def test_what_is_cut_or_has_something_around_it_is_refused(content: bytes, tmp_path: Path) -> None:
    path = written(content, tmp_path / "artifact")
    kind = archive_kind(path) or ("zip" if content.startswith(b"PK") else "tar.gz")
    (tmp_path / "root").mkdir()
    with pytest.raises(BrokenArtifactError):
        unpack(path, kind, tmp_path / "root", LIMIT)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_one_flipped_bit_is_refused_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    files = {"model.joblib": random.Random(2).randbytes(40), "b": b"other"}
    content = gzip.compress(tar(files), mtime=0) if kind == "tar.gz" else zipped(files, mode=0o100644)
    wanted = unpacked(content, tmp_path)
    path, root = tmp_path / "artifact", tmp_path / "root"
    refused = 0
    for place in range(len(content) * 8):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        root = tmp_path / f"root{place}"
        root.mkdir()
        try:
            found = unpack(path, kind, root, LIMIT)
        except MillraceError:
            refused += 1
        else:
            assert found == wanted
    assert refused > len(content) * 4


def test_bombs_are_refused_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "UNQUESTIONED_BYTES", 1 << 20)
    for number, content in enumerate((tar({"x": bytes(20 << 20)}, "w:gz"), zipped({"x": bytes(20 << 20)}))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(OversizedContentError):
            unpacked(content, folder)
        assert sum(path.stat().st_size for path in (folder / "root").rglob("*")) <= 8 << 20


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path: Path) -> None:
    content = zipped({"x": bytes(1 << 20)})
    lie = content.replace((1 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lie != content
    with pytest.raises(BrokenArtifactError):
        unpacked(lie, tmp_path)


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    content = tar({"x": b"y"})[:0] + info.tobuf(tarfile.USTAR_FORMAT) + bytes(4096)
    with pytest.raises(ForbiddenEntryError, match="a header of more than a MiB"):
        unpacked(content, tmp_path)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_ten_thousand_files_are_the_most(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"f{n}": b"" for n in range(10_001)}
    content = tar(files, "w:gz") if kind == "tar.gz" else zipped(files)
    with pytest.raises(ForbiddenEntryError, match="there are more than 10000 files"):
        unpacked(content, tmp_path)
    assert len(os.listdir(tmp_path / "root")) == 10_000
