"""The first gate on real models and on what is not one."""

import bz2
import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from schemas.registry import ArtifactFormat
from services.validator.inspection import Inspection, inspect
from tests.unit.validator.files import archive, bomb, field, fitted, onnx_graph, saved, tarred, written, zipped


def rules(inspection: Inspection) -> list[str]:
    return [finding.rule for finding in inspection.findings]


def inspected(content: bytes, tmp_path: Path, **options: object) -> Inspection:
    return inspect(written(content, tmp_path / "model.joblib"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3), ("zlib", 9)])
def test_a_model_saved_by_joblib_is_accepted(compress: object, tmp_path: Path) -> None:
    inspection = inspect(saved(fitted(), tmp_path / "m", compress=compress))
    assert inspection.accepted
    assert inspection.format is ArtifactFormat.SKLEARN
    assert inspection.findings == ()
    assert inspection.inferred


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_model_is_accepted_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    inspection = inspected(pickle.dumps(fitted(), protocol=protocol), tmp_path)
    assert (inspection.accepted, inspection.findings) == (True, ())


def test_arrays_of_objects_strings_and_records_are_followed(tmp_path: Path) -> None:
    nested = np.empty(2, dtype=object)
    nested[:] = [np.arange(3.0), np.array(["a", "bb"])]
    record = np.zeros(3, dtype=[("x", "f8"), ("y", "S7"), ("z", "O")])
    model = fitted(np.array(["yes", "no", "yes", "no"], dtype=object))
    model.notes = [nested, np.array(["ü", "long text"]), record, np.array([], dtype="M8[ns]"), np.zeros((0, 4)), np.ma.zeros(3)]
    for compress in (0, 3):
        assert inspect(saved(model, tmp_path / "m", compress=compress)).findings == ()


def test_digest_and_size_are_checked_first(tmp_path: Path) -> None:
    path = saved(fitted(), tmp_path / "m")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert inspect(path, sha256=digest, size_bytes=path.stat().st_size).accepted
    assert rules(inspect(path, sha256="0" * 64)) == ["artifact.digest"]
    assert rules(inspect(path, size_bytes=1)) == ["artifact.size"]
    assert inspect(path, sha256="0" * 64).reason.startswith("the artifact's SHA-256 is ")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    inspection = inspected(b"", tmp_path)
    assert (rules(inspection), inspection.reason) == (["artifact.empty"], "the artifact is empty (0 bytes)")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"hello world\n", "the artifact is a text file; a model is"),
        (b"no model, just prose that begins like an opcode", "the artifact is a text file; a model is"),
        (b'{"a": 1}', "the artifact is a JSON text; a model is"),
        (b"<!DOCTYPE html><html>", "the artifact is an HTML page, perhaps the error page of a download; a model is"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "the artifact is a Git LFS pointer, not the file it points to"),
        (b"\x89HDF\r\n\x1a\n\0\0", "the artifact is an HDF5 file"),
        (b"\x93NUMPY\x01\0", "the artifact is a NumPy array file"),
        (b"\x28\xb5\x2f\xfd\0\0", "the artifact is a file compressed by zstd, which is not read here"),
        (bytes(10_240), "the artifact is nothing but zeros at its beginning, as an empty tar archive has; a model is"),
        (b"\x00\xff\xfe\x01\x02", "the artifact is of no kind that is known here"),
        (archive("schema.json", "0.npy"), "the artifact is a skops file (load it with skops.io.load, and save the model with joblib.dump)"),
        (
            bz2.compress(gzip.decompress(tarred("model.joblib"))),
            "the artifact is a file compressed by bz2, and inside is a tar archive (unpack it, and upload",
        ),
        (zipped(), "the artifact is a zip archive with a PyTorch model, which is not a format that is served yet"),
    ],
)
def test_what_is_no_model_is_named(content: bytes, kind: str, tmp_path: Path) -> None:
    inspection = inspected(content, tmp_path)
    assert rules(inspection) == ["format.unknown"]
    assert inspection.reason.startswith(kind)


def test_a_truncated_zip_is_said_to_be_truncated(tmp_path: Path) -> None:
    inspection = inspected(zipped()[:60], tmp_path)
    assert rules(inspection) == ["artifact.broken"]
    assert inspection.reason == "the artifact begins as a zip archive but its end is missing or damaged: the file is truncated"


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 3)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_model_is_said_to_end_too_early(compress: object, share: float, tmp_path: Path) -> None:
    path = saved(fitted(), tmp_path / "m", compress=compress)
    content = path.read_bytes()
    inspection = inspected(content[: int(len(content) * share)], tmp_path)
    assert not inspection.accepted
    assert rules(inspection)[0] in ("pickle.broken", "artifact.broken")
    assert "too early" in inspection.reason


def test_garbage_inside_a_pickle_is_refused(tmp_path: Path) -> None:
    content = bytearray(pickle.dumps(fitted(), protocol=4))
    content[300:310] = b"\xff" * 10
    assert rules(inspected(bytes(content), tmp_path))[0] == "pickle.broken"


def test_compressed_content_that_expands_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    inspection = inspected(bomb(30_000_000), tmp_path, expanded_limit_bytes=10_000_000)
    assert rules(inspection) == ["artifact.expanded_size"]
    assert inspection.reason.endswith("and it expands to more than 10000000 bytes")


def test_bytes_after_the_end_are_a_warning(tmp_path: Path) -> None:
    inspection = inspected(pickle.dumps(fitted()) + b"tail", tmp_path)
    assert inspection.accepted
    assert rules(inspection) == ["pickle.trailing_bytes"]


def test_an_onnx_graph_is_recognised_by_content(tmp_path: Path) -> None:
    inspection = inspected(onnx_graph(), tmp_path)
    assert (inspection.accepted, inspection.format, inspection.findings) == (True, ArtifactFormat.ONNX, ())
    assert inspection.requirements == ("numpy", "onnxruntime")


def test_a_real_onnx_graph_is_recognised_whole_and_refused_truncated(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    node = helper.make_node("Identity", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in "xy")
    content = helper.make_model(helper.make_graph([node], "g", [x], [y])).SerializeToString()
    assert inspected(content, tmp_path).accepted
    cut = inspected(content[: len(content) // 2], tmp_path)
    assert rules(cut) == ["artifact.broken"]
    assert cut.reason == "the artifact begins as an ONNX graph but ends too early: the file is truncated"


def test_a_graph_with_weights_in_other_files_is_refused(tmp_path: Path) -> None:
    tensor = field(13, field(1, b"location") + field(2, b"../../secrets")) + field(14, 1)
    inspection = inspected(onnx_graph(tensor=tensor), tmp_path)
    assert rules(inspection) == ["onnx.external_data"]
    assert inspection.reason == (
        "the graph keeps weights in files that did not come with it ('../../secrets'); upload the folder they are in, "
        "or save it with all its data in one file"
    )


def test_operators_of_another_domain_are_a_warning(tmp_path: Path) -> None:
    inspection = inspected(onnx_graph(domain=b"acme"), tmp_path)
    assert inspection.accepted
    assert rules(inspection) == ["onnx.custom_operators"]


def test_a_declared_format_that_the_content_contradicts_is_refused(tmp_path: Path) -> None:
    inspection = inspect(saved(fitted(), tmp_path / "m"), declared_format=ArtifactFormat.ONNX)
    assert rules(inspection) == ["format.contradiction"]
    assert inspection.reason == "the artifact was declared as onnx but is a pickle (sklearn)"
    assert inspect(saved(fitted(), tmp_path / "m"), declared_format=ArtifactFormat.SKLEARN).accepted
