"""Missing values of tables, from the body of a request through the runner's process to the model: the answer is that to NaN."""

import json
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from libs.inference import tabular, v1, v2, v2_grpc
from libs.inference.batches import join
from libs.inference.errors import InvalidInputError
from libs.inference.oip_proto.open_inference_pb2 import ModelInferRequest
from libs.inference.requests import InferRequest, InferResponse
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
    with pytest.raises(InvalidInputError, match="input 'city' ends inside element 0"):
        v2.parse(head + WIRE_MISSING, single, len(head))
    tensor = ModelInferRequest.InferInputTensor(name="city", datatype="BYTES", shape=[1])
    message = ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[WIRE_MISSING])
    with pytest.raises(InvalidInputError, match="input 'city' ends inside element 0"):
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
