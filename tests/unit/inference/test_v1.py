"""The V1 form: what is taken, what is refused and with which words, and what goes back."""

import json
import math

import numpy as np
import pytest

from libs.inference import v1
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferResponse
from schemas.inference import Datatype, Signature, TensorSpec


def spec(name: str = "input", datatype: str = "FP64", shape: tuple[int, ...] = (-1, 3)) -> TensorSpec:
    return TensorSpec(name=name, datatype=Datatype(datatype), shape=shape)


def signature(*inputs: TensorSpec, feature_names: tuple[str, ...] | None = None) -> Signature:
    outputs = (spec("predict", "INT64", (-1,)), spec("predict_proba", shape=(-1, 2)))
    return Signature(inputs=inputs or (spec(),), outputs=outputs, feature_names=feature_names)


def parse(document: object, given: Signature | None = None) -> dict[str, np.ndarray]:
    return v1.parse(json.dumps(document).encode(), given or signature()).inputs


def refusal(document: object, given: Signature | None = None) -> str:
    with pytest.raises(InvalidInputError) as caught:
        parse(document, given)
    return caught.value.message


def test_rows_become_one_array_of_the_signatures_type() -> None:
    array = parse({"instances": [[1, 2.5, 3], [4, 5, 6]]})["input"]
    assert array.dtype == np.float64
    assert array.tolist() == [[1.0, 2.5, 3.0], [4.0, 5.0, 6.0]]


def test_null_is_a_missing_number() -> None:
    array = parse({"instances": [[1, None, 3]]})["input"]
    assert math.isnan(array[0, 1])


def test_float64_survives_exactly() -> None:
    value = 0.1 + 0.2
    assert parse({"instances": [[value, 5e-324, 1.7976931348623157e308]]})["input"].tolist() == [[value, 5e-324, 1.7976931348623157e308]]


def test_objects_are_put_into_the_order_of_the_features() -> None:
    given = signature(feature_names=("a", "b", "c"))
    assert parse({"instances": [{"c": 3, "a": 1, "b": 2}]}, given)["input"].tolist() == [[1.0, 2.0, 3.0]]


def test_objects_by_input_name_feed_a_model_of_several_inputs() -> None:
    given = signature(spec("age", "INT64", (-1, 1)), spec("name", "BYTES", (-1,)))
    inputs = parse({"instances": [{"age": 41, "name": "ada"}, {"age": 7.0, "name": "bob"}]}, given)
    assert inputs["age"].tolist() == [[41], [7]]
    assert inputs["name"].tolist() == [b"ada", b"bob"]


def test_strings_and_base64_are_bytes() -> None:
    given = signature(spec(datatype="BYTES", shape=(-1,)))
    assert parse({"instances": ["grün", {"b64": "AP8="}]}, given)["input"].tolist() == ["grün".encode(), b"\x00\xff"]


def test_whole_tensors_are_taken_as_inputs() -> None:
    assert parse({"inputs": {"input": [[1, 2, 3]]}})["input"].shape == (1, 3)
    assert parse({"inputs": [[1, 2, 3]]})["input"].shape == (1, 3)


def test_whole_floats_become_integers() -> None:
    given = signature(spec(datatype="INT64", shape=(-1, 2)))
    assert parse({"instances": [[1.0, 9007199254740993]]}, given)["input"].tolist() == [[1, 9007199254740993]]


def test_outputs_may_be_asked_for_by_name() -> None:
    request = v1.parse(b'{"instances": [[1,2,3]], "outputs": ["predict_proba"]}', signature())
    assert request.outputs == ("predict_proba",)
    request = v1.parse(b'{"instances": [[1,2,3]], "parameters": {"outputs": ["predict"]}}', signature())
    assert request.outputs == ("predict",)


TARGETS = Signature(
    inputs=(spec(),),
    outputs=(spec("predict", "INT64", (-1, 2)), spec("predict_proba_0", shape=(-1, 2)), spec("predict_proba_1", shape=(-1, 3))),
)


def test_a_name_may_stand_for_the_outputs_of_all_targets() -> None:
    request = v1.parse(b'{"instances": [[1,2,3]], "outputs": ["predict_proba"]}', TARGETS)
    assert request.outputs == ("predict_proba_0", "predict_proba_1")
    assert request.groups == (("predict_proba", ("predict_proba_0", "predict_proba_1")),)
    single = v1.parse(b'{"instances": [[1,2,3]], "outputs": ["predict_proba_1"]}', TARGETS)
    assert (single.outputs, single.groups) == (("predict_proba_1",), ())
    known = "the model has no output 'proba'; it has predict, predict_proba_0, predict_proba_1"
    assert refusal({"instances": [[1, 2, 3]], "outputs": ["proba"]}, TARGETS) == known


