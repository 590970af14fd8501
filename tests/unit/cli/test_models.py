import hashlib
import io
import json
import os
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.gateway import Answer, FakeGateway, Request

BEGAN = datetime(2999, 1, 1, 12, tzinfo=UTC)
"""Later than the command, which counts the first stage from its own start."""

VERSIONS = "/api/v1/models/cancer/versions"


def version(status: str, **more: Any) -> dict[str, Any]:
    return {
        "model_name": "cancer",
        "version": 1,
        "status": status,
        "spec": {"artifact": {"sha256": "0" * 64, "size_bytes": 11, "filename": "model.joblib"}},
        "aliases": [],
        "stage_times": {},
        "created_at": BEGAN.isoformat(),
        "updated_at": BEGAN.isoformat(),
        **more,
    }


def event(name: str, after_s: float, **data: Any) -> dict[str, Any]:
    time = (BEGAN + timedelta(seconds=after_s)).isoformat()
    data = {"model_name": "cancer", "version": 1, **data}
    return {"specversion": "1.0", "id": name, "type": name, "time": time, "subject": "cancer", "data": data}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.joblib"
    path.write_bytes(b"not a model")
    return path


@pytest.fixture
def store(gateway: FakeGateway) -> FakeGateway:
    def keep(request: Request) -> Answer:
        digest = hashlib.sha256(request.body).hexdigest()
        assert digest == request.headers["x-millrace-sha256"]
        return 201, {"sha256": digest, "size_bytes": len(request.body), "filename": request.query["filename"]}

    gateway.on("POST", "/api/v1/artifacts", keep)
    return gateway


def lives(gateway: FakeGateway, *events: dict[str, Any], end: dict[str, Any]) -> None:
    """Registering makes the version run through some events; the state, asked after each, shows the end only after the last."""
    views = iter([version("registered")] * (len(events) - 1))

    def register(_: Request) -> Answer:
        gateway.on("GET", f"{VERSIONS}/1", lambda _: (200, next(views, end)))
        gateway.publish(*events)
        return 201, {**version("registered"), "operation_id": "op-1"}

    gateway.on("POST", VERSIONS, register)


def is_sampled(request: Request) -> bool:
    return bool(int(request.headers["traceparent"][-2:], 16) & 1)


def test_upload_registers_the_stored_artifact(store: FakeGateway, run: Run, file: Path) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    outcome = run("models", "upload", file, "--name", "cancer")
    assert (outcome.exit_code, outcome.out) == (0, "cancer@1 is registered\n")
    artifact = store.sent("POST", VERSIONS).json["artifact"]
    assert artifact == {"sha256": hashlib.sha256(b"not a model").hexdigest(), "size_bytes": 11, "filename": "model.joblib"}


def test_upload_sends_everything_that_is_said_of_the_version(store: FakeGateway, run: Run, file: Path, tmp_path: Path) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    (tmp_path / "requirements.txt").write_text("# pins\nscikit-learn==1.7.0  # trained with\n\nnumpy>=2\n")
    (tmp_path / "example.json").write_text('{"instances": [[1.0]]}')
    described = ("--description", "first", "--label", "team=risk", "--label", "a=b=c", "--alias", "champion", "--format", "sklearn")
    files = ("--requirements", tmp_path / "requirements.txt", "--example", tmp_path / "example.json")
    assert run("models", "upload", file, "--name", "cancer", *described, *files).exit_code == 0
    body = store.sent("POST", VERSIONS).json
    del body["artifact"]
    assert body == {
        "format": "sklearn",
        "requirements": ["scikit-learn==1.7.0", "numpy>=2"],
        "example": {"instances": [[1.0]]},
        "aliases": ["champion"],
        "description": "first",
        "labels": {"team": "risk", "a": "b=c"},
    }


