import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.requirements import (
    MAX_REQUIREMENTS,
    MAX_REQUIREMENTS_BYTES,
    InvalidRequirementsError,
    Requirement,
    parse_requirements,
    with_requirement,
)


def test_spelling_and_order_do_not_matter() -> None:
    assert parse_requirements("Scikit_Learn==1.7.2\nnumpy <3, >=2") == parse_requirements(["numpy>=2,<3", "scikit-learn == 1.7.2"])


def test_comments_blank_lines_and_a_byte_order_mark_are_skipped() -> None:
    text = "\ufeff# trained with\r\n\r\nnumpy==2.4.0  # pinned\r\n"
    assert parse_requirements(text) == (Requirement("numpy", (), "==2.4.0"),)


def test_extras_and_markers_are_kept() -> None:
    (requirement,) = parse_requirements('Uvicorn[Standard]>=0.30 ; python_version < "3.13"')
    assert str(requirement) == 'uvicorn[standard]>=0.30 ; python_version < "3.13"'


def test_nothing_asked_is_an_empty_tuple() -> None:
    assert parse_requirements("\n# nothing\n") == ()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("-e .", "option"),
        ("--index-url example", "option"),
        ("--extra-index-url=x", "option"),
        ("-r other.txt", "option"),
        ("-c constraints.txt", "option"),
        ("git+ssh://host/repo.git", "URL"),
        ("https://host/p.whl", "URL"),
        ("file:///etc/passwd", "URL"),
        ("file:../x", "URL"),
        ("pkg @ https://host/p.tar.gz", "URL|file"),
        ("pkg @ git+https://host/repo", "URL"),
        ("./local", "file"),
        ("../local", "file"),
        ("/abs/path", "file"),
        ("~/path", "file"),
        ("..\\windows", "file"),
        ("package-1.0-py3-none-any.whl", "file"),
        ("package.tar.gz", "file"),
        ("numpy==1 --hash=sha256:00", "hashes"),
        ("numpy==1 \\", "hashes"),
        ("numpy==${VERSION}", "variable"),
        ("numpy==1\x00", "printed"),
        ("not a requirement", "not a requirement"),
        ("numpy==", "not a requirement"),
        ("=1.0", "not a requirement"),
        ("nümpy", "not a requirement"),
        ("a" * 1001, "longer"),
    ],
)
def test_anything_but_a_name_and_versions_is_refused(line: str, says: str) -> None:
    with pytest.raises(InvalidRequirementsError, match=says) as caught:
        parse_requirements(["numpy", line])
    assert "Line 2" in str(caught.value)


def test_too_many_requirements_are_refused() -> None:
    with pytest.raises(InvalidRequirementsError, match="501"):
        parse_requirements(f"p{i}" for i in range(MAX_REQUIREMENTS + 1))


def test_too_long_a_text_is_refused_even_when_it_is_all_comments() -> None:
    with pytest.raises(InvalidRequirementsError, match="bytes"):
        parse_requirements("#" * (MAX_REQUIREMENTS_BYTES + 1))


def test_a_missing_package_is_added_once() -> None:
    asked = parse_requirements("scikit-learn")
    added = with_requirement(asked, "numpy")
    assert [r.name for r in added] == ["numpy", "scikit-learn"]
    assert with_requirement(added, "numpy") == added


def test_a_package_that_is_asked_for_only_under_a_marker_is_added() -> None:
    asked = parse_requirements('numpy==2.1 ; python_version < "3.9"')
    assert Requirement("numpy") in with_requirement(asked, "numpy")


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        requirements = parse_requirements(text)
    except InvalidRequirementsError:
        return
    assert parse_requirements(str(r) for r in requirements) == requirements
