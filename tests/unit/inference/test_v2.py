"""The V2 form (Open Inference Protocol): JSON and binary tensors, in and out."""

import json
import struct

import numpy as np
import pytest

from libs.inference import v2
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferRequest, InferResponse
from schemas.inference import Datatype, Signature, TensorSpec


def signature(datatype: str = "FP64", shape: tuple[int, ...] = (-1, 3)) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="input", datatype=Datatype(datatype), shape=shape),),
        outputs=(
            TensorSpec(name="predict", datatype=Datatype.INT64, shape=(-1,)),
            TensorSpec(name="predict_proba", datatype=Datatype.FP64, shape=(-1, 2)),
        ),
    )


def body(data: object, shape: object = (1, 3), datatype: object = "FP64", **members: object) -> bytes:
    return json.dumps({"inputs": [{"name": "input", "shape": shape, "datatype": datatype, "data": data}], **members}).encode()


def refusal(raw: bytes, given: Signature | None = None, head_length: int | None = None) -> str:
    with pytest.raises(InvalidInputError) as caught:
        v2.parse(raw, given or signature(), head_length)
    return caught.value.message


@pytest.mark.parametrize("asked", [{}, {"outputs": []}, {"outputs": None}])
def test_a_request_that_names_no_outputs_gets_all(asked: dict[str, object]) -> None:
    assert v2.parse(body([1, 2, 3], **asked), signature()).outputs == ("predict", "predict_proba")
    one = signature().model_copy(update={"outputs": signature().outputs[:1]})
    assert v2.parse(body([1, 2, 3], **asked), one).outputs is None


@pytest.mark.parametrize("data", [[1, 2, 3.5], [[1, 2, 3.5]]])
def test_data_may_be_flat_or_nested(data: object) -> None:
    assert v2.parse(body(data), signature()).inputs["input"].tolist() == [[1.0, 2.0, 3.5]]


@pytest.mark.parametrize("datatype", ["INT64", "UINT64", "INT32", "UINT8", "FP32", "BOOL", "FP16"])
def test_every_number_is_widened_to_what_the_model_takes(datatype: str) -> None:
    assert v2.parse(body([1, 0, 1], datatype=datatype), signature()).inputs["input"].tolist() == [[1.0, 0.0, 1.0]]


def test_int64_is_exact() -> None:
    values = [2**63 - 1, -(2**63), 2**53 + 1]
    assert v2.parse(body(values, datatype="INT64"), signature("INT64")).inputs["input"].tolist() == [values]


def test_id_outputs_and_parameters_are_kept() -> None:
    request = v2.parse(body([1, 2, 3], id="q1", outputs=[{"name": "predict_proba"}], parameters={"a": 1}), signature())
    assert (request.id, request.outputs, request.parameters) == ("q1", ("predict_proba",), {"a": 1})


def test_binary_tensors_follow_the_json_head() -> None:
    values = np.array([[1.5, 2.5, 3.5]])
    item = {"name": "input", "shape": [1, 3], "datatype": "FP64", "parameters": {"binary_data_size": 24}}
    head = json.dumps({"inputs": [item], "parameters": {"binary_data_output": True}}).encode()
    request = v2.parse(head + values.tobytes(), signature(), len(head))
    assert request.inputs["input"].tolist() == values.tolist()
    assert request.wants_binary("predict")


