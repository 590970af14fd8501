import importlib.util
from pathlib import Path

import pytest

from libs.bytecode import compile_tree


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def _tree(root: Path, **sources: str) -> Path:
    for name, source in sources.items():
        path = root / name.replace("__in__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(source)
    return root


def _bytecode(tree: Path, module: str) -> Path:
    return Path(importlib.util.cache_from_source(tree / f"{module}.py"))


def test_modules_are_compiled_and_tests_are_not(tmp_path: Path, kept: Path) -> None:
    tree = _tree(tmp_path / "a", pump="x = 1", tests__in__pump="x = 2")
    compile_tree(tree, kept, 0, 1)
    assert [path.name.split(".")[0] for path in tree.rglob("*.pyc")] == ["pump"]


def test_an_equal_module_elsewhere_is_a_link_to_the_same_bytecode(tmp_path: Path, kept: Path) -> None:
    one, other = _tree(tmp_path / "a", pump="x = 1"), _tree(tmp_path / "b", mill="x = 1")
    compile_tree(one, kept, 0, 1)
    compile_tree(other, kept, 0, 1)
    assert _bytecode(one, "pump").samefile(_bytecode(other, "mill"))


def test_another_source_has_another_bytecode(tmp_path: Path, kept: Path) -> None:
    tree = _tree(tmp_path / "a", pump="x = 1", mill="x = 2")
    compile_tree(tree, kept, 0, 1)
    assert not _bytecode(tree, "pump").samefile(_bytecode(tree, "mill"))


def test_shares_together_are_the_whole(tmp_path: Path, kept: Path) -> None:
    tree = _tree(tmp_path / "a", **{f"m{number}": f"x = {number}" for number in range(7)})
    compile_tree(tree, kept, 0, 3)
    assert len(list(tree.rglob("*.pyc"))) == 3
    compile_tree(tree, kept, 1, 3)
    compile_tree(tree, kept, 2, 3)
    assert len(list(tree.rglob("*.pyc"))) == 7


def test_a_module_that_does_not_compile_is_left_out(tmp_path: Path, kept: Path) -> None:
    tree = _tree(tmp_path / "a", broken="def", deep="x = " + "(" * 5000, fine="x = 1")
    compile_tree(tree, kept, 0, 1)
    assert [path.name.split(".")[0] for path in tree.rglob("*.pyc")] == ["fine"]


def test_nothing_is_run(tmp_path: Path, kept: Path) -> None:
    ran = tmp_path / "ran"
    compile_tree(_tree(tmp_path / "a", trap=f"open({str(ran)!r}, 'w')"), kept, 0, 1)
    assert not ran.exists()