def test_waiting_upload_shows_each_stage_as_its_event_arrives(store: FakeGateway, run: Run, file: Path) -> None:
    lives(
        store,
        event("millrace.registry.version.registered.v1", 0.1),
        event("millrace.validator.version.inspected.v1", 0.3),
        event("millrace.validator.version.inspected.v1", 0.3, version=7),
        event("millrace.builder.version.built.v1", 2.3),
        event("millrace.validator.version.validated.v1", 3.5),
        end=version("validated"),
    )
    outcome = run("models", "upload", file, "--name", "cancer", "--wait")
    assert (outcome.exit_code, outcome.out) == (0, "cancer@1 is validated\n")
    uploaded, *stages, trace = [line.split() for line in outcome.err.splitlines()]
    assert uploaded[:3] == ["uploaded", "11", "B"]
    assert trace[0] == "trace"
    assert [stage[0] for stage in stages] == ["registered", "inspected", "built", "validated"]
    assert [stage[1:] for stage in stages[1:]] == [["200", "ms"], ["2.0", "s"], ["1.2", "s"]]


@pytest.mark.usefixtures("impatient")
def test_waiting_upload_learns_from_the_state_what_the_events_did_not_say(store: FakeGateway, run: Run, file: Path) -> None:
    times = {"registered": BEGAN.isoformat(), "validated": (BEGAN + timedelta(seconds=4)).isoformat()}
    lives(store, end=version("validated", stage_times=times))
    outcome = run("models", "upload", file, "--name", "cancer", "--wait")
    assert outcome.exit_code == 0
    assert ["validated", "4.0", "s"] in [line.split() for line in outcome.err.splitlines()]


@pytest.mark.usefixtures("impatient")
def test_waiting_upload_says_what_goes_on_while_an_environment_installs(
    store: FakeGateway, run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.cli.stages.PROGRESS_S", 0.0)
    views = iter([version("inspected")] * 2)

    def register(_: Request) -> Answer:
        store.on("GET", f"{VERSIONS}/1", lambda _: (200, next(views, version("validated"))))
        return 201, {**version("registered"), "operation_id": "op-1"}

    store.on("POST", VERSIONS, register)
    outcome = run("models", "upload", file, "--name", "cancer", "--wait")
    assert outcome.exit_code == 0
    assert outcome.err.count("  still installing packages") == 2


@pytest.mark.usefixtures("impatient")
def test_waiting_upload_survives_a_gateway_that_starts_again(store: FakeGateway, run: Run, file: Path) -> None:
    away: Answer = (503, {"error": "the gateway is not ready"})
    answers = iter([away, away])
    store.on("POST", VERSIONS, version("registered"), status=201)
    store.on("GET", f"{VERSIONS}/1", lambda _: next(answers, (200, version("validated"))))
    assert run("models", "upload", file, "--name", "cancer", "--wait").exit_code == 0
    assert next(answers, None) is None


def test_waiting_upload_of_a_rejected_version_fails_with_the_reason(store: FakeGateway, run: Run, file: Path) -> None:
    lives(store, event("millrace.validator.version.rejected.v1", 1), end=version("rejected", reason="it is a text file"))
    outcome = run("models", "upload", file, "--name", "cancer", "--wait")
    assert outcome.exit_code == 1
    assert outcome.err.splitlines()[-1] == "millrace: cancer@1 was rejected: it is a text file"
    assert outcome.out == ""


WARNINGS = [
    {"rule": "requirements.missing", "severity": "warn", "message": "pandas may be needed"},
    {"rule": "trial.no_example", "severity": "warn", "message": "it refused a made-up row"},
]


def test_waiting_upload_of_a_version_that_needs_an_example_says_what_helps(store: FakeGateway, run: Run, file: Path) -> None:
    needs = version("needs_example", reason="it refused a made-up row", findings=WARNINGS)
    lives(store, event("millrace.validator.version.needs_example.v1", 1), end=needs)
    outcome = run("models", "upload", file, "--name", "cancer", "--wait")
    assert (outcome.exit_code, outcome.out) == (1, "")
    assert outcome.err.splitlines()[-2:] == [
        "warning: pandas may be needed (requirements.missing)",
        "millrace: cancer@1 needs an example: it refused a made-up row; give it one: millrace models example cancer@1 FILE --wait",
    ]


def test_waiting_upload_prints_every_warning(store: FakeGateway, run: Run, file: Path) -> None:
    lives(store, event("millrace.validator.version.validated.v1", 1), end=version("validated", findings=WARNINGS))
    outcome = run("models", "upload", file, "--name", "cancer", "--wait")
    assert outcome.exit_code == 0
    assert [line for line in outcome.err.splitlines() if line.startswith("warning")] == [
        "warning: pandas may be needed (requirements.missing)",
        "warning: it refused a made-up row (trial.no_example)",
    ]


def test_upload_can_forbid_batching(store: FakeGateway, run: Run, file: Path) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    assert run("models", "upload", file, "--name", "cancer", "--forbid-batching").exit_code == 0
    assert store.sent("POST", VERSIONS).json["forbid_batching"] is True


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (version("validated"), 0, "cancer@1 is validated"),
        (version("rejected", reason="it refuses its example"), 1, "millrace: cancer@1 was rejected: it refuses its example"),
    ],
    ids=["validated", "rejected"],
)
@pytest.mark.usefixtures("impatient")
def test_an_example_is_given_to_a_version_and_its_verdict_waited_for(
    gateway: FakeGateway, run: Run, tmp_path: Path, end: dict[str, Any], code: int, said: str
) -> None:
    (tmp_path / "example.csv").write_text("city,age\nLyon,41\n")
    tried = version("needs_example", reason="it refused a made-up row")
    tried["spec"] = {**tried["spec"], "example": {"csv": "city,age\nLyon,41\n"}}
    views = iter([tried, tried])
    gateway.on("POST", f"{VERSIONS}/1:example", tried)
    gateway.on("GET", f"{VERSIONS}/1", lambda _: (200, next(views, end)))
    outcome = run("models", "example", "cancer@1", tmp_path / "example.csv", "--wait")
    assert (outcome.exit_code, (outcome.out + outcome.err).splitlines().count(said)) == (code, 1)
    assert gateway.sent("POST", f"{VERSIONS}/1:example").json == {"example": {"csv": "city,age\nLyon,41\n"}}