def test_targets_of_text_and_of_missing_values_stand_beside_each_other() -> None:
    groups = (("label", ("label_0", "label_1")),)
    texts = np.array([b"a", "ü".encode()], dtype=object)
    answer = json.loads(v1.render(InferResponse({"label_0": texts, "label_1": np.array([1.5, np.nan])}), groups))
    assert answer == {"predictions": [["a", 1.5], ["ü", None]]}
    alone = json.loads(v1.render(InferResponse({"label_0": texts}), (("label", ("label_0",)),)))
    assert alone == {"predictions": [["a"], ["ü"]]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"instances": [[1, 2, 3], [1, 2]]}, "input 'input' expects rows of 3 numbers; instances[1] has 2"),
        ({"instances": [[1, 2]]}, "input 'input' expects rows of 3 numbers; instances[0] has 2"),
        ({"instances": [1, 2, 3]}, "input 'input' expects rows of 3 numbers; instances[0] is 1"),
        ({"instances": [[1, 2, "3"]]}, "input 'input' expects FP64; element [0][2] is the string '3'"),
        ({"instances": [[1, 2, {"a": 1}]]}, "input 'input' expects FP64; element [0][2] is an object"),
        ({"instances": [[1, [2], 3]]}, "input 'input' expects rows of 3 numbers; instances[0] has parts of different lengths"),
        ({"instances": []}, "'instances' must be a non-empty list"),
        ({"instances": [[]]}, "input 'input' expects rows of 3 numbers; instances[0] has 0"),
        ({"instances": None}, "'instances' must be a non-empty list"),
        ({}, "the request needs exactly one of 'instances' and 'inputs'"),
        ({"instances": [[1, 2, 3]], "inputs": []}, "the request needs exactly one of 'instances' and 'inputs'"),
        ({"instances": [[1, 2, 3]], "outputs": ["nope"]}, "the model has no output 'nope'; it has predict, predict_proba"),
        ({"inputs": {"x": [[1, 2, 3]]}}, "the model has no input 'x'; it has input"),
        ({"inputs": [{"name": "input", "datatype": "FP64"}]}, "'inputs' is in the V2 form; send it to the model's /v2 route"),
        ([1], "the request body must be a JSON object"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_with_the_reason(document: object, message: str) -> None:
    assert refusal(document) == message


AGE = TensorSpec(name="age", datatype=Datatype.FP64, shape=(-1,), dtype="float64")
CITY = TensorSpec(name="city", datatype=Datatype.BYTES, shape=(-1,), dtype="object")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"instances": [{"age": "old", "city": "Lyon"}]}, "column 'age' expects FP64; element [0] is the string 'old'"),
        ({"instances": [{"age": 1, "city": 2}]}, "column 'city' expects strings (BYTES); element [0] is 2"),
        ({"instances": [{"age": [1], "city": "Lyon"}]}, "column 'age' expects one number per row; instances[0] is a list of 1"),
        ({"instances": [{"age": 1}]}, "instances[0] lacks the column 'city'"),
        ({"instances": [{"age": 1, "city": "Lyon", "zip": "0"}]}, "instances[0] has the column 'zip', which the model does not know"),
        ({"instances": [[1]]}, "each instance must be an object or a list with the columns age, city; instances[0] has 1 values"),
        ({"inputs": {"age": [1]}}, "column 'city' is missing"),
        ({"inputs": {"age": 1, "city": ["Lyon"]}}, "column 'age' must be a list, got 1"),
        ({"inputs": {"age": [1], "city": ["Lyon"], "zip": [1]}}, "the model has no column 'zip'; it has age, city"),
        ({"inputs": [1]}, "'inputs' must be an object with the columns age, city"),
    ],
)
def test_what_does_not_fit_a_table_is_told_of_its_columns(document: object, message: str) -> None:
    assert refusal(document, signature(AGE, CITY)) == message


def test_a_body_that_is_not_json_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="not valid JSON"):
        v1.parse(b"{instances", signature())


def test_objects_must_have_every_feature_and_no_other() -> None:
    given = signature(feature_names=("a", "b", "c"))
    assert refusal({"instances": [{"a": 1, "b": 2, "c": 3}, {"a": 1}]}, given) == "instances[1] lacks the column 'b' and 1 more"
    assert (
        refusal({"instances": [{"a": 1, "b": 2, "c": 3, "d": 4}]}, given)
        == "instances[0] has the column 'd', which the model does not know"
    )
    assert refusal({"instances": [{"a": 1, "b": 2, "c": 3}, [1]]}, given).startswith("instances[0] is an object, so instances[1]")


