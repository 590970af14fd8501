"""Examples in every form that the protocols take."""

import doctest
from typing import Any

import numpy as np
import pytest

from libs.inference import examples
from libs.inference.errors import InvalidInputError
from schemas.inference import Datatype, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="input", datatype=Datatype.FP64, shape=(-1, 2)),),
    outputs=(TensorSpec(name="predict", datatype=Datatype.INT64, shape=(-1,)),),
    feature_names=("a", "b"),
)
FORMS: list[dict[str, Any]] = [
    {"instances": [[1, 2], [3, 4]]},
    {"instances": [{"a": 1, "b": 2}, {"b": 4, "a": 3}]},
    {"inputs": {"a": [1, 3], "b": [2, 4]}},
    {"inputs": [{"name": "input", "datatype": "FP64", "shape": [2, 2], "data": [1, 2, 3, 4]}]},
    {"dataframe_split": {"columns": ["b", "a"], "data": [[2, 1], [4, 3]]}},
    {"dataframe_records": [{"a": 1, "b": 2}, {"a": 3, "b": 4}]},
    {"csv": "a,b\n1,2\n3,4\n"},
]


@pytest.mark.parametrize("example", FORMS, ids=lambda form: next(iter(form)))
def test_every_form_is_read_as_its_protocol_reads_it(example: dict[str, Any]) -> None:
    assert np.array_equal(examples.read(example, SIGNATURE).inputs["input"], [[1, 2], [3, 4]])


def test_csv_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="'csv' must be the text"):
        examples.read({"csv": [1]}, SIGNATURE)


def test_kinds_of_columns_whose_values_disagree_are_not_told() -> None:
    assert examples.column_kinds({"inputs": {"a": [1, "x"], "b": [None], "c": [True, None]}}) == {"c": "boolean"}


def test_a_malformed_example_has_no_columns() -> None:
    for example in ({"csv": '"'}, {"dataframe_split": {"columns": 1}}, {"instances": [1]}, {"csv": "1,2\n3,4\n"}):
        assert examples.column_kinds(example) is None


def test_the_documented_examples_hold() -> None:
    assert doctest.testmod(examples).failed == 0


def test_a_table_is_read_by_its_columns_and_passes_over_those_that_the_model_drops() -> None:
    columns = (
        TensorSpec(name="plan", datatype=Datatype.BYTES, shape=(-1,), dtype="object"),
        TensorSpec(name="income", datatype=Datatype.FP64, shape=(-1,), dtype="float64"),
    )
    signature = SIGNATURE.model_copy(update={"inputs": columns, "feature_names": None, "ignored_columns": ("zip",)})
    rows = [{"plan": "free", "income": 1.5, "zip": "00501"}, {"plan": "pro", "income": None, "zip": "10115"}]
    for example in (
        {"instances": rows},
        {"inputs": {name: [row[name] for row in rows] for name in rows[0]}},
        {"dataframe_records": rows},
        {"csv": "zip,plan,income\n00501,free,1.5\n10115,pro,\n"},
    ):
        inputs = examples.read(example, signature).inputs
        assert inputs["plan"].tolist() == [b"free", b"pro"]
        assert np.array_equal(inputs["income"], [1.5, np.nan], equal_nan=True)
    with pytest.raises(InvalidInputError, match="'plan' expects strings"):
        examples.read({"instances": [[30, 20]]}, signature)


def test_an_empty_cell_is_no_empty_text_in_a_column_of_text() -> None:
    def column(name: str, dtype: str) -> TensorSpec:
        return TensorSpec(name=name, datatype=Datatype.BYTES, shape=(-1,), dtype=dtype)

    signature = SIGNATURE.model_copy(update={"inputs": (column("t", "object"), column("day", "datetime64[ns]")), "feature_names": None})
    inputs = examples.read({"csv": "t,day\nx,\n,2026-11-30\n"}, signature).inputs
    assert (inputs["t"].tolist(), inputs["day"].tolist()) == ([b"x", None], [None, b"2026-11-30"])
