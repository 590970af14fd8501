"""What a pickle imports is found however it is hidden, and refused when no model needs it."""

import functools
import os
import pickle
import socket
import struct
import subprocess
import webbrowser
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from services.validator.inspection import inspect
from services.validator.pickle_scan import Consent, is_forbidden
from services.validator.pickle_stream import Global
from tests.unit.validator.files import Calls, fitted, saved, written


def rules(content: bytes, tmp_path: Path) -> set[str]:
    return {finding.rule for finding in inspect(written(content, tmp_path / "m")).findings}


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "hostile",
    [
        Calls(os.system, "id"),
        Calls(socket.create_connection, ("127.0.0.1", 9)),
        Calls(subprocess.Popen, ["id"]),
        Calls(eval, "1"),
        Calls(exec, "1"),
        Calls(getattr, "", "join"),
        Calls(__import__, "os"),
        Calls(open, "/etc/passwd"),
        Calls(webbrowser.open, "x"),
        Calls(pickle.loads, b""),
        Calls(np.load, "x"),
    ],
    ids=lambda value: value.call[0].__name__,
)
def test_a_call_that_no_model_makes_is_refused(hostile: Calls, protocol: int, tmp_path: Path) -> None:
    inspection = inspect(written(pickle.dumps({"model": hostile}, protocol=protocol), tmp_path / "m"))
    assert not inspection.accepted
    assert [finding.rule for finding in inspection.findings] == ["pickle.forbidden_global"]
    assert "when it is loaded, which no model needs" in inspection.reason


@pytest.mark.parametrize("compress", [0, 3])
def test_a_call_hidden_among_the_arrays_of_a_model_is_found(compress: int, tmp_path: Path) -> None:
    model = fitted()
    objects = np.empty(2, dtype=object)
    objects[:] = [np.arange(4.0), Calls(os.system, "id")]
    model.extra = [np.arange(1000.0), objects, np.arange(5)]
    inspection = inspect(saved(model, tmp_path / "m", compress=compress))
    assert inspection.reason.startswith(f"the artifact imports '{os.system.__module__}.system'")


def test_bytes_of_an_array_that_look_like_opcodes_are_not_opcodes(tmp_path: Path) -> None:
    model = fitted()
    model.extra = np.frombuffer(b"cposix\nsystem\n(S'id'\ntR." * 40, dtype=np.uint8)
    assert inspect(saved(model, tmp_path / "m")).findings == ()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + text("posix") + b"\x94" + text("system") + b"\x94" + b"00h\x00h\x01\x93.",
        b"\x80\x04"
        + text("system")
        + text("posix")
        + b"r\x07\0\0\0"
        + b"0"
        + text("posix")
        + b"j\x07\0\0\0"
        + b"0"
        + text("system")
        + b"\x93.",
        b"(S'id'\niposix\nsystem\n.",
        b"cposix\nsystem\n(S'id'\ntR.",
        b"(cposix\nsystem\nS'id'\no.",
        b"\x80\x04" + text("joblib.parallel") + text("os.system") + b"\x93.",
        b"\x80\x04" + text("argparse") + text("_sys.exit") + b"\x93.",
        b"\x80\x04" + text("sklearn.utils") + text("joblib.externals.loky.__builtins__") + b"\x93.",
        b"\x80\x02cnumpy.testing._private.utils\nrunstring\n.",
    ],
    ids=["memo", "long memo", "INST", "GLOBAL", "OBJ", "dotted name", "private alias", "dunder", "gadget"],
)
def test_every_way_of_importing_is_seen(content: bytes, tmp_path: Path) -> None:
    assert "pickle.forbidden_global" in rules(content, tmp_path)


def test_names_of_python_2_are_translated_as_the_unpickler_does(tmp_path: Path) -> None:
    assert rules(b"ccommands\nPopen\n.", tmp_path) == {"pickle.forbidden_global"}
    assert rules(b"\x80\x04\x80\x02ccommands\nPopen\n.", tmp_path) == {"pickle.forbidden_global"}
    assert "pickle.unknown_module" in rules(b"\x80\x04ccommands\nPopen\n.", tmp_path)


def test_a_name_that_is_computed_is_refused(tmp_path: Path) -> None:
    computed = b"\x80\x04" + text("posix") + b"cbuiltins\nstr\n" + text("system") + b"\x85R\x93."
    assert rules(computed, tmp_path) == {"pickle.computed_global"}


