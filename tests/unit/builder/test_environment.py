import pytest

from libs.requirements import InvalidRequirementsError
from services.builder.environment import environment_request, explain

NO_SOLUTION = "error: No solution found when resolving dependencies\n  cause: "


def _request(*requirements: str, python: str = "3.11", platform: str = "x86_64-linux") -> str:
    return environment_request(requirements, python=python, platform=platform).key


def test_equal_requirements_have_an_equal_key_however_they_are_written() -> None:
    assert _request("Scikit_Learn == 1.7.2", "numpy<3,>=2") == _request("numpy>=2,<3", "scikit-learn==1.7.2")


def test_requirements_python_and_platform_are_the_key() -> None:
    keys = {_request("a"), _request("a==1"), _request("a", python="3.12"), _request("a", platform="arm64-darwin")}
    assert len(keys) == 4


def test_numpy_is_always_there() -> None:
    request = environment_request(("onnxruntime",), python="3.11", platform="x86_64-linux")
    assert request.text == "numpy\nonnxruntime\n"


def test_what_is_no_plain_requirement_is_refused() -> None:
    with pytest.raises(InvalidRequirementsError):
        environment_request(("-r /etc/passwd",), python="3.11", platform="x86_64-linux")


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (
            "Because no-such-thing was not found in the package registry and you require no-such-thing, "
            "we can conclude that your requirements are unsatisfiable.",
            "The requirements cannot be met: no-such-thing was not found in the package registry and you require no-such-thing.",
        ),
        (
            "Because scikit-learn==1.7.2 depends on numpy>=1.22.0 and you require scikit-learn==1.7.2, we can conclude that you require"
            " numpy>=1.22.0.\n         And because you require numpy<1.20, we can conclude that your requirements are unsatisfiable.",
            "The requirements cannot be met: scikit-learn==1.7.2 depends on numpy>=1.22.0 and you require scikit-learn==1.7.2; "
            "you require numpy<1.20.",
        ),
        (
            "Because numpy==1.21.0 has no usable wheels and you require numpy==1.21.0, we can conclude that your requirements are "
            "unsatisfiable.\n\nhint: Wheels are required for `numpy` because building from source is disabled for all packages",
            "The requirements cannot be met: numpy==1.21.0 has no usable wheels and you require numpy==1.21.0. "
            "Only packages with ready-made wheels are installed, because nothing may run while an environment is built.",
        ),
        (
            "Because tensorflow==1.15.0 has no wheels with a matching Python ABI tag (e.g., `cp311`) and you require tensorflow==1.15.0, "
            "we can conclude that your requirements are unsatisfiable.\n\nhint: You require CPython 3.11 (`cp311`), but we only found "
            "wheels for `tensorflow` (v1.15.0) with the following Python ABI tags: `cp27m`, `cp37m`",
            "The requirements cannot be met: tensorflow==1.15.0 has no wheels with a matching Python ABI tag (e.g., `cp311`) and you "
            "require tensorflow==1.15.0. The platform runs CPython 3.11 (cp311), and there are only wheels for tensorflow (v1.15.0) with "
            "the following Python ABI tags: cp27m, cp37m.",
        ),
    ],
)
def test_a_conflict_is_explained_by_its_premises(argument: str, reason: str) -> None:
    assert explain(NO_SOLUTION + argument) == reason


def test_an_explanation_in_an_unknown_form_is_passed_on() -> None:
    assert explain(f"{NO_SOLUTION}The moon is full.") == "The requirements cannot be met: The moon is full."


def test_a_long_argument_is_shortened() -> None:
    steps = "".join(f"Because a{i} depends on b{i}, we can conclude that c{i}.\n" for i in range(100))
    assert len(explain(NO_SOLUTION + steps)) < 450
