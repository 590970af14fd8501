"""Artifacts that are sets of files, and code beside models, from the upload to the answer of a real runner."""

import pickle
from collections.abc import AsyncIterable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import onnx
import pytest

from libs.artifacts.manifest import Manifest
from libs.artifacts.memory import MemoryStore
from libs.artifacts.store import StoredArtifact
from libs.errors import TransientError
from libs.messaging import cloudevents
from libs.messaging.memory import MemoryBroker
from schemas.registry import VersionSpec
from schemas.validation import VersionInspected, VersionRejected, VersionValidated
from services.validator.adapters import Versions, Workplace
from services.validator.handlers import Handlers, Tools
from services.validator.inspection import Code, Inspection, inspect
from services.validator.settings import Settings
from tests.unit.runner.models import row_sums
from tests.unit.validator.files import fitted, written
from tests.unit.validator.test_unpacking import tar, zipped
from tests.unit.validator.test_validator_app import BUILT, NOW, OwnEnvironment, registered, said, snapshot, stored

MODEL = pickle.dumps(row_sums())
EXAMPLE = {"instances": [[1.0, 2.0, 3.0]]}
HELPERS = "class Doubler:\n    n_features_in_ = 3\n    def predict(self, rows):\n        return 2 * rows.sum(axis=1)\n"
DOUBLER = b"\x80\x04chelpers\nDoubler\n)\x81."


def inspected(content: bytes, tmp_path: Path, **options: Any) -> Inspection:
    return inspect(written(content, tmp_path / "artifact"), **options)


def graph_and_weights(folder: Path, location: str = "weights.bin") -> dict[str, bytes]:
    """A graph that multiplies by weights that are in a file beside it."""
    weights = onnx.numpy_helper.from_array(np.arange(300, dtype=np.float32).reshape(3, 100), "W")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, size]) for name, size in (("X", 3), ("Y", 100))]
    body = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["X", "W"], ["Y"])], "g", ends[:1], ends[1:], [weights])
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir()
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location=location, size_threshold=0)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Which file is the model


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["model.joblib"], "model.joblib"),
        (["model.pkl", "notes.txt", "old/model.pkl"], "model.pkl"),
        (["f/model.pkl", "f/data/x.pkl"], "f/model.pkl"),
        (["f/g/model.onnx", "f/g/weights.bin"], "f/g/model.onnx"),
        (["m/MLmodel", "m/model.pkl", "m/other.pkl"], "m/model.pkl"),
        (["model.pkl/x", "real.pkl"], "real.pkl"),
    ],
)
@pytest.mark.parametrize("pack", [tar, zipped])
def test_the_model_is_the_only_file_with_its_suffix_at_the_top(pack: Any, names: list[str], model: str, tmp_path: Path) -> None:
    inspection = inspected(pack(dict.fromkeys(names, MODEL)), tmp_path)
    assert inspection.files is not None
    assert inspection.files.model == model


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["a.pkl", "b.joblib"],
            "the artifact is a tar archive with 2 files that may be the model ('a.pkl', 'b.joblib'); leave one of them at its top",
        ),
        (
            ["readme", "x/a.pkl"],
            "the artifact is a tar archive without a model's file (.joblib, .pkl, .pickle, .onnx) at its top; it has 'x/a.pkl' in folders",
        ),
        (["readme"], "the artifact is a tar archive without a model's file (.joblib, .pkl, .pickle, .onnx) at its top"),
    ],
)
def test_a_set_whose_model_is_not_plain_is_refused_with_its_candidates(names: list[str], reason: str, tmp_path: Path) -> None:
    inspection = inspected(tar(dict.fromkeys(names, MODEL)), tmp_path)
    assert (inspection.accepted, inspection.reason) == (False, reason)