@pytest.mark.parametrize(
    ("datatype", "value", "message"),
    [
        ("INT64", 1.5, "input 'input' expects INT64; 1.5 is not a whole number"),
        ("INT64", None, "input 'input' expects INT64; element [0][0] is null"),
        ("UINT8", 256, "input 'input' has 256, which is beyond the range of UINT8"),
        ("INT8", -129, "input 'input' has -129, which is beyond the range of INT8"),
        ("INT64", 2**63, "input 'input' has 9223372036854775808, which is beyond the range of INT64"),
        ("FP32", 1e39, "input 'input' has 1e+39, which is beyond the range of FP32"),
        ("BOOL", 2, "input 'input' expects BOOL; 2 is neither true nor false"),
        ("BYTES", 2, "input 'input' expects strings (BYTES); element [0][0] is 2"),
    ],
)
def test_values_the_type_cannot_hold_are_refused(datatype: str, value: object, message: str) -> None:
    assert refusal({"instances": [[value]]}, signature(spec(datatype=datatype, shape=(-1, 1)))) == message


def test_integers_of_64_bits_are_exact() -> None:
    given = signature(spec(datatype="UINT64", shape=(-1, 2)))
    assert parse({"instances": [[2**64 - 1, 2**53 + 1]]}, given)["input"].tolist() == [[2**64 - 1, 2**53 + 1]]


def test_columns_by_input_name_and_by_feature_name() -> None:
    given = signature(feature_names=("a", "b", "c"))
    for columns in ({"a": [1, 4], "c": [3, 6], "b": [2, 5]}, {"input": [[1, 2, 3], [4, 5, 6]]}, [[1, 2, 3], [4, 5, 6]]):
        assert parse({"inputs": columns}, given)["input"].tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1], "b": [2]}, "'inputs' lacks the column 'c'"),
        ({"a": [1], "b": [2], "c": [3], "d": [4]}, "'inputs' has the column 'd', which the model does not know"),
        ({"a": [1], "b": [2], "c": 3}, "column 'c' of 'inputs' must be a list, got 3"),
        ({"a": [1], "b": [2], "c": [3, 4]}, "column 'c' of 'inputs' has 2 values, the columns before it have 1"),
        ({"a": [], "b": [], "c": []}, "the columns of 'inputs' are empty"),
        ({"a": [1], "b": [2], "c": ["3"]}, "input 'input' expects FP64; element [0][2] is the string '3'"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: object, message: str) -> None:
    assert refusal({"inputs": columns}, signature(feature_names=("a", "b", "c"))) == message


def test_lists_feed_a_model_of_several_inputs_in_their_order() -> None:
    given = signature(spec("age", "INT64", (-1, 1)), spec("name", "BYTES", (-1,)))
    inputs = parse({"instances": [[41, "ada"], [7.0, "bob"]]}, given)
    assert (inputs["age"].tolist(), inputs["name"].tolist()) == ([[41], [7]], [b"ada", b"bob"])
    assert refusal({"instances": [[41, "ada"], [7]]}, given) == (
        "each instance must be an object or a list with the inputs age, name; instances[1] has 1 values"
    )


def test_b64_objects_are_bytes() -> None:
    given = signature(spec(datatype="BYTES", shape=(-1,)))
    assert parse({"instances": [{"b64": "/wA="}, "text", {"b64": ""}]}, given)["input"].tolist() == [b"\xff\0", b"text", b""]
    assert refusal({"instances": [{"b64": "§"}]}, given) == "input 'input': element [0] is not base64"


def test_a_feature_may_be_called_b64() -> None:
    given = signature(spec(shape=(-1, 1)), feature_names=("b64",))
    assert parse({"instances": [{"b64": 3}]}, given)["input"].tolist() == [[3.0]]


def test_whole_floats_fit_integers() -> None:
    given = signature(spec(datatype="INT64", shape=(-1, 2)))
    assert parse({"instances": [[1.0, 2.0**62], [-3, True]]}, given)["input"].tolist() == [[1, 2**62], [-3, 1]]


def test_one_output_is_rendered_as_rows() -> None:
    values = np.array([[0.1 + 0.2, 1e-300], [2 / 3, -0.0]])
    body = v1.render(InferResponse({"predict_proba": values}))
    assert json.loads(body) == {"predictions": values.tolist()}


def test_several_outputs_are_rendered_as_objects() -> None:
    response = InferResponse({"label": np.array([b"a", b"b"], dtype=object), "score": np.array([0.25, 0.5])})
    assert json.loads(v1.render(response)) == {"predictions": [{"label": "a", "score": 0.25}, {"label": "b", "score": 0.5}]}


def test_a_float32_is_rendered_as_the_float64_it_equals() -> None:
    value = np.float32(0.1)
    assert json.loads(v1.render(InferResponse({"score": np.array([value])})))["predictions"] == [float(value)]


def test_what_json_cannot_carry_is_null_and_bytes_that_are_no_text_are_base64() -> None:
    assert json.loads(v1.render(InferResponse({"a": np.array([np.nan, np.inf])}))) == {"predictions": [None, None]}
    assert json.loads(v1.render(InferResponse({"a": np.array([b"\xff"], dtype=object)}))) == {"predictions": [{"b64": "/w=="}]}
