"""Requests and answers of the Open Inference Protocol as protobuf."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from libs.inference import v2_grpc
from libs.inference.errors import InvalidInputError
from libs.inference.oip_proto.open_inference_pb2 import InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse
from libs.inference.requests import InferRequest, InferResponse
from libs.runner.wire import NUMPY_DTYPES
from schemas.inference import Signature, TensorSpec

DATATYPES = tuple(NUMPY_DTYPES)
EXTREMES = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "UINT16": [0, 65_535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [2**53 + 1, 2**64 - 1],
    "INT8": [-128, 127],
    "INT16": [-(2**15), 2**15 - 1],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**53 + 1],
    "FP16": [-65_504, 2.0**-24],
    "FP32": [3.4e38, float("nan")],
    "FP64": [float("-inf"), 5e-324],
    "BYTES": [b"\xff\x00", b""],
}


def signature(datatype: str = "FP32", shape: tuple[int, ...] = (-1, 2)) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="x", datatype=datatype, shape=shape),),
        outputs=(TensorSpec(name="y", datatype=datatype, shape=(-1,)), TensorSpec(name="z", datatype="FP64", shape=(-1, 2))),
    )


def array(values: list, datatype: str) -> np.ndarray:
    made = np.empty(len(values), NUMPY_DTYPES[datatype])
    made[:] = values
    return made


def message(**changes: object) -> ModelInferRequest:
    tensor = ModelInferRequest.InferInputTensor(
        name="x", datatype="FP32", shape=[1, 2], contents=InferTensorContents(fp32_contents=[1.5, 2.5])
    )
    return ModelInferRequest(**{"model_name": "m", "inputs": [tensor], **changes})


def parsed(request: ModelInferRequest, spec: Signature | None = None) -> InferRequest:
    return v2_grpc.parse(request.SerializeToString(), spec or signature())


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_passes_exactly_in_both_directions(datatype, raw):
    values = array(EXTREMES[datatype], datatype).reshape(1, 2)
    body = v2_grpc.write_request(InferRequest({"x": values}, binary_data_output=raw), "m")
    request = v2_grpc.parse(body, signature(datatype))
    assert request.inputs["x"].dtype == values.dtype
    assert request.inputs["x"].tobytes() == values.tobytes() or datatype == "BYTES"
    assert np.array_equal(request.inputs["x"], values, equal_nan=datatype.startswith("FP"))
    answer = v2_grpc.read_response(v2_grpc.render(InferResponse({"y": values}), request, "m", "1"))
    assert np.array_equal(answer.outputs["y"], values, equal_nan=datatype.startswith("FP"))


@pytest.mark.parametrize("datatype", DATATYPES)
def test_an_answer_has_the_form_of_its_request_and_half_floats_are_raw_always(datatype):
    values = array(EXTREMES[datatype], datatype)
    for raw in (True, False):
        request = InferRequest({}, binary_data_output=raw)
        answer = ModelInferResponse.FromString(v2_grpc.render(InferResponse({"y": values, "z": np.zeros(2)}), request, "m", "1"))
        is_raw = raw or datatype == "FP16"
        assert len(answer.raw_output_contents) == (2 if is_raw else 0)
        assert [tensor.HasField("contents") for tensor in answer.outputs] == [not is_raw] * 2


@given(st.data())
def test_random_arrays_survive_the_way_there_and_back(data):
    datatype = data.draw(st.sampled_from([name for name in DATATYPES if name != "BYTES"]))
    values = data.draw(arrays.arrays(NUMPY_DTYPES[datatype], arrays.array_shapes(max_dims=4, max_side=5)))
    raw = data.draw(st.booleans())
    body = v2_grpc.write_request(InferRequest({"x": values}, binary_data_output=raw), "m")
    back = v2_grpc.parse(body, signature(datatype, (-1,) * values.ndim)).inputs["x"]
    assert np.array_equal(back, values, equal_nan=datatype.startswith("FP"))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(body):
    with contextlib.suppress(InvalidInputError):
        v2_grpc.parse(body, signature())


def test_id_outputs_and_parameters_are_kept():
    wanted = [ModelInferRequest.InferRequestedOutputTensor(name=name) for name in ("z", "y", "z")]
    parameters = {"a": InferParameter(bool_param=True), "b": InferParameter(uint64_param=2**63), "c": InferParameter()}
    request = parsed(message(id="7", outputs=wanted, parameters=parameters))
    assert (request.id, request.outputs, request.binary_data_output) == ("7", ("z", "y"), False)
    assert request.parameters == {"a": True, "b": 2**63, "c": None}
    assert parsed(message()).outputs == ("y", "z")


def test_an_answer_has_the_requests_id_or_the_one_it_was_given():
    for request, expected in ((InferRequest({}, id="mine"), "mine"), (InferRequest({}), "made")):
        body = v2_grpc.render(InferResponse({"y": np.zeros(1)}), request, "m", "4", "made")
        answer = ModelInferResponse.FromString(body)
        assert (answer.model_name, answer.model_version, answer.id) == ("m", "4", expected)


def test_numbers_of_another_datatype_are_taken_where_they_are_exact():
    tensor = ModelInferRequest.InferInputTensor(
        name="x", datatype="INT32", shape=[1, 2], contents=InferTensorContents(int_contents=[-1, 7])
    )
    assert parsed(message(inputs=[tensor])).inputs["x"].tolist() == [[-1.0, 7.0]]
    assert parsed(message(inputs=[tensor]), signature("INT8")).inputs["x"].dtype == np.int8
    with pytest.raises(InvalidInputError, match="has -1, which is beyond the range of UINT8"):
        parsed(message(inputs=[tensor]), signature("UINT8"))


def tensor(**changes: object) -> ModelInferRequest.InferInputTensor:
    return ModelInferRequest.InferInputTensor(**{"name": "x", "datatype": "FP32", "shape": [1, 2], **changes})


TYPED = InferTensorContents(fp32_contents=[1, 2])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_name": ""}, "the request has no model_name"),
        ({"inputs": []}, "the request has no inputs"),
        ({"inputs": [tensor()]}, "input 'x': fp32_contents has 0 elements, shape [1, 2] needs 2"),
        (
            {"inputs": [tensor(name="q\n", contents=TYPED), tensor(name="r", contents=TYPED)]},
            "the model has no input 'q\N{REPLACEMENT CHARACTER}'; it has x",
        ),
        ({"inputs": [tensor(contents=TYPED)] * 2}, "input 'x' is given twice"),
        ({"inputs": [tensor(datatype="FP8", contents=TYPED)]}, "input 'x' has datatype 'FP8', which is not one of BOOL"),
        ({"inputs": [tensor(datatype="BYTES", contents=TYPED)]}, "input 'x' expects FP32, got BYTES"),
        ({"inputs": [tensor(datatype="FP16", contents=TYPED)]}, "input 'x' is FP16, which has no typed contents"),
        ({"inputs": [tensor(datatype="FP64", contents=TYPED)]}, "input 'x': fp64_contents has 0 elements"),
        ({"inputs": [tensor(shape=[2, -1], contents=TYPED)]}, "input 'x' needs a shape of non-negative integers"),
        (
            {"inputs": [tensor(shape=[1] * 17, contents=TYPED)]},
            "input 'x' expects shape [-1, 2], got [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, …] of 17 dimensions",
        ),
        ({"inputs": [tensor(shape=[2**62, 2], contents=TYPED)]}, "input 'x': fp32_contents has 2 elements"),
        ({"inputs": [tensor(shape=[2], contents=TYPED)]}, "input 'x' expects shape [-1, 2], got [2]"),
        ({"inputs": [tensor(shape=[0, 2])]}, "input 'x' is empty: its shape is [0, 2]"),
        ({"inputs": [tensor()], "raw_input_contents": [b"1234567"]}, "input 'x' has 7 bytes; FP32 of shape [1, 2] takes 8"),
        ({"inputs": [tensor()], "raw_input_contents": [b"", b""]}, "the request has 1 inputs and 2 raw_input_contents"),
        ({"inputs": [tensor(shape=[0, 2])], "raw_input_contents": [b""]}, "input 'x' is empty"),
        (
            {"inputs": [tensor(datatype="BOOL")], "raw_input_contents": [b"\x00\x02"]},
            "input 'x' expects BOOL; a byte in it is neither 0 nor 1",
        ),
        ({"inputs": [tensor(contents=TYPED)], "raw_input_contents": [bytes(8)]}, "input 'x' has contents although the request has raw"),
        ({"outputs": [ModelInferRequest.InferRequestedOutputTensor(name="q")]}, "the model has no output 'q'; it has y, z"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(changes, sentence):
    with pytest.raises(InvalidInputError) as raised:
        parsed(message(**changes))
    assert sentence in raised.value.message


def test_a_missing_input_is_named():
    two = Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)), TensorSpec(name="w", datatype="FP32", shape=(-1,))),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1,)),),
    )
    with pytest.raises(InvalidInputError, match="input 'w' is missing"):
        parsed(message(), two)


@pytest.mark.parametrize("raw", [b"\x02\x00\x00\x00ab", b"\x09\x00\x00\x00ab", b"\x00\x00", b"\x00\x00\x00\x00" * 3])
def test_raw_strings_that_do_not_add_up_are_refused(raw):
    request = message(inputs=[tensor(datatype="BYTES")], raw_input_contents=[raw])
    with pytest.raises(InvalidInputError, match="input 'x'"):
        parsed(request, signature("BYTES"))


def test_brain_floats_are_widened():
    request = message(inputs=[tensor(datatype="BF16")], raw_input_contents=[b"\x80\x3f\x00\xc0"])
    assert parsed(request).inputs["x"].tolist() == [[1.0, -2.0]]
    with pytest.raises(InvalidInputError, match="expects INT64, got BF16"):
        parsed(request, signature("INT64"))


@pytest.mark.parametrize("field", [b"\x2a\x00", b"\x32\x00", b"\x22\x00", b"\x3a\x00", b"\x0d\x00\x00\x00\x00"])
def test_a_large_request_of_tiny_fields_is_refused_before_it_becomes_objects(field):
    with pytest.raises(InvalidInputError, match="more than 100000 fields"):
        v2_grpc.read(field * 200_000)
    body = tensor(contents=InferTensorContents(bytes_contents=[b""] * 200_000)).SerializeToString()
    nested = ModelInferRequest(model_name="m", inputs=[ModelInferRequest.InferInputTensor.FromString(body)]).SerializeToString()
    with pytest.raises(InvalidInputError, match="more than 100000 fields"):
        v2_grpc.read(nested)


def test_a_large_request_is_read_and_large_nonsense_refused():
    values = np.zeros((100_000, 2), np.float32)
    for raw in (True, False):
        body = v2_grpc.write_request(InferRequest({"x": values}, binary_data_output=raw), "m")
        assert v2_grpc.parse(body, signature()).inputs["x"].shape == (100_000, 2)
        with pytest.raises(InvalidInputError, match="not a serialised"):
            v2_grpc.read(body[:-1])
        with pytest.raises(InvalidInputError, match="not a serialised"):
            v2_grpc.read(b"\xff" * 300_000)


def test_numbers_that_were_not_packed_are_read_as_well():
    contents = b"\x35" + np.float32(1.5).tobytes() + b"\x35" + np.float32(2.5).tobytes()
    body = message(inputs=[tensor()]).SerializeToString()
    inner = tensor().SerializeToString() + b"\x2a" + bytes([len(contents)]) + contents
    body = ModelInferRequest(model_name="m").SerializeToString() + b"\x2a" + bytes([len(inner)]) + inner
    assert v2_grpc.parse(body, signature()).inputs["x"].tolist() == [[1.5, 2.5]]
