"""The runner stands alone: old syntax, no imports of ours, formats by their own libraries."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

from libs.inference.supervisor import RUNNER_DIRECTORY
from tests.unit.runner.models import running

SOURCES = sorted(RUNNER_DIRECTORY.rglob("*.py"))
MODEL_LIBRARIES = {"numpy", "joblib", "pandas", "onnxruntime"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(RUNNER_DIRECTORY)))
def test_every_module_is_python_3_9_and_imports_nothing_of_the_platform(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    assert {name.partition(".")[0] for name in imported} <= MODEL_LIBRARIES | sys.stdlib_module_names


async def test_an_onnx_graph_answers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString())
    async with running(path, tmp_path, format="onnx") as runner:
        client = runner.client()
        answer = await client.infer({"x": np.array([[1, 2, 3]], dtype=np.float32)}, timeout_s=10)
        assert answer.outputs["y"].tolist() == [[-1.0, -2.0, -3.0]]
        assert runner.signature.inputs[0].shape == (-1, 3)
        await client.close()
