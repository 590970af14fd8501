"""Missing values of tables, from the body of a request through the runner's process to the model: the answer is that to NaN."""

import json
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction import DictVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from libs.inference import declarations, tabular, v1, v2, v2_grpc
from libs.inference.batches import join
from libs.inference.errors import InvalidInputError
from libs.inference.oip_proto.open_inference_pb2 import ModelInferRequest
from libs.inference.requests import InferRequest, InferResponse
from libs.runner.formats.sklearn import SklearnModel
from libs.runner.wire import MISSING
from schemas.inference import Datatype, Signature, TensorSpec
from tests.unit.runner import models

COLUMNS = (
    TensorSpec(name="age", datatype=Datatype.FP64, shape=(-1,), dtype="float64"),
    TensorSpec(name="city", datatype=Datatype.BYTES, shape=(-1,), dtype="object"),
    TensorSpec(name="day", datatype=Datatype.BYTES, shape=(-1,), dtype="datetime64[ns]"),
    TensorSpec(name="active", datatype=Datatype.FP64, shape=(-1,), dtype="boolean"),
)
SIGNATURE = Signature(inputs=COLUMNS, outputs=COLUMNS[:1])
PLAIN = Signature(inputs=(TensorSpec(name="input", datatype=Datatype.BYTES, shape=(-1,)),), outputs=COLUMNS[:1])
CELLS: dict[str, list[Any]] = {
    "age": [None, 2.0],
    "city": ["Paris", None],
    "day": [None, "2026-11-30"],
    "active": [True, None],
}
RECORDS = [dict(zip(CELLS, row, strict=True)) for row in zip(*CELLS.values(), strict=True)]
WIRE_MISSING = MISSING.to_bytes(4, "little")


def tensors(datatypes: dict[str, str]) -> bytes:
    inputs = [{"name": name, "shape": [2], "datatype": datatypes[name], "data": values} for name, values in CELLS.items()]
    return json.dumps({"inputs": inputs}).encode()


def requests() -> dict[str, InferRequest]:
    split = {"columns": list(CELLS), "data": [list(record.values()) for record in RECORDS]}
    own = {spec.name: spec.datatype.value for spec in COLUMNS}
    return {
        "rows": v1.parse(json.dumps({"instances": RECORDS}).encode(), SIGNATURE),
        "lists": v1.parse(json.dumps({"instances": split["data"]}).encode(), SIGNATURE),
        "columns": v1.parse(json.dumps({"inputs": CELLS}).encode(), SIGNATURE),
        "v2": v2.parse(tensors(own), SIGNATURE),
        "v2, BOOL": v2.parse(tensors(own | {"active": "BOOL"}), SIGNATURE),
        "split": tabular.parse_json(json.dumps({"dataframe_split": split}).encode(), SIGNATURE),
        "records": tabular.parse_json(json.dumps({"dataframe_records": RECORDS}).encode(), SIGNATURE),
        "NaN": tabular.parse_json(json.dumps({"dataframe_records": RECORDS}).replace("null", "NaN").encode(), SIGNATURE),
        "csv": tabular.parse_csv(pd.DataFrame(CELLS).to_csv(index=False).encode(), SIGNATURE),
    }


@pytest.mark.parametrize("form", requests())
def test_null_and_empty_cells_are_missing_values(form: str) -> None:
    inputs = requests()[form].inputs
    assert inputs["city"].tolist() == [b"Paris", None]
    assert inputs["day"].tolist() == [None, b"2026-11-30"]
    assert inputs["age"].tolist() == pytest.approx([np.nan, 2.0], nan_ok=True)
    assert inputs["active"].tolist() == pytest.approx([1.0, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (v1.parse, {"instances": ["a", None]}),
        (v1.parse, {"inputs": {"input": ["a", None]}}),
        (v2.parse, {"inputs": [{"name": "input", "shape": [2], "datatype": "BYTES", "data": ["a", None]}]}),
    ],
)
def test_a_model_of_plain_text_has_no_missing_values(read: Any, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"expects strings \(BYTES\); element \[1\] is null"):
        read(json.dumps(body).encode(), PLAIN)


