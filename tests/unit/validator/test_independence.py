"""Rows that depend on each other are found in the trial, by real runners on real models."""

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import zscore
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import FunctionTransformer

from libs.inference.batches import is_batchable
from schemas.registry import ArtifactFormat
from services.validator import independence
from services.validator.independence import agrees
from tests.unit.runner.models import model as from_expression
from tests.unit.runner.models import on_request
from tests.unit.validator.files import saved
from tests.unit.validator.test_validation import tried


def running_sum() -> bytes:
    """A graph whose axis 0 is time."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["time", 2]) for name in ("x", "y")]
    axis = numpy_helper.from_array(np.array(0, np.int64), "axis")
    graph = helper.make_graph([helper.make_node("CumSum", ["x", "axis"], ["y"])], "g", ends[:1], ends[1:], [axis])
    return bytes(helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8).SerializeToString())


@pytest.mark.parametrize("example", [None, {"inputs": [[1, 2], [3, 4], [5, 7]]}, {"inputs": [[1, 2]]}], ids=["none", "rows", "one row"])
async def test_a_running_sum_over_the_rows_is_never_batched(tmp_path: Path, example: Any) -> None:
    path = tmp_path / "sum.onnx"
    path.write_bytes(running_sum())
    verdict = await tried(path, tmp_path, format=ArtifactFormat.ONNX, example=example)
    assert verdict.accepted
    assert verdict.signature is not None
    assert not is_batchable(verdict.signature)
    assert [finding.rule for finding in verdict.findings] == ["trial.rows_depend"]


async def test_a_zscore_over_the_request_is_never_batched(tmp_path: Path) -> None:
    model = FunctionTransformer(zscore).fit(np.random.default_rng(0).normal(size=(9, 4)))
    verdict = await tried(saved(model, tmp_path / "m"), tmp_path, example={"instances": [[1, 2, 3, 4], [2, 4, 8, 1]]})
    assert verdict.signature is not None
    assert not verdict.signature.batchable


async def test_missing_values_that_are_filled_in_from_the_other_rows_are_never_batched(tmp_path: Path) -> None:
    model = from_expression("lambda X, np=__import__('numpy'): np.where(np.isnan(X), np.nanmean(X, axis=0), X).sum(1)")
    for example in (None, {"instances": [[1, 2, 3], [2, 4, 8]]}, {"instances": [[1, 2, 3]]}):
        verdict = await tried(model, tmp_path, example=example)
        assert verdict.signature is not None
        assert not verdict.signature.batchable, example
        assert "missing" in verdict.findings[-1].message


async def test_missing_texts_that_are_taken_from_the_row_before_are_found() -> None:
    async def ask(inputs: Any) -> Any:
        filled, last = [], b"?"
        for value in inputs["x"].tolist():
            last = last if value is None else value
            filled.append(last)
        return {"y": np.array(filled, dtype=object)}

    rows = {"x": np.array([b"a", b"b", b"c", b"d", b"e"], dtype=object)}
    assert await independence.judge(ask, [rows]) is None
    assert "missing values" in str(await independence.judge(ask, [rows], ["x"]))


async def test_a_model_that_takes_no_missing_values_stays_batchable() -> None:
    from libs.inference.errors import InvalidInputError

    asked = []

    async def ask(inputs: Any) -> Any:
        asked.append(inputs)
        if np.isnan(inputs["x"]).any():
            raise InvalidInputError("no NaN, please")
        return {"y": inputs["x"] * 2}

    rows = {"x": np.arange(10.0).reshape(5, 2)}
    assert await independence.judge(ask, [rows, rows]) is None
    assert len(asked) <= 12


@pytest.mark.parametrize(
    "model",
    [
        LogisticRegression(max_iter=500),
        RandomForestClassifier(20, random_state=0),
        MLPRegressor(hidden_layer_sizes=(50,), max_iter=30, random_state=0),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
async def test_ordinary_models_stay_batchable(tmp_path: Path, model: Any) -> None:
    x, y = load_iris(return_X_y=True)
    verdict = await tried(saved(model.fit(x, y), tmp_path / "m"), tmp_path, example={"instances": x[:20].tolist()})
    assert verdict.signature is not None
    assert verdict.signature.batchable, verdict.findings


async def test_an_uploader_may_forbid_batching(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    path = saved(LogisticRegression(max_iter=500).fit(x, y), tmp_path / "m")
    verdict = await tried(path, tmp_path, example={"instances": x[:2].tolist()}, forbid_batching=True)
    assert verdict.signature is not None
    assert not verdict.signature.batchable


async def test_a_model_that_differs_when_asked_again_is_never_batched(tmp_path: Path) -> None:
    value = on_request("[__import__('random').random() for _ in values]")
    verdict = await tried(value, tmp_path)
    if verdict.accepted and verdict.signature is not None and verdict.golden is not None:
        assert not verdict.signature.batchable


async def test_a_model_that_takes_only_so_many_rows_is_found() -> None:
    from libs.inference.errors import InvalidInputError

    async def ask(inputs: Any) -> Any:
        if len(inputs["x"]) != 5:
            raise InvalidInputError("five rows, please")
        return {"y": inputs["x"]}

    reason = await independence.judge(ask, [{"x": np.arange(10.0).reshape(5, 2)}])
    assert reason is not None
    assert "another order" in reason or "alone" in reason


async def test_rows_that_a_model_refuses_say_nothing() -> None:
    from libs.inference.errors import InvalidInputError

    async def ask(inputs: Any) -> Any:
        raise InvalidInputError("no")

    assert await independence.judge(ask, [{"x": np.zeros((5, 2))}]) is None


def test_text_and_integers_agree_exactly_and_floats_but_for_rounding() -> None:
    assert agrees(np.array([b"a"], dtype=object), np.array([b"a"], dtype=object))
    assert not agrees(np.array([1]), np.array([2]))
    assert agrees(np.array([1.0], np.float32), np.array([1.0 + 5e-6], np.float32))
    assert not agrees(np.array([1.0], np.float32), np.array([1.0 + 1e-3], np.float32))
    assert agrees(np.array([np.inf, np.nan]), np.array([np.inf, np.nan]))
    assert not agrees(np.array([np.inf]), np.array([1.0]))
    assert not agrees(np.array([1.0, 2.0]), np.array([1.0]))


def test_made_up_rows_have_a_size_that_no_other_axis_has() -> None:
    from schemas.inference import Datatype, Signature, TensorSpec

    tensors = (TensorSpec(name="x", datatype=Datatype.FP64, shape=(-1, 5)), TensorSpec(name="t", datatype=Datatype.BYTES, shape=(-1, 7)))
    rows = independence.made_up_rows(Signature(inputs=tensors, outputs=tensors[:1]))
    assert {array.shape for array in rows.values()} == {(11, 5), (11, 7)}
    assert len({row.tobytes() for row in rows["x"]}) == len(set(map(tuple, rows["t"].tolist()))) == 11


def test_the_documented_examples_hold() -> None:
    assert doctest.testmod(independence).failed == 0