def test_looking_how_far_it_is_leaves_no_marks_in_the_trace(store: FakeGateway, run: Run, file: Path) -> None:
    lives(store, event("millrace.validator.version.validated.v1", 1), end=version("validated"))
    assert run("models", "upload", file, "--name", "cancer", "--wait").exit_code == 0
    assert is_sampled(store.sent("POST", VERSIONS))
    assert not is_sampled(store.sent("GET", f"{VERSIONS}/1"))


def test_upload_of_the_same_content_says_so(store: FakeGateway, run: Run, file: Path) -> None:
    store.on("POST", VERSIONS, version("validated"))
    outcome = run("models", "upload", file, "--name", "cancer", "--wait")
    assert outcome.exit_code == 0
    assert outcome.out == "cancer@1 is validated (the same content was uploaded before)\n"


def test_json_of_an_upload_is_the_version_with_its_trace(store: FakeGateway, run: Run, file: Path) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    shown = json.loads(run("models", "upload", file, "--name", "cancer", "--json").out)
    assert shown["version"] == 1
    assert len(shown["trace_id"]) == 32


def test_a_slow_registry_is_asked_what_became_of_the_command(store: FakeGateway, run: Run, file: Path) -> None:
    store.on("POST", VERSIONS, {"operation_id": "op-9", "operation_url": "/api/v1/operations/op-9"}, status=202)
    fact = {"type": "millrace.registry.version.registered.v1", "data": {"model_name": "cancer", "version": 4}}
    store.on("GET", "/api/v1/operations/op-9", {"id": "op-9", "done": True, "outcome": fact})
    assert run("models", "upload", file, "--name", "cancer").out == "cancer@4 is registered\n"