def test_the_requirements_of_mlflow_are_those_of_the_version_unless_others_are_given(tmp_path: Path) -> None:
    files = {"MLmodel": b"x", "model.pkl": pickle.dumps(fitted()), "requirements.txt": b"mlflow==2.9\nscikit-learn==1.7.0 # x\n"}
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    assert inspected(tar(files), first).requirements == ("scikit-learn==1.7.0",)
    assert inspected(tar(files), second, requirements=["scikit-learn==1.7.1"]).requirements == ("scikit-learn==1.7.1",)


def test_weights_beside_a_graph_are_found(tmp_path: Path) -> None:
    files = graph_and_weights(tmp_path / "graph")
    inspection = inspected(tar({f"f/{name}": content for name, content in files.items()}), tmp_path)
    assert (inspection.accepted, inspection.findings) == (True, ())


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    files = graph_and_weights(tmp_path / "graph", "w.bin")
    inspection = inspected(tar({"model.onnx": files["model.onnx"], "f/w.bin": files["w.bin"]}), tmp_path)
    assert inspection.reason.startswith("the graph keeps weights in files that did not come with it ('w.bin'); upload the folder")


# Code beside a model


def code(content: bytes, folder: Path, filename: str = "code.tar") -> Code:
    return Code(written(content, folder / "code"), filename)


@pytest.mark.parametrize(
    ("content", "filename"),
    [(HELPERS.encode(), "helpers.py"), (tar({"helpers.py": b""}), "c.tar"), (zipped({"helpers/__init__.py": b""}), "c.zip")],
)
def test_the_modules_of_the_code_are_known(content: bytes, filename: str, tmp_path: Path) -> None:
    assert not inspected(DOUBLER, tmp_path).accepted
    inspection = inspected(DOUBLER, tmp_path, code=code(content, tmp_path, filename))
    assert (inspection.accepted, inspection.findings) == (True, ())
    assert inspection.code is not None


def test_what_the_code_imports_is_inferred(tmp_path: Path) -> None:
    inspection = inspected(
        DOUBLER, tmp_path, code=code(b"import pandas as pd\nfrom scipy import stats\n" + HELPERS.encode(), tmp_path, "helpers.py")
    )
    assert inspection.requirements == ("numpy", "pandas", "scipy")


@pytest.mark.parametrize(
    ("content", "filename", "reason"),
    [
        (b"x = 1", "my helpers.py", "the code is neither an archive nor a Python module: 'my helpers.py' is no module's name"),
        (b"\xff\xfe", "helpers.py", "the code is neither an archive nor a Python module: it is not UTF-8 text"),
        (tar({"data.csv": b""}), "c.tar", "the code is an archive without a Python module or package at its top"),
        (tar({"../x.py": b""}), "c.tar", "the code is a tar archive that is not unpacked: in it, '../x.py' is not a normal path"),
    ],
)
def test_code_that_is_none_is_refused(content: bytes, filename: str, reason: str, tmp_path: Path) -> None:
    assert inspected(MODEL, tmp_path, code=code(content, tmp_path, filename)).reason == reason


# As a whole


async def with_code(store: MemoryStore, content: bytes, source: str) -> VersionSpec:
    module = (await stored(store, source.encode())).model_copy(update={"filename": "helpers.py"})
    return VersionSpec(artifact=await stored(store, content), code=module)


async def lived(broker: MemoryBroker, store: MemoryStore, home: Path, spec: VersionSpec, **parts: Any) -> tuple[VersionInspected, Any]:
    """What the validator says at both gates, the registry being played."""
    (first,) = await said(broker, store, home, registered(spec.artifact).model_copy(update={"spec": spec}), **parts)
    assert isinstance(first, VersionInspected), first
    known = snapshot(spec.artifact, spec=spec, format=first.format, files=first.files, code=first.code)
    second = MemoryBroker()
    (verdict,) = await said(second, store, home, known, BUILT, **parts)
    return first, verdict


