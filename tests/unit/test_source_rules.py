"""Rules that every source file keeps."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("schemas", "libs", "services", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
RUNNER = ROOT / "libs" / "runner"

FORBIDDEN_MODULES = {"runpy", "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}
"""Modules whose loaders run what they read."""

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("os", "system"),
    ("os", "popen"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
    ("asyncio", "create_subprocess_shell"),
    ("joblib", "load"),
    ("torch", "load"),
    ("numpy", "load"),
    ("np", "load"),
}

MAY_DUMP = {
    ROOT / "libs" / "cli" / "demo.py": {"joblib"},
    ROOT / "benchmarks" / "platform.py": {"joblib"},
    ROOT / "benchmarks" / "peers" / "models.py": {"joblib"},
    ROOT / "benchmarks" / "runner_hop.py": {"pickle"},
    ROOT / "benchmarks" / "streaming.py": {"joblib"},
    ROOT / "examples" / "train_cancer.py": {"joblib"},
    ROOT / "examples" / "kafka_client.py": {"joblib"},
}
"""They train a model and dump it, as a user would; they load nothing."""

PEER_SERVERS = ROOT / "benchmarks" / "peers" / "servers"
"""Programs of other servers' environments, which load what the benchmark itself has trained; nothing here imports them."""


def _violations(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                yield str(node.module)
        elif isinstance(node, ast.Call):
            yield from _call_violations(node)


def _call_violations(call: ast.Call) -> Iterator[str]:
    if isinstance(call.func, ast.Name) and call.func.id in FORBIDDEN_CALLS:
        yield call.func.id
    if isinstance(call.func, ast.Attribute):
        owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
        if (owner, call.func.attr) in FORBIDDEN_ATTRIBUTES:
            yield f"{owner}.{call.func.attr}"
    for keyword in call.keywords:
        if keyword.arg in ("shell", "allow_pickle") and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
            yield f"{keyword.arg}="


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_but_the_runner_runs_what_it_reads(path):
    if path.is_relative_to(RUNNER):
        return
    found = set(_violations(ast.parse(path.read_text())))
    if path.is_relative_to(PEER_SERVERS):
        found -= {"joblib", "joblib.load"}
    assert found <= MAY_DUMP.get(path, set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import yaml",
        "eval('1')",
        "exec('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_rule_finds_each_of_its_kind(source):
    assert list(_violations(ast.parse(source)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_in_settings_only(path):
    if path.name == "settings.py" or path.is_relative_to(RUNNER):
        return
    if path.relative_to(ROOT).parts[0] in ("benchmarks", "examples"):
        return
    reads = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    allowed = {"libs/local", "libs/cli"}  # they hand an environment to the processes they start
    assert not reads or any(path.is_relative_to(ROOT / folder) for folder in allowed)