def test_a_command_that_a_slow_registry_refuses_fails_with_its_reason(store: FakeGateway, run: Run, file: Path) -> None:
    store.on("POST", VERSIONS, {"operation_id": "op-9"}, status=202)
    store.on("GET", "/api/v1/operations/op-9", {"id": "op-9", "done": True, "error": "no such thing"})
    outcome = run("models", "upload", file, "--name", "cancer")
    assert (outcome.exit_code, outcome.err) == (1, "millrace: no such thing\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.joblib", "--name", "cancer"), "millrace: there is no file nowhere.joblib\n"),
        ((), "millrace: Missing argument 'path'; see: millrace models upload --help\n"),
    ],
)
def test_unusable_arguments_fail_with_one_sentence(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    outcome = run("models", "upload", *arguments)
    assert (outcome.exit_code, outcome.out, outcome.err) == (2, "", sentence)


def test_an_example_that_is_not_there_is_said_in_words(store: FakeGateway, run: Run, file: Path) -> None:
    outcome = run("models", "upload", file, "--name", "cancer", "--example", "nowhere.json")
    assert (outcome.exit_code, outcome.err) == (1, "millrace: nowhere.json cannot be read: No such file or directory\n")
    assert store.requests == []


def test_an_example_that_is_not_json_is_refused_before_anything_is_sent(store: FakeGateway, run: Run, file: Path, tmp_path: Path) -> None:
    (tmp_path / "example.json").write_text("{")
    outcome = run("models", "upload", file, "--name", "cancer", "--example", tmp_path / "example.json")
    assert outcome.exit_code == 1
    assert "example.json is not JSON" in outcome.err
    assert store.requests == []


def test_list_is_a_table_or_json(gateway: FakeGateway, run: Run) -> None:
    models = [{"model_name": "cancer", "latest_version": 2, "aliases": {"champion": 1}, "updated_at": BEGAN.isoformat()}]
    gateway.on("GET", "/api/v1/models", {"models": models})
    header, row = run("models", "list").out.splitlines()
    assert header.split() == ["MODEL", "LATEST", "ALIASES", "UPDATED"]
    assert row.split()[:3] == ["cancer", "2", "champion=1"]
    assert json.loads(run("models", "list", "--json").out) == {"models": models}


def test_show_of_an_alias_asks_for_that_version(gateway: FakeGateway, run: Run) -> None:
    signature = {"inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 30]}], "outputs": []}
    finding = {"rule": "example", "severity": "warn", "message": "no example was given"}
    gateway.on("GET", f"{VERSIONS}/champion", version("validated", signature=signature, findings=[finding], aliases=["champion"]))
    out = run("models", "show", "cancer:champion").out
    assert "cancer@1" in out
    assert "input FP64[-1, 30]" in out
    assert "warn: no example was given (example)" in out


def test_show_of_a_model_lists_its_versions(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", "/api/v1/models/cancer", {"model_name": "cancer", "aliases": {}, "created_at": BEGAN.isoformat()})
    gateway.on("GET", VERSIONS, {"versions": [version("rejected", reason="it is empty")]})
    assert run("models", "show", "cancer").out.splitlines()[-1].endswith("it is empty")


def test_alias_points_at_a_version(gateway: FakeGateway, run: Run) -> None:
    gateway.on("PUT", "/api/v1/models/cancer/aliases/champion", {})
    assert run("models", "alias", "cancer", "champion=2").exit_code == 0
    assert gateway.sent("PUT", "/api/v1/models/cancer/aliases/champion").json == {"version": 2}


def test_archive_needs_a_version(gateway: FakeGateway, run: Run) -> None:
    assert run("models", "archive", "cancer").err == "millrace: 'cancer' names no version; write NAME@VERSION, for example cancer@1\n"
    gateway.on("POST", f"{VERSIONS}/2:archive", {})
    assert run("models", "archive", "cancer@2").out == "cancer@2 is archived\n"


def test_names_cannot_leave_their_place_in_the_path(gateway: FakeGateway, run: Run) -> None:
    outcome = run("models", "show", "../endpoints@1")
    assert outcome.exit_code == 1
    assert gateway.requests[0].path == "/api/v1/models/..%2Fendpoints/versions/1"


def test_an_impossible_name_is_refused_before_the_file_is_sent(store: FakeGateway, run: Run, file: Path) -> None:
    outcome = run("models", "upload", file, "--name", "a/b")
    assert outcome.exit_code == 2
    assert outcome.err.startswith("millrace: 'a/b' is not a name")
    assert store.requests == []


def test_an_example_may_be_a_csv_file_or_an_array(tmp_path):
    import numpy as np

    from libs.cli.errors import CommandError
    from libs.cli.models import read_example

    (tmp_path / "rows.csv").write_text("a,b\n1,x\n")
    assert read_example(tmp_path / "rows.csv") == {"csv": "a,b\n1,x\n"}
    np.save(tmp_path / "rows.npy", np.array([[1.5, 2.0]]))
    assert read_example(tmp_path / "rows.npy") == {"inputs": [[1.5, 2.0]]}
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    assert read_example(tmp_path / "words.npy") == {"inputs": ["a", "b"]}
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(CommandError, match="cannot be read as an array"):
        read_example(tmp_path / "bad.npy")


def test_consent_to_code_is_sent(store: FakeGateway, run: Run, file: Path) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    assert run("models", "upload", file, "--name", "cancer", "--allow-code").exit_code == 0
    assert store.sent("POST", VERSIONS).json["allow_code"] is True


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"columns": ["a"], "data": [[1.0]]}, {"dataframe_split": {"columns": ["a"], "data": [[1.0]]}}),
        ({"inputs": [[1.0]]}, {"inputs": [[1.0]]}),
        ({"data": [[1.0]]}, {"instances": [[1.0]]}),
        (None, None),
    ],
)
def test_a_model_folder_of_mlflow_is_its_pickle_requirements_and_example(
    store: FakeGateway, run: Run, tmp_path: Path, example: Any, expected: Any
) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "MLmodel").write_text("flavors: {}")
    (folder / "model.pkl").write_bytes(b"a model")
    (folder / "requirements.txt").write_text("mlflow==2.14.1\nmlflow-skinny\nmlflow-plugin==1\nscikit-learn==1.7.0\n")
    if example is not None:
        (folder / "input_example.json").write_text(json.dumps(example))
    assert run("models", "upload", folder, "--name", "cancer").exit_code == 0
    body = store.sent("POST", VERSIONS).json
    assert body["artifact"]["filename"] == "model.pkl"
    assert (body["requirements"], body.get("example")) == (["mlflow-plugin==1", "scikit-learn==1.7.0"], expected)