def test_references_out_of_the_file_are_refused(tmp_path: Path) -> None:
    assert rules(b"\x80\x04\x82\x01.", tmp_path) == {"pickle.extension_code"}
    assert rules(b"\x80\x04Pabc\n.", tmp_path) == {"pickle.persistent_id"}


def test_a_class_of_the_training_script_is_explained(tmp_path: Path) -> None:
    inspection = inspect(written(b"\x80\x04c__main__\nMyModel\n)\x81.", tmp_path / "m"))
    assert inspection.reason == (
        "the artifact needs 'MyModel' from the script it was made by (__main__), which is not in the file; move 'MyModel' to a "
        "module, say helpers.py, save the model again and upload it with --code helpers.py, or save it with cloudpickle and upload it with "
        "--allow-code"
    )


def test_a_class_of_the_training_script_is_in_no_file_whatever_its_uploader_consents_to(tmp_path: Path) -> None:
    path = written(b"\x80\x04c__main__\nMyModel\n)\x81.", tmp_path / "m")
    assert [finding.rule for finding in inspect(path, consent=Consent(given=True)).findings] == ["pickle.training_script"]


def test_partial_of_a_function_that_models_use_needs_no_consent(tmp_path: Path) -> None:
    from sklearn.preprocessing import FunctionTransformer

    transformer = FunctionTransformer(functools.partial(np.clip, a_min=0.0, a_max=1.0))
    assert inspect(saved(transformer, tmp_path / "m")).findings == ()


def test_a_method_that_is_taken_by_getattr_is_named(tmp_path: Path) -> None:
    from sklearn.feature_extraction.text import CountVectorizer

    path = saved(CountVectorizer(tokenizer=str.split), tmp_path / "m")
    assert inspect(path).reason == (
        "the artifact takes 'str.split' by builtins.getattr when it is loaded, which could as well be any other method; "
        "if that is meant, upload it with --allow-code"
    )