def test_binary_strings_carry_their_lengths() -> None:
    raw = b"".join(struct.pack("<I", len(element)) + element for element in (b"ab", b"", "ü".encode()))
    item = {"name": "input", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [item]}).encode()
    request = v2.parse(head + raw, signature("BYTES", (-1,)), len(head))
    assert request.inputs["input"].tolist() == [b"ab", b"", "ü".encode()]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (body([1, 2]), "input 'input': data has 2 elements, shape [1, 3] needs 3"),
        (body([1, 2], shape=[1, 2]), "input 'input' expects shape [-1, 3], got [1, 2]"),
        (body([], shape=[0, 3]), "input 'input' is empty: its shape is [0, 3]"),
        (body([1, 2, 3], shape=[1, -3]), "input 'input' needs a shape of non-negative integers"),
        (body(["a", "b", "c"], datatype="BYTES"), "input 'input' expects FP64, got BYTES"),
        (body(["1", "2", "3"]), "input 'input' expects FP64; element [0] is the string '1'"),
        (body([1, 2.5, 3], datatype="INT64"), "input 'input' expects INT64; 2.5 is not a whole number"),
        (body([[1], [2], [3]]), "input 'input': data is nested as [3, 1], its shape says [1, 3]"),
        (body([1, 2, 3], outputs=[{"name": "x"}]), "the model has no output 'x'; it has predict, predict_proba"),
        (body([1, 2, 3], id=5), "'id' must be a string"),
        (b'{"inputs": []}', "'inputs' must be a non-empty list"),
        (b'{"inputs": [{"name": "y"}, {"name": "z"}]}', "the model has no input 'y'; it has input"),
        (b'{"instances": []}', "'inputs' must be a non-empty list"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_with_the_reason(raw: bytes, message: str) -> None:
    assert refusal(raw) == message


def test_an_unknown_datatype_is_refused() -> None:
    assert refusal(body([1, 2, 3], datatype="FP65")).startswith("input 'input' has datatype 'FP65', which is not one of BOOL,")


def test_binary_sizes_must_agree_with_the_body() -> None:
    item = {"name": "input", "shape": [1, 3], "datatype": "FP64", "parameters": {"binary_data_size": 24}}
    head = json.dumps({"inputs": [item]}).encode()
    assert refusal(head + b"\0" * 8, None, len(head)) == "input 'input' announces 24 bytes; 8 are left after the JSON head"
    assert refusal(head + b"\0" * 32, None, len(head)) == "8 bytes follow the last binary tensor"
    assert refusal(head, None, len(head) + 1).startswith("the JSON head is said to have")


def binary(datatype: str, raw: bytes, shape: object = (1, 3), **parameters: object) -> tuple[bytes, int]:
    item = {"name": "input", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(raw), **parameters}}
    head = json.dumps({"inputs": [item]}).encode()
    return head + raw, len(head)


def test_null_is_nan_and_nan_is_null() -> None:
    array = v2.parse(body([1, None, 3]), signature()).inputs["input"]
    assert np.isnan(array[0, 1])
    raw, _ = v2.render(InferResponse({"predict_proba": array}), InferRequest({}), "m", "1")
    assert json.loads(raw)["outputs"][0]["data"] == [1.0, None, 3.0]


def test_fp16_travels_as_json_and_as_bytes() -> None:
    values = np.array([[0.5, -2.0, 65504.0]], np.float16)
    assert v2.parse(body(values.ravel().tolist(), datatype="FP16"), signature("FP16")).inputs["input"].tolist() == values.tolist()
    raw, head_length = binary("FP16", values.tobytes())
    assert v2.parse(raw, signature("FP16"), head_length).inputs["input"].tolist() == values.tolist()
    assert refusal(body([1, 2, 65520], datatype="FP16"), signature("FP16")).endswith("beyond the range of FP16")