def test_the_length_of_a_missing_text_is_refused_from_outside() -> None:
    item = {"name": "city", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 4}}
    head = json.dumps({"inputs": [item]}).encode()
    single = Signature(inputs=COLUMNS[1:2], outputs=COLUMNS[:1])
    with pytest.raises(InvalidInputError, match="column 'city' ends inside element 0"):
        v2.parse(head + WIRE_MISSING, single, len(head))
    tensor = ModelInferRequest.InferInputTensor(name="city", datatype="BYTES", shape=[1])
    message = ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[WIRE_MISSING])
    with pytest.raises(InvalidInputError, match="column 'city' ends inside element 0"):
        v2_grpc.parse(message.SerializeToString(), single)


def test_a_missing_text_in_an_answer_is_null_and_has_no_binary_form() -> None:
    texts = np.array([b"a", None], dtype=object)
    answer, asked = InferResponse({"y": texts}), InferRequest({})
    assert json.loads(v1.render(answer)) == {"predictions": ["a", None]}
    assert json.loads(v2.render(answer, asked, "m", "1")[0])["outputs"][0]["data"] == ["a", None]
    assert tabular.render_csv(answer) == b'a\n""\n'
    binary = InferRequest({}, binary_data_output=True)
    for refused in (lambda: v2.render(answer, binary, "m", "1"), lambda: v2_grpc.render(answer, asked, "m", "1")):
        with pytest.raises(InvalidInputError, match="missing"):
            refused()


async def test_the_runner_answers_missing_values_as_the_model_does(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"age": [1.0, 2, 3, 4, np.nan, 6], "city": ["Paris", "Lyon", np.nan, "Paris", np.nan, "Lyon"], "plan": ["a", "b"] * 3}
    )
    model = make_pipeline(
        ColumnTransformer(
            [
                ("n", SimpleImputer(), ["age"]),
                ("t", OneHotEncoder(), ["city"]),
                ("p", make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()), ["plan"]),
            ]
        ),
        LogisticRegression(),
    ).fit(table, [0, 1, 1, 0, 0, 1])
    asked = pd.DataFrame({"age": [np.nan, 2], "city": [np.nan, "Lyon"], "plan": ["b", np.nan]})
    joblib.dump(model, tmp_path / "model.joblib")
    async with models.running(tmp_path / "model.joblib", tmp_path, start_timeout_s=60.0) as runner:
        client = runner.client()
        assert runner.ready is not None
        body = {"inputs": {"age": [None, 2], "city": [None, "Lyon"], "plan": ["b", None]}}
        request = v1.from_document(body, runner.ready.signature)
        joined = join([request, request])
        answer = await client.infer(joined, outputs=("predict_proba",))
        await client.close()
    expected = model.predict_proba(asked)
    assert np.array_equal(answer.outputs["predict_proba"], np.concatenate([expected, expected]))


def optional_forms(signature: Signature) -> dict[str, InferRequest]:
    """A table of one column, through every reader."""
    one = Signature.model_validate(signature.model_dump())
    item = {"name": "city", "shape": [2], "datatype": "BYTES", "data": ["Paris", "Lyon"]}
    raw = b"".join(len(text).to_bytes(4, "little") + text for text in (b"Paris", b"Lyon"))
    described = {"name": "city", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [described]}).encode()
    message = ModelInferRequest(model_name="m", raw_input_contents=[raw])
    message.inputs.add(name="city", datatype="BYTES", shape=[2])
    return {
        "rows": v1.parse(b'{"instances": [{"city": "Paris"}, {"city": "Lyon"}]}', one),
        "columns": v1.parse(b'{"inputs": {"city": ["Paris", "Lyon"]}}', one),
        "v2": v2.parse(json.dumps({"inputs": [item]}).encode(), one),
        "binary": v2.parse(head + raw, one, len(head)),
        "grpc": v2_grpc.parse(message.SerializeToString(), one),
        "csv": tabular.parse_csv(b"city\nParis\nLyon\n", one),
        "split": tabular.parse_json(b'{"dataframe_split": {"columns": ["city"], "data": [["Paris"], ["Lyon"]]}}', one),
        "records": tabular.parse_json(b'{"dataframe_records": [{"city": "Paris"}, {"city": "Lyon"}]}', one),
    }


