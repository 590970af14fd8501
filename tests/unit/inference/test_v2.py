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
        (b'{"inputs": [{"name": "y"}]}', "the model has no input 'y'; it has input"),
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