def test_the_modules_that_mlflow_saved_with_a_model_travel_as_its_code(store: FakeGateway, run: Run, tmp_path: Path) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    folder = made(tmp_path / "model", "model.pkl", "code/shop/__init__.py")
    (folder / "MLmodel").write_text("flavors:\n  python_function:\n    code: code\n    loader_module: mlflow.sklearn\n")
    assert run("models", "upload", folder, "--name", "cancer").exit_code == 0
    model, code = sent_artifacts(store)
    assert (model.body, names_in(code.body)) == (b"x", ["shop/__init__.py"])
    assert store.sent("POST", VERSIONS).json["code"]["sha256"] == hashlib.sha256(code.body).hexdigest()


def names_in(content: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return archive.getnames()


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def sent_artifacts(gateway: FakeGateway) -> list[Request]:
    return [request for request in gateway.requests if request.path == "/api/v1/artifacts"]


def test_a_directory_travels_as_one_archive_that_is_the_same_each_time(store: FakeGateway, run: Run, tmp_path: Path) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    names = ("z.txt", "model.onnx", "data/w.bin", "__pycache__/m.pyc", "data/.DS_Store", ".git/HEAD")
    folder = made(tmp_path / "cancer", *names)
    assert run("models", "upload", folder, "--name", "cancer").exit_code == 0
    os.utime(folder / "z.txt", (1, 1))
    (folder / "z.txt").chmod(0o600)
    assert run("models", "upload", folder, "--name", "cancer").exit_code == 0
    first, again = sent_artifacts(store)
    assert first.body == again.body
    assert (names_in(first.body), first.query["filename"]) == (["data/w.bin", "model.onnx", "z.txt"], "cancer.tar")


@pytest.mark.parametrize("name", ["model.tar.gz", "model.zip"])
def test_an_archive_travels_as_it_is(store: FakeGateway, run: Run, tmp_path: Path, name: str) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    (tmp_path / name).write_bytes(b"as it is")
    assert run("models", "upload", tmp_path / name, "--name", "cancer").exit_code == 0
    assert [(request.body, request.query["filename"]) for request in sent_artifacts(store)] == [(b"as it is", name)]


@pytest.mark.parametrize(
    ("names", "code", "filename", "inside"),
    [
        (("helpers.py",), "helpers.py", "helpers.py", None),
        (("src/helpers.py", "src/more/__init__.py"), "src", "src.tar", ["helpers.py", "more/__init__.py"]),
        (("helpers/__init__.py", "helpers/data.csv"), "helpers", "helpers.tar", ["helpers/__init__.py", "helpers/data.csv"]),
    ],
    ids=["module", "folder", "package"],
)
def test_code_is_uploaded_beside_the_model(
    store: FakeGateway, run: Run, file: Path, tmp_path: Path, names: tuple[str, ...], code: str, filename: str, inside: list[str] | None
) -> None:
    store.on("POST", VERSIONS, version("registered"), status=201)
    made(tmp_path, *names)
    assert run("models", "upload", file, "--name", "cancer", "--code", tmp_path / code).exit_code == 0
    _, sent = sent_artifacts(store)
    digest = hashlib.sha256(sent.body).hexdigest()
    assert store.sent("POST", VERSIONS).json["code"] == {"sha256": digest, "size_bytes": len(sent.body), "filename": filename}
    assert sent.body == b"x" if inside is None else names_in(sent.body) == inside


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("none", "there is no file {path}"),
        ("notes.txt", "{path} is neither a folder, a Python module (.py) nor an archive (.tar, .tar.gz, .tgz, .zip)"),
        ("my-helpers.py", "{path} is no module that can be imported: 'my-helpers' is no name in Python"),
        ("empty", "{path} has no Python module in it"),
    ],
)
def test_code_that_is_none_is_not_uploaded(store: FakeGateway, run: Run, file: Path, tmp_path: Path, code: str, reason: str) -> None:
    made(tmp_path, "notes.txt", "my-helpers.py", "empty/notes.txt")
    outcome = run("models", "upload", file, "--name", "cancer", "--code", tmp_path / code)
    assert (outcome.exit_code, outcome.err) == (2, f"millrace: {reason.format(path=tmp_path / code)}\n")
    assert sent_artifacts(store) == []


