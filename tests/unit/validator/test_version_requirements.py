"""Requirements: inferred from what an artifact imports, or given and compared with it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import sklearn

from services.validator.inspection import inspect
from services.validator.pickle_stream import Global, PickleFacts
from services.validator.requirements import check_given, infer_for_pickle
from tests.unit.validator.files import fitted, saved, written


def facts(*names: str, version: str | None = None, **changes: object) -> PickleFacts:
    made = PickleFacts(globals={Global(*name.rsplit(":", 1)): 0 for name in names}, **changes)  # type: ignore[arg-type]
    made.sklearn_versions |= {version} if version else set()
    return made


def inferred(*names: str, version: str | None = None, **changes: object) -> tuple[str, ...]:
    return infer_for_pickle(facts(*names, version=version, **changes)).requirements


def test_a_real_model_asks_for_the_scikit_learn_it_was_saved_with(tmp_path: Path) -> None:
    inspection = inspect(saved(fitted(), tmp_path / "m"))
    assert inspection.requirements == ("numpy", f"scikit-learn=={sklearn.__version__}")


@pytest.mark.parametrize(
    ("names", "version", "expected"),
    [
        (("sklearn.svm:SVC", "numpy.core.multiarray:_reconstruct"), "1.2.2", ("numpy<2", "scikit-learn==1.2.2")),
        (("sklearn.svm:SVC", "numpy:ndarray"), "1.3.2", ("numpy<2", "scikit-learn==1.3.2")),
        (("sklearn.svm:SVC", "numpy:ndarray"), "1.5.0", ("numpy", "scikit-learn==1.5.0")),
        (("sklearn.svm:SVC", "scipy.sparse:csr_matrix"), None, ("numpy", "scikit-learn")),
        (("xgboost.sklearn:XGBClassifier",), None, ("numpy", "xgboost")),
        (("lightgbm.sklearn:LGBMClassifier", "sklearn.pipeline:Pipeline"), "1.7.2", ("lightgbm", "numpy", "scikit-learn==1.7.2")),
        (("collections:OrderedDict", "unknown_thing:X"), None, ("numpy",)),
    ],
)
def test_requirements_follow_from_imports(names: tuple[str, ...], version: str | None, expected: tuple[str, ...]) -> None:
    assert inferred(*names, version=version) == expected


def test_a_file_of_joblib_needs_joblib() -> None:
    assert inferred("xgboost.sklearn:XGBClassifier", uses_joblib=True) == ("joblib", "numpy", "xgboost")


def test_columns_selected_by_name_need_pandas() -> None:
    names = ("sklearn.compose._column_transformer:ColumnTransformer",)
    assert inferred(*names, version="1.7.2", has_feature_names=True) == ("numpy", "pandas", "scikit-learn==1.7.2")
    assert inferred(*names, version="1.7.2") == ("numpy", "scikit-learn==1.7.2")


def test_a_version_that_was_never_released_is_not_asked_for() -> None:
    needed = infer_for_pickle(facts("sklearn.svm:SVC", version="1.9.dev0"))
    assert needed.requirements == ("numpy", "scikit-learn")
    assert [finding.rule for finding in needed.findings] == ["requirements.unreleased_version"]


def test_given_requirements_are_kept_and_normalised() -> None:
    needed = check_given(["Scikit_Learn == 1.7.2", "# nothing", "numpy"], facts("sklearn.svm:SVC", version="1.7.2"))
    assert (needed.requirements, needed.findings) == (("numpy", "scikit-learn==1.7.2"), ())


def test_another_version_than_the_artifacts_is_a_warning() -> None:
    needed = check_given(["scikit-learn==1.5.0"], facts("sklearn.svm:SVC", version="1.7.2"))
    assert [(finding.rule, finding.severity.value) for finding in needed.findings] == [("requirements.version_differs", "warn")]
    assert needed.findings[0].message == "the artifact was saved with scikit-learn 1.7.2, its requirements ask for scikit-learn==1.5.0"


def test_a_package_that_nothing_brings_is_a_warning() -> None:
    needed = check_given(["scikit-learn"], facts("sklearn.svm:SVC", "lightgbm.sklearn:X", "scipy:Y", "joblib:Z"))
    assert [finding.message for finding in needed.findings] == [
        "the artifact imports 'lightgbm', and none of its requirements seems to provide it (lightgbm would)"
    ]


def test_requirements_that_are_more_than_names_are_refused(tmp_path: Path) -> None:
    path = written(pickle.dumps(np.arange(3)), tmp_path / "m")
    inspection = inspect(path, requirements=["git+https://example.org/evil"])
    assert not inspection.accepted
    assert [finding.rule for finding in inspection.findings] == ["requirements.invalid"]


@pytest.mark.parametrize(
    ("version", "newest"), [("1.1.2", "3.10"), ("1.0.2", "3.10"), ("1.0", "3.9"), ("0.23.2", "3.8"), ("0.21.3", "3.7")]
)
def test_a_version_without_wheels_for_this_python_is_refused_with_the_python_that_has_them(version: str, newest: str) -> None:
    (finding,) = infer_for_pickle(facts("sklearn.svm:SVC", version=version)).findings
    assert finding.rule == "requirements.no_wheels"
    assert f"scikit-learn {version}, which has no wheels for this platform's Python" in finding.message
    assert f"(Python {newest} is the newest that has)" in finding.message


def test_only_the_version_that_would_be_installed_needs_wheels() -> None:
    old = facts("sklearn.svm:SVC", "numpy:ndarray", version="1.0.2")
    assert [finding.rule for finding in check_given(["scikit-learn==1.0.2", "numpy"], old).findings] == ["requirements.no_wheels"]
    assert [finding.rule for finding in check_given(["scikit-learn==1.7.2", "numpy"], old).findings] == ["requirements.version_differs"]
    assert infer_for_pickle(facts("sklearn.svm:SVC", version="1.1.3")).findings == ()
