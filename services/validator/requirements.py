"""Which packages an artifact needs, from what it imports and the versions it carries."""

from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement as Pep508Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from libs.environments import this_python
from libs.requirements import InvalidRequirementsError, parse_requirements
from schemas.validation import Finding
from services.validator.onnx_graph import OnnxSummary
from services.validator.pickle_scan import STANDARD_ROOTS
from services.validator.pickle_stream import PickleFacts
from services.validator.rules import rejection, warning

PACKAGES = {
    "sklearn": "scikit-learn",
    "numpy": "numpy",
    "scipy": "scipy",
    "joblib": "joblib",
    "threadpoolctl": "threadpoolctl",
    "pandas": "pandas",
    "polars": "polars",
    "pyarrow": "pyarrow",
    "xgboost": "xgboost",
    "lightgbm": "lightgbm",
    "catboost": "catboost",
    "imblearn": "imbalanced-learn",
    "category_encoders": "category-encoders",
    "feature_engine": "feature-engine",
    "mlxtend": "mlxtend",
    "statsmodels": "statsmodels",
    "patsy": "patsy",
    "river": "river",
    "sksurv": "scikit-survival",
    "lifelines": "lifelines",
    "hdbscan": "hdbscan",
    "umap": "umap-learn",
    "pynndescent": "pynndescent",
    "numba": "numba",
    "pyod": "pyod",
    "sktime": "sktime",
    "tslearn": "tslearn",
    "pmdarima": "pmdarima",
    "skopt": "scikit-optimize",
    "interpret": "interpret-core",
    "skrub": "skrub",
    "gplearn": "gplearn",
    "fastai": "fastai",
    "torch": "torch",
    "skorch": "skorch",
    "spacy": "spacy",
    "nltk": "nltk",
    "gensim": "gensim",
    "dateutil": "python-dateutil",
    "pytz": "pytz",
    "six": "six",
    "cloudpickle": "cloudpickle",
    "dill": "dill",
}
"""Top-level module -> the package that provides it."""

BRINGS = {
    "scikit-learn": ("numpy", "scipy", "joblib", "threadpoolctl"),
    "pandas": ("numpy", "python-dateutil", "pytz"),
    "scipy": ("numpy",),
    "xgboost": ("numpy", "scipy"),
    "lightgbm": ("numpy", "scipy"),
    "catboost": ("numpy", "scipy", "pandas"),
    "imbalanced-learn": ("scikit-learn", "numpy", "scipy", "joblib", "threadpoolctl"),
    "category-encoders": ("scikit-learn", "pandas", "numpy", "scipy", "statsmodels", "patsy"),
    "feature-engine": ("scikit-learn", "pandas", "numpy", "scipy", "statsmodels"),
    "mlxtend": ("scikit-learn", "pandas", "numpy", "scipy", "joblib"),
    "statsmodels": ("numpy", "scipy", "pandas", "patsy"),
    "onnxruntime": ("numpy",),
}
"""Package -> the packages among ours that come with it."""

_BRING_NOTHING_UNKNOWN = frozenset(BRINGS) | {
    "numpy",
    "joblib",
    "threadpoolctl",
    "cloudpickle",
    "dill",
    "six",
    "pytz",
    "python-dateutil",
}

_WHEELS_FOR_PYTHON_3_11_SINCE = Version("1.1.3")
_NEWEST_PYTHON = ((Version("1.0.1"), "3.10"), (Version("0.24"), "3.9"), (Version("0.22"), "3.8"), (Version("0"), "3.7"))
"""First version of scikit-learn -> newest Python that it and the following have wheels for."""

_SELECTING = ("ColumnTransformer", "OneHotEncoder", "OrdinalEncoder", "TargetEncoder")
"""Fitted on named columns, these are given a DataFrame: they select by name, or see text."""

_NUMPY_2_SINCE_SCIKIT_LEARN = Version("1.4.2")
"""Earlier wheels were compiled against NumPy 1 and crash under 2."""


@dataclass(frozen=True, slots=True)
class NeededPackages:
    """Requirements, and what there is to say of them."""

    requirements: tuple[str, ...]
    findings: tuple[Finding, ...] = ()


def known_roots(given: Iterable[str] | None) -> frozenset[str]:
    """Return the top-level modules that the known packages and the given requirements provide, as far as names tell."""
    if given is None:
        return frozenset(PACKAGES)
    return frozenset(PACKAGES) | {name.replace("-", "_") for name in _names(given)}


def may_provide(needed: Iterable[str], inferred: bool) -> bool:
    """Tell whether packages may bring modules with names that are not known here: given ones, and those with dependencies of their own."""
    return not inferred or not _names(needed) <= _BRING_NOTHING_UNKNOWN