def test_an_optional_column_may_be_left_out_in_every_form() -> None:
    declared = declarations.read(
        [
            {"name": "city", "type": "string"},
            {"name": "plan", "type": "string", "required": False},
            {"name": "age", "type": "double", "required": False},
            {"name": "active", "type": "boolean", "required": False},
            {"name": "visits", "dtype": "int64", "optional": True},
        ]
    )
    signature = Signature(inputs=declared.inputs, outputs=COLUMNS[:1])
    assert [spec.dtype for spec in signature.inputs] == ["object", "object", "float64", "boolean", "Int64"]
    for form, request in optional_forms(signature).items():
        assert request.inputs["city"].tolist() == [b"Paris", b"Lyon"], form
        assert request.inputs["plan"].tolist() == [None, None], form
        assert all(np.isnan(request.inputs[name]).tolist() == [True, True] for name in ("age", "active", "visits")), form
    with pytest.raises(InvalidInputError, match="column 'city' is missing"):
        v1.parse(b'{"inputs": {"plan": ["a"]}}', signature)
    with pytest.raises(InvalidInputError, match="lacks the column 'city'"):
        v1.parse(b'{"instances": [{"plan": "a"}]}', signature)
    with pytest.raises(InvalidInputError, match="lacks the column 'city'"):
        tabular.parse_csv(b"plan,age\na,1\n", signature, header=True)


def test_a_dictionary_without_a_key_is_answered_as_the_vectorizer_does() -> None:
    rows = [{"city": "Paris", "age": 3.0}, {"city": "Lyon", "age": 1.0}, {"age": 2.0}, {"city": "Paris"}]
    model = make_pipeline(DictVectorizer(), LogisticRegression()).fit(rows, [0, 1, 1, 0])
    served = SklearnModel(model)
    signature = Signature.model_validate(served.describe())
    assert all(spec.optional for spec in signature.inputs)
    asked = [*rows, {}]
    answer = served.predict(v1.from_document({"instances": asked}, signature).inputs, ["predict_proba"])["predict_proba"]
    assert np.array_equal(answer, model.predict_proba(asked))
    answer = served.predict(v1.from_document({"inputs": {"age": [1, 2]}}, signature).inputs, ["predict_proba"])["predict_proba"]
    assert np.array_equal(answer, model.predict_proba([{"age": 1}, {"age": 2}]))


def test_columns_are_optional_as_declared_also_when_the_model_remembers_them() -> None:
    table = pd.DataFrame({"age": [1.0, 2, np.nan, 4], "city": ["Paris", np.nan, "Lyon", "Paris"]})
    model = make_pipeline(ColumnTransformer([("n", SimpleImputer(), ["age"]), ("t", OneHotEncoder(), ["city"])]), LogisticRegression()).fit(
        table, [0, 1, 1, 0]
    )
    declared = declarations.read(
        [{"name": "age", "type": "double", "required": False}, {"name": "city", "type": "string", "required": False}]
    )
    first = Signature.model_validate(SklearnModel(model, declared.model_dump(mode="json")).describe())
    served = SklearnModel(model, first.model_dump(mode="json"))
    signature = Signature.model_validate(served.describe())
    assert signature.inputs == first.inputs
    answer = served.predict(v1.from_document({"inputs": {"age": [1, 4]}}, signature).inputs, ["predict_proba"])["predict_proba"]
    assert np.array_equal(answer, model.predict_proba(pd.DataFrame({"age": [1.0, 4], "city": np.array([np.nan, np.nan], dtype=object)})))


def test_optional_columns_of_a_model_on_numbers() -> None:
    table = pd.DataFrame({"age": [1.0, 2, np.nan, 4], "income": [5.0, np.nan, 7, 8]})
    model = make_pipeline(SimpleImputer(), LogisticRegression()).fit(table, [0, 1, 1, 0])
    declared = declarations.read([{"name": "age", "type": "double"}, {"name": "income", "type": "double", "required": False}])
    first = Signature.model_validate(SklearnModel(model, declared.model_dump(mode="json")).describe())
    served = SklearnModel(model, first.model_dump(mode="json"))
    signature = Signature.model_validate(served.describe())
    assert signature.inputs == first.inputs
    answer = served.predict(v1.from_document({"instances": [{"age": 2}]}, signature).inputs, ["predict_proba"])["predict_proba"]
    assert np.array_equal(answer, model.predict_proba(table[1:2]))