def test_a_link_in_a_directory_is_refused_with_the_remedy(run: Run, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "model.pkl")
    (folder / "data").symlink_to("/etc")
    outcome = run("models", "upload", folder, "--name", "cancer")
    reason = "is a link, which does not travel; put what it leads to in its place"
    assert (outcome.exit_code, outcome.err) == (2, f"millrace: {folder / 'data'} {reason}\n")


def test_a_version_of_several_files_is_shown_with_them(gateway: FakeGateway, run: Run) -> None:
    code = {"sha256": "1" * 64, "size_bytes": 5, "filename": "helpers.py"}
    shown = version("inspected", files={"sha256": "2" * 64, "size_bytes": 7, "files": 3, "model": "f/model.onnx"})
    shown["spec"]["code"] = code
    gateway.on("GET", f"{VERSIONS}/1", shown)
    out = run("models", "show", "cancer@1").out
    assert "3 files, 7 B, the model is f/model.onnx" in out
    assert "helpers.py, 5 B, sha256 1111" in out


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        ((), "is a directory without a model's file (.joblib, .pkl, .pickle, .onnx) in it"),
        (("a.txt",), "is a directory without a model's file (.joblib, .pkl, .pickle, .onnx) in it"),
        (("MLmodel", "model.h5"), "is an MLflow model without a model.pkl, so not one of scikit-learn; upload the model's own file"),
    ],
)
def test_a_directory_is_refused_with_the_remedy(run: Run, tmp_path: Path, names: tuple[str, ...], remedy: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    outcome = run("models", "upload", folder, "--name", "cancer")
    assert (outcome.exit_code, outcome.err) == (2, f"millrace: {folder} {remedy}\n")