def infer_for_pickle(facts: PickleFacts, uses: frozenset[str] = frozenset()) -> NeededPackages:
    """Infer what a pickle needs: the scikit-learn it was saved with, exactly; a NumPy of the right generation; the rest by name.

    ``uses`` are the modules that code beside it imports.
    """
    packages = {PACKAGES[root] for root in facts.roots | uses if root in PACKAGES}
    if facts.uses_joblib:
        packages.add("joblib")
    if facts.sets_output or (facts.has_feature_names and _selects_columns(facts)):
        packages.add("pandas")
    version, findings = _sklearn_version(facts)
    lines = {package: package for package in packages - set(_brought(packages))} | {"numpy": _numpy(facts, version)}
    if version is not None and "scikit-learn" in lines:
        lines["scikit-learn"] = f"scikit-learn=={version}"
    return NeededPackages(tuple(sorted(lines.values())), (*findings, *_without_wheels(version)))


def infer_for_onnx(summary: OnnxSummary) -> NeededPackages:
    """A graph needs ONNX Runtime, whatever its operator set: newer runtimes read older sets."""
    del summary
    return NeededPackages(("numpy", "onnxruntime"))


def check_given(given: Iterable[str], facts: PickleFacts | None) -> NeededPackages:
    """Read given requirements and compare them with what the artifact says it needs; they are never changed."""
    try:
        requirements = parse_requirements(given)
    except InvalidRequirementsError as error:
        return NeededPackages((), (rejection("requirements.invalid", error.message),))
    lines = tuple(str(requirement) for requirement in requirements)
    if facts is None:
        return NeededPackages(lines)
    findings = (*_missing(lines, facts), *_version_differences(lines, facts), *_without_wheels(_pinned_sklearn(lines)))
    return NeededPackages(lines, findings)


def _missing(lines: tuple[str, ...], facts: PickleFacts) -> list[Finding]:
    names = _names(lines)
    provided = names | set(_brought(names))
    findings = []
    for root in sorted(facts.roots - STANDARD_ROOTS):
        package = PACKAGES.get(root)
        if package is not None and package not in provided:
            message = f"the artifact imports '{root}', and none of its requirements seems to provide it ({package} would)"
            findings.append(warning("requirements.missing", message, module=root, package=package))
    return findings


def _version_differences(lines: tuple[str, ...], facts: PickleFacts) -> list[Finding]:
    version, _ = _sklearn_version(facts)
    if version is None:
        return []
    for line in lines:
        requirement = Pep508Requirement(line)
        if requirement.name == "scikit-learn" and not SpecifierSet(str(requirement.specifier)).contains(str(version), prereleases=True):
            message = f"the artifact was saved with scikit-learn {version}, its requirements ask for scikit-learn{requirement.specifier}"
            return [warning("requirements.version_differs", message, saved_with=str(version), required=str(requirement.specifier))]
    return []


def _names(lines: Iterable[str]) -> set[str]:
    names = set()
    for requirement in parse_requirements(lines):
        names.add(requirement.name)
    return names


def _brought(packages: Iterable[str]) -> Iterable[str]:
    for package in packages:
        yield from BRINGS.get(package, ())


def _without_wheels(sklearn: Version | None) -> tuple[Finding, ...]:
    """The builder installs wheels only, and old versions have none for the Python of this platform."""
    if sklearn is None or sklearn >= _WHEELS_FOR_PYTHON_3_11_SINCE or Version(this_python()) < Version("3.11"):
        return ()
    newest = next(python for since, python in _NEWEST_PYTHON if sklearn >= since)
    message = (
        f"the artifact needs scikit-learn {sklearn}, which has no wheels for this platform's Python {this_python()} (Python {newest} is "
        "the newest that has); train and save it with scikit-learn 1.2 or later, or name a version to try with --requirements"
    )
    return (rejection("requirements.no_wheels", message, saved_with=str(sklearn), python=this_python(), newest_python=newest),)


def _pinned_sklearn(lines: tuple[str, ...]) -> Version | None:
    """The scikit-learn that requirements name exactly."""
    for line in lines:
        requirement = Pep508Requirement(line)
        pins = [part.version for part in requirement.specifier if part.operator == "==" and not part.version.endswith(".*")]
        if requirement.name == "scikit-learn" and pins:
            return Version(pins[0])
    return None


def _selects_columns(facts: PickleFacts) -> bool:
    return any(name.name in _SELECTING and name.module.startswith("sklearn.") for name in facts.globals)


def _sklearn_version(facts: PickleFacts) -> tuple[Version | None, tuple[Finding, ...]]:
    """Return the newest version the estimators say they were saved with, if it is one that was released."""
    versions = []
    for text in facts.sklearn_versions:
        try:
            versions.append(Version(text))
        except InvalidVersion:
            continue
    if not versions:
        return None, ()
    newest = max(versions)
    if newest.is_devrelease or newest.local:
        message = f"the artifact was saved with scikit-learn {newest}, which was never released; any version may be installed for it"
        return None, (warning("requirements.unreleased_version", message, saved_with=str(newest)),)
    return newest, ()


def _numpy(facts: PickleFacts, sklearn: Version | None) -> str:
    modules = {name.module for name in facts.globals}
    if any(module.startswith("numpy._core") for module in modules):
        return "numpy>=2"
    if any(module.startswith("numpy.core") for module in modules) or (sklearn is not None and sklearn < _NUMPY_2_SINCE_SCIKIT_LEARN):
        return "numpy<2"
    return "numpy"