async def test_a_set_is_stored_file_by_file_and_tried(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    files = {"f/model.pkl": MODEL, "f/data/notes.txt": b"notes"}
    artifact = await stored(store, tar(files, "w:gz"))
    inspected, verdict = await lived(memory_broker, store, tmp_path / "home", VersionSpec(artifact=artifact, example=EXAMPLE))
    assert inspected.files is not None
    assert (inspected.files.model, inspected.files.files, inspected.files.size_bytes) == ("f/model.pkl", 2, len(MODEL) + 5)
    manifest = Manifest.from_bytes(b"".join([block async for block in store.open(inspected.files.sha256)]))
    assert {file.path: b"".join([block async for block in store.open(file.sha256)]) for file in manifest.files} == files
    assert isinstance(verdict, VersionValidated)
    assert verdict.golden == {"request": EXAMPLE, "response": {"predictions": [6.0]}}


async def test_a_set_is_tried_also_when_the_snapshot_is_older_than_the_first_verdict(
    memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path
) -> None:
    artifact = await stored(store, zipped({"model.pkl": MODEL}))
    (verdict,) = await said(memory_broker, store, tmp_path / "home", snapshot(artifact, format=None), BUILT)
    assert isinstance(verdict, VersionValidated)


async def test_a_graph_with_weights_beside_it_answers(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, tar(graph_and_weights(tmp_path / "graph")))
    example = {"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 3], "data": [1, 0, 0]}]}
    _, verdict = await lived(memory_broker, store, tmp_path / "home", VersionSpec(artifact=artifact, example=example))
    assert isinstance(verdict, VersionValidated)
    assert verdict.golden["response"]["outputs"][0]["data"] == list(range(100))


async def test_a_class_in_code_beside_the_model_answers(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    spec = (await with_code(store, DOUBLER, HELPERS)).model_copy(update={"example": EXAMPLE})
    _, verdict = await lived(memory_broker, store, tmp_path / "home", spec)
    assert isinstance(verdict, VersionValidated)
    assert verdict.golden["response"] == {"predictions": [12.0]}


async def test_code_may_have_packages_and_data(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    source = HELPERS.replace("2 *", "FACTOR *") + "from .numbers import FACTOR\n"
    numbers = "import json, pathlib\nFACTOR = json.loads((pathlib.Path(__file__).parent / 'factor.json').read_text())\n"
    files = {"helpers/__init__.py": source.encode(), "helpers/numbers.py": numbers.encode(), "helpers/factor.json": b"3"}
    spec = VersionSpec(artifact=await stored(store, DOUBLER), code=await stored(store, tar(files)), example=EXAMPLE)
    _, verdict = await lived(memory_broker, store, tmp_path / "home", spec)
    assert verdict.golden["response"] == {"predictions": [18.0]}


async def test_code_takes_the_place_of_no_library_and_writes_nothing(
    memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path
) -> None:
    source = HELPERS + "import json, joblib, os\nassert not hasattr(json, 'MINE') and not hasattr(joblib, 'MINE')\n"
    source += "try:\n    open(os.path.join(os.path.dirname(__file__), 'x'), 'w')\nexcept PermissionError:\n    pass\n"
    source += "else:\n    raise ValueError\n"
    files = {"helpers.py": source.encode(), "json.py": b"MINE = 1", "joblib/__init__.py": b"MINE = 1"}
    spec = VersionSpec(artifact=await stored(store, DOUBLER), code=await stored(store, tar(files)), example=EXAMPLE)
    _, verdict = await lived(memory_broker, store, tmp_path / "home", spec)
    assert isinstance(verdict, VersionValidated), verdict


FAILING = "def of(rows):\n    return rows['city']\n"


@pytest.mark.parametrize("loading", [True, False])
async def test_a_failure_names_the_line_of_the_code(loading: bool, memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    source = (
        HELPERS.replace("return 2", "return of({}) if len(rows) == 1 else 2")
        + "from inner.deep import of\n"
        + ("of({})\n" if loading else "")
    )
    files = {"helpers.py": source.encode(), "inner/deep.py": FAILING.encode()}
    spec = VersionSpec(artifact=await stored(store, DOUBLER), code=await stored(store, tar(files)), example=EXAMPLE)
    _, verdict = await lived(memory_broker, store, tmp_path / "home", spec)
    assert isinstance(verdict, VersionRejected)
    if loading:
        assert verdict.reason == "loading the artifact failed: KeyError: 'city' (inner/deep.py:2)"
    else:
        assert verdict.reason == "the model raised KeyError: 'city' (inner/deep.py:2), on its example"
        assert verdict.findings[0].evidence == {"kind": "raised", "exception": "KeyError", "line": "inner/deep.py:2"}


async def test_a_failure_names_the_line_of_carried_code(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    source = "class Failing:\n    n_features_in_ = 3\n    def predict(self, rows):\n        return rows[:, 9]\n"
    exec(compile(source, "/home/someone/train.py", "exec"), namespace)
    artifact = await stored(store, cloudpickle.dumps(namespace["Failing"]()))
    _, verdict = await lived(memory_broker, store, tmp_path / "home", VersionSpec(artifact=artifact, example=EXAMPLE, allow_code=True))
    assert isinstance(verdict, VersionRejected)
    assert "(train.py:4), on its example" in verdict.reason


async def test_a_module_that_code_needs_and_nobody_has_is_named_with_what_helps(
    memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path
) -> None:
    spec = await with_code(store, DOUBLER, "import acme_numbers\n" + HELPERS)
    _, verdict = await lived(memory_broker, store, tmp_path / "home", spec)
    assert verdict.reason == (
        "the artifact needs the module 'acme_numbers', which its environment does not have (helpers.py:1); "
        "if it is your own, upload it with --code, else name its package with --requirements"
    )


async def test_a_platform_without_code_refuses_it(
    memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALIDATOR_ALLOW_CODE", "false")
    spec = await with_code(store, DOUBLER, HELPERS)
    (fact,) = await said(memory_broker, store, tmp_path / "home", registered(spec.artifact).model_copy(update={"spec": spec}))
    assert isinstance(fact, VersionRejected)
    assert fact.reason == "this platform does not accept code beside models (VALIDATOR_ALLOW_CODE)"


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


class Interrupted(MemoryStore):
    """A store whose user is killed, so to speak, at the so-manieth object it puts."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 1_000

    async def put(self, chunks: AsyncIterable[bytes], *, expected_sha256: str | None = None, max_bytes: int) -> StoredArtifact:
        self.left -= 1
        if self.left < 0:
            raise TransientError("killed")
        return await super().put(chunks, expected_sha256=expected_sha256, max_bytes=max_bytes)


@pytest.mark.parametrize("after", range(6))
async def test_a_validator_that_is_killed_between_files_leaves_no_half_set(after: int, tmp_path: Path) -> None:
    store = Interrupted()
    artifact = await stored(store, tar({"model.pkl": MODEL, **{f"f{n}": b"%d" % n for n in range(4)}}))
    tools = Tools(Versions(), store, OwnEnvironment(), Workplace(tmp_path), Settings().limits, 1 << 30)
    event = cloudevents.new_event(registered(artifact), "/millrace/registry", now=NOW)
    store.left = after
    with pytest.raises(TransientError):
        await Handlers(tools).registered(event)
    assert not [content for content in store.contents.values() if content.startswith(b'{"files"')]
    assert not any(path.name.startswith("artifact") for path in files_in(tmp_path))
    store.left = 1_000
    (fact,) = await Handlers(tools).registered(event)
    assert isinstance(fact, VersionInspected)
    assert fact.files is not None
    assert await store.exists(fact.files.sha256)


async def test_a_refused_archive_leaves_nothing_in_the_store(memory_broker: MemoryBroker, store: MemoryStore, tmp_path: Path) -> None:
    artifact = await stored(store, tar({"model.pkl": b"cposix\nsystem\n(S'id'\ntR.", "x": b"y"}))
    (fact,) = await said(memory_broker, store, tmp_path / "home", registered(artifact))
    assert isinstance(fact, VersionRejected)
    assert len(store.contents) == 1


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()