@pytest.mark.parametrize("datatype", ["FP64", "FP32"])
def test_bf16_is_widened_for_a_model_of_floats(datatype: str) -> None:
    values = np.array([[1.5, -0.0078125, 3.0e38]], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    raw, head_length = binary("BF16", halves.tobytes())
    read = v2.parse(raw, signature(datatype), head_length).inputs["input"]
    assert read.tolist() == (halves.astype(np.uint32) << 16).view(np.float32).tolist()


def test_bf16_is_refused_as_json_and_for_a_model_of_integers() -> None:
    raw, head_length = binary("BF16", bytes(6))
    assert refusal(raw, signature("INT64"), head_length) == "input 'input' expects INT64, got BF16"
    assert refusal(body([1, 2, 3], datatype="BF16")) == "input 'input': BF16 has no JSON form; send it as a binary tensor, or as FP32"


def test_a_binary_bool_is_0_or_1() -> None:
    raw, head_length = binary("BOOL", b"\0\1\1")
    assert v2.parse(raw, signature("BOOL"), head_length).inputs["input"].tolist() == [[False, True, True]]
    raw, head_length = binary("BOOL", b"\0\1\2")
    assert refusal(raw, signature("BOOL"), head_length) == "input 'input' expects BOOL; a byte in it is neither 0 nor 1"


def test_binary_inputs_are_views_of_the_body() -> None:
    raw, head_length = binary("FP64", np.arange(3.0).tobytes())
    assert np.shares_memory(v2.parse(raw, signature(), head_length).inputs["input"], np.frombuffer(raw, np.uint8))


def test_json_and_binary_inputs_may_be_mixed() -> None:
    given = Signature(
        inputs=tuple(TensorSpec(name=name, datatype="INT32", shape=(-1,)) for name in ("a", "b", "c")),
        outputs=(TensorSpec(name="y", datatype="FP64", shape=(-1,)),),
    )
    inputs = [
        {"name": "c", "shape": [2], "datatype": "INT32", "parameters": {"binary_data_size": 8}},
        {"name": "a", "shape": [2], "datatype": "INT32", "data": [1, 2]},
        {"name": "b", "shape": [2], "datatype": "INT32", "parameters": {"binary_data_size": 8}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    read = v2.parse(head + struct.pack("<4i", 5, 6, 3, 4), given, len(head)).inputs
    assert {name: array.tolist() for name, array in read.items()} == {"a": [1, 2], "b": [3, 4], "c": [5, 6]}


def test_data_and_a_binary_size_together_are_refused() -> None:
    item = {"name": "input", "shape": [1, 3], "datatype": "FP64", "data": [1, 2, 3], "parameters": {"binary_data_size": 24}}
    head = json.dumps({"inputs": [item]}).encode()
    assert refusal(head + bytes(24), None, len(head)) == "input 'input' has both 'data' and a binary_data_size"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"parameters": {"binary_data_output": "yes"}}, "the parameter 'binary_data_output' must be true or false, got the string 'yes'"),
        ({"parameters": []}, "'parameters' must be a JSON object"),
        ({"outputs": {}}, "'outputs' must be a list of objects with a name"),
        ({"outputs": [{"name": "predict", "parameters": {"binary_data": 1}}]}, "the parameter 'binary_data' must be true or false, got 1"),
    ],
)
def test_parameters_of_the_protocol_are_checked(members: dict[str, object], message: str) -> None:
    assert refusal(body([1, 2, 3], **members)) == message


def test_the_requests_id_stands_in_for_one_that_was_not_given() -> None:
    response = InferResponse({"predict": np.array([7])})
    for given, shown in (("q1", "q1"), (None, "r9"), ("", "r9")):
        raw, _ = v2.render(response, InferRequest({}, id=given), "m", "1", "r9")
        assert json.loads(raw)["id"] == shown


def test_the_answer_is_flat_json_with_the_id_echoed() -> None:
    response = InferResponse({"predict_proba": np.array([[0.1 + 0.2, 0.7], [1 / 3, 2 / 3]])})
    raw, head_length = v2.render(response, InferRequest({}, id="q1"), "cancer", "3")
    assert head_length is None
    assert json.loads(raw) == {
        "model_name": "cancer",
        "model_version": "3",
        "id": "q1",
        "outputs": [{"name": "predict_proba", "datatype": "FP64", "shape": [2, 2], "data": [0.1 + 0.2, 0.7, 1 / 3, 2 / 3]}],
    }