def of_the_script(source: str, name: str) -> Any:
    """Something that a training script defines, as cloudpickle finds it there."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(source, namespace)
    return namespace[name]


CLASS = "class Doubler:\n    def predict(self, rows):\n        return rows * 2\nmodel = Doubler()"
FUNCTION = "import pandas as pd\nmodel = lambda rows: pd.DataFrame(rows)"


@pytest.mark.parametrize(("source", "named"), [(CLASS, "'Doubler'"), (FUNCTION, "a lambda")], ids=["class", "lambda"])
def test_code_that_a_file_carries_is_named_and_passes_with_consent(source: str, named: str, tmp_path: Path) -> None:
    path = written(cloudpickle.dumps(of_the_script(source, "model")), tmp_path / "m")
    refused = inspect(path)
    assert refused.reason.startswith("the artifact carries code of its own (")
    assert named in refused.reason
    assert refused.reason.endswith("if that is meant, upload it with --allow-code")
    assert len({finding.message for finding in refused.findings if "carries code" in finding.message}) == 1
    passed = inspect(path, consent=Consent(given=True))
    assert passed.accepted
    assert [finding.rule for finding in passed.findings] == ["pickle.consented_code"]
    assert "cloudpickle" in passed.requirements
    assert ("pandas" in passed.requirements) == ("pandas" in source)


def test_consent_does_not_count_where_the_platform_forbids_code(tmp_path: Path) -> None:
    path = written(pickle.dumps(Calls(getattr, "", "join")), tmp_path / "m")
    inspection = inspect(path, consent=Consent(given=True, permitted=False))
    assert inspection.reason.endswith("; this platform does not accept code in models (VALIDATOR_ALLOW_CODE)")


UNKNOWN = b"\x80\x04cacme_models.trees\nForest\n)\x81."


def test_a_module_that_nobody_provides_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    path = written(UNKNOWN, tmp_path / "m")
    assert inspect(path).reason == (
        "the artifact needs 'acme_models.trees.Forest', and no known package provides 'acme_models'; if it is your own module, "
        "upload it with --code and the file or folder that has 'acme_models'; if it is a package's, name the package with --requirements"
    )
    assert "--code" not in inspect(path, consent=Consent(permitted=False)).reason


def test_given_requirements_may_provide_a_module_that_is_not_known(tmp_path: Path) -> None:
    path = written(UNKNOWN, tmp_path / "m")
    assert inspect(path, requirements=["acme-models==1.0"]).findings == ()
    inspection = inspect(path, requirements=["acme==1.0"])
    assert (inspection.accepted, [finding.rule for finding in inspection.findings]) == (True, ["pickle.unknown_module"])


def test_a_package_with_dependencies_of_its_own_may_bring_a_module_that_is_not_known(tmp_path: Path) -> None:
    path = written(b"\x80\x04cspacy.language\nLanguage\ncthinc.model\nModel\n\x86.", tmp_path / "m")
    assert inspect(path).accepted


def test_modules_of_the_standard_library_need_nobody(tmp_path: Path) -> None:
    assert inspect(written(b"\x80\x04cjson.decoder\nJSONDecoder\n)\x81.", tmp_path / "m")).findings == ()


def test_an_array_whose_size_is_a_lie_does_not_hide_what_follows(tmp_path: Path) -> None:
    """A description that the scan and joblib would read differently is refused, not guessed."""
    wrapper = b"\x80\x04cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}("
    dtype = text("dtype") + b"cnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R"
    shape = text("shape") + b"K\x02\x85"
    assert rules(wrapper + shape + b"ub.", tmp_path) == {"pickle.broken"}
    assert rules(wrapper + dtype + b"ub.", tmp_path) == {"pickle.broken"}
    computed = text("shape") + b"cbuiltins\nint\n" + text("2") + b"\x85R\x85"
    assert rules(wrapper + dtype + computed + b"ub.", tmp_path) == {"pickle.broken"}
    assert rules(wrapper + dtype + shape + b"ub" + struct.pack("<2d", 1, 2) + b".", tmp_path) == set()


def test_a_text_without_an_end_is_bounded(tmp_path: Path) -> None:
    assert rules(b"\x80\x04X\xff\xff\xff\x7fabc", tmp_path) == {"pickle.broken"}
    assert rules(b"\x80\x04\x8d" + b"\xff" * 8, tmp_path) == {"pickle.broken"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sklearn.linear_model._logistic", "LogisticRegression"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.random._pickle", "__randomstate_ctor"),
        ("builtins", "set"),
        ("joblib.numpy_pickle", "NumpyArrayWrapper"),
        ("scipy.sparse._csr", "csr_matrix"),
        ("xgboost.sklearn", "XGBClassifier"),
        ("functools", "partial"),
        ("numpy", "trace"),
        ("pandas.core.indexes.base", "_new_Index"),
    ],
)
def test_what_models_import_is_let_through(module: str, name: str) -> None:
    assert not is_forbidden(Global(module, name))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("joblib", "load"),
        ("joblib.externals.loky.backend", "x"),
        ("pandas", "read_pickle"),
        ("operator", "attrgetter"),
        ("types", "CodeType"),
        ("cloudpickle.cloudpickle", "_make_function"),
        ("sklearn.utils", "os"),
        ("numpy", "core.os"),
    ],
)
def test_what_reaches_the_machine_is_not(module: str, name: str) -> None:
    assert is_forbidden(Global(module, name))


def test_real_models_of_many_kinds_are_let_through(tmp_path: Path) -> None:
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler
    from sklearn.svm import SVC

    rows, labels = np.random.default_rng(0).random((40, 3)), np.arange(40) % 2
    models: list[Any] = [
        RandomForestClassifier(3),
        GradientBoostingClassifier(n_estimators=3),
        HistGradientBoostingClassifier(max_iter=3),
        KNeighborsClassifier(algorithm="kd_tree"),
        make_pipeline(StandardScaler(), FunctionTransformer(np.abs), SVC()),
        make_pipeline(ColumnTransformer([("a", StandardScaler(), [0, 1])]), SVC()),
        GridSearchCV(SVC(), {"C": [1, 2]}, cv=2),
    ]
    for model in models:
        assert inspect(saved(model.fit(rows, labels), tmp_path / "m")).findings == ()
    words = make_pipeline(TfidfVectorizer(), SVC()).fit(["good day", "bad day", "good one", "bad one"], [0, 1, 0, 1])
    assert inspect(saved(words, tmp_path / "m", compress=3)).findings == ()