def test_outputs_asked_for_as_binary_follow_the_head() -> None:
    response = InferResponse({"predict": np.array([7, 8]), "predict_proba": np.array([[0.5, 0.5], [0.25, 0.75]])})
    request = InferRequest({}, binary_data_output=True, binary_data={"predict": False})
    raw, head_length = v2.render(response, request, "m", "1")
    assert head_length is not None
    label, scores = json.loads(raw[:head_length])["outputs"]
    assert label["data"] == [7, 8]
    assert scores["parameters"] == {"binary_data_size": 32}
    assert np.frombuffer(raw[head_length:]).tolist() == [0.5, 0.5, 0.25, 0.75]


NAMED = signature().model_copy(update={"feature_names": ("a", "b", "c")})


@pytest.mark.parametrize("shape", [[2], [2, 1]])
@pytest.mark.parametrize("datatype", ["FP64", "INT32"])
def test_a_matrix_may_come_column_by_column(shape: list[int], datatype: str) -> None:
    tensors = [
        {"name": name, "shape": shape, "datatype": datatype, "data": [start, start + 3]} for name, start in (("c", 3), ("a", 1), ("b", 2))
    ]
    request = v2.parse(json.dumps({"inputs": tensors}).encode(), NAMED)
    assert request.inputs["input"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_columns_that_are_missing_or_of_different_lengths_are_refused_by_name() -> None:
    def column(name: str, *values: float) -> dict[str, object]:
        return {"name": name, "shape": [len(values)], "datatype": "FP64", "data": list(values)}

    for columns, message in (
        ([column("a", 1), column("b", 1)], "column 'c' is missing"),
        ([column("a", 1), column("b", 1), column("c", 1, 2)], "column 'c' has 2 values, column 'a' has 1"),
        ([column("a", 1), column("b", 1), column("c", 1), column("d", 1)], "the model has no column 'd'; it has a, b, c"),
    ):
        with pytest.raises(InvalidInputError) as raised:
            v2.parse(json.dumps({"inputs": columns}).encode(), NAMED)
        assert raised.value.message == message


def test_the_only_input_is_taken_under_any_name() -> None:
    raw = body([1, 2, 3]).replace(b'"input"', b'"input-0"')
    assert v2.parse(raw, signature()).inputs["input"].tolist() == [[1, 2, 3]]


def test_a_column_may_have_the_name_of_the_matrix() -> None:
    named = signature().model_copy(update={"feature_names": ("a", "input", "c")})
    tensors = [{"name": name, "shape": [1], "datatype": "FP64", "data": [value]} for name, value in (("a", 1), ("input", 2), ("c", 3))]
    assert v2.parse(json.dumps({"inputs": tensors}).encode(), named).inputs["input"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("age", "FP64", [1]), ("zip", "FP64", [1])], "the model has no column 'zip'; it has age, city"),
        ([("age", "FP64", [1])], "column 'city' is missing"),
        ([("age", "FP64", [1]), ("age", "FP64", [1])], "column 'age' is given twice"),
        ([("age", "BYTES", ["old"])], "column 'age' expects FP64, got BYTES"),
        ([("age", "FP7", [1])], "column 'age' has datatype 'FP7', which is not one of"),
        ([("city", "BYTES", [7])], "column 'city' expects strings (BYTES); element [0] is 7"),
    ],
)
def test_what_does_not_fit_a_table_is_told_of_its_columns(tensors: list[tuple[str, str, list[object]]], message: str) -> None:
    age = TensorSpec(name="age", datatype=Datatype.FP64, shape=(-1,), dtype="float64")
    city = TensorSpec(name="city", datatype=Datatype.BYTES, shape=(-1,), dtype="object")
    inputs = [{"name": name, "datatype": datatype, "shape": [len(data)], "data": data} for name, datatype, data in tensors]
    said = refusal(json.dumps({"inputs": inputs}).encode(), Signature(inputs=(age, city), outputs=(age,)))
    assert said.startswith(message)
