"""Properties of the V1 and V2 codecs: what goes in comes out, and whatever comes in is understood or refused in words."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from libs.inference import v1, v2
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferRequest, InferResponse
from libs.runner.wire import NUMPY_DTYPES
from schemas.inference import Signature, TensorSpec

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NUMBERS = [name for name in NUMPY_DTYPES if name != "BYTES"]


def signature(**inputs: tuple[str, tuple[int, ...]]) -> Signature:
    specs = tuple(TensorSpec(name=name, datatype=datatype, shape=shape) for name, (datatype, shape) in inputs.items())
    return Signature(inputs=specs, outputs=(TensorSpec(name="y", datatype="FP64", shape=(-1,)),))


def tensors(datatype: str) -> st.SearchStrategy[Any]:
    """Non-empty arrays of a datatype, of one or two dimensions; floats are finite or NaN."""
    shapes = arrays.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=5)
    if datatype == "BYTES":
        return arrays.arrays(np.object_, shapes, elements=st.binary(max_size=9), fill=st.nothing())
    dtype = NUMPY_DTYPES[datatype]
    if dtype.kind != "f":
        return arrays.arrays(dtype, shapes)
    return arrays.arrays(dtype, shapes, elements=arrays.from_dtype(dtype, allow_infinity=False))


any_tensor = st.sampled_from(sorted(NUMPY_DTYPES)).flatmap(lambda name: tensors(name).map(lambda array: (name, array)))


def same(one: Any, other: Any) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tolist() == other.tolist() if one.dtype.kind == "O" else np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def free(array: Any) -> tuple[int, ...]:
    return (-1,) * array.ndim


@quick
@given(st.lists(any_tensor, min_size=1, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_outputs_written_as_v2_are_read_back_as_they_were(named: list[tuple[str, Any]], binary: list[bool]) -> None:
    outputs = {f"t{index}": array for index, (_, array) in enumerate(named)}
    request = InferRequest({}, binary_data=dict(zip(outputs, binary, strict=False)))
    body, head_length = v2.render(InferResponse(outputs), request, "m", "1")
    document = json.loads(body[:head_length])
    document["inputs"] = document.pop("outputs")
    head = orjson.dumps(document)
    tail = body[head_length:] if head_length is not None else b""
    wanted = signature(**{f"t{index}": (name, free(array)) for index, (name, array) in enumerate(named)})
    read = v2.parse(head + tail, wanted, len(head) if head_length is not None else None)
    assert all(same(read.inputs[name], array) for name, array in outputs.items())


@quick
@given(st.sampled_from(NUMBERS).flatmap(lambda name: tensors(name).map(lambda array: (name, array))))
def test_predictions_written_as_v1_are_read_back_as_they_were(named: tuple[str, Any]) -> None:
    datatype, array = named
    rows = json.loads(v1.render(InferResponse({"y": array})))["predictions"]
    for document in ({"instances": rows}, {"inputs": rows}, {"inputs": {"x": rows}}):
        read = v1.parse(orjson.dumps(document), signature(x=(datatype, free(array)))).inputs["x"]
        assert same(read, array)


@quick
@given(
    st.sampled_from(NUMBERS),
    st.lists(
        st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()), min_size=1
    ),
)
@example("INT64", [2**53 + 1, 1.0])
@example("INT64", [-1, 2**63])
@example("UINT64", [2**64 - 1, 0.0])
def test_a_number_is_exact_in_its_type_or_refused(datatype: str, values: list[Any]) -> None:
    try:
        read = v1.parse(orjson.dumps({"instances": values}), signature(x=(datatype, (-1,)))).inputs["x"].tolist()
    except InvalidInputError:
        return
    for value, got in zip(values, read, strict=True):
        if value is None:
            assert got != got
        elif NUMPY_DTYPES[datatype].kind == "f":
            with np.errstate(over="ignore"):
                assert got == np.float64(value).astype(NUMPY_DTYPES[datatype])
        else:
            assert got == value


def understood(parse: Callable[[], InferRequest]) -> InferRequest | str:
    """The request, or the sentence that refuses it; any other error is a failure."""
    try:
        return parse()
    except InvalidInputError as error:
        return error.message


words = st.sampled_from(
    [
        *("instances", "inputs", "outputs", "name", "x", "y", "shape", "datatype", "data", "parameters", "id", "b64", "features"),
        *("binary_data_size", "binary_data_output", "binary_data", "FP64", "BYTES", "BOOL", "INT64", "BF16", "", ":"),
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**64), 2**70),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=5),
    words,
)
documents = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(words, st.text(max_size=3)), inner, max_size=5))
)
v2_inputs = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["x", "z"]), "datatype": st.one_of(words, scalars), "shape": documents, "data": documents},
        optional={"parameters": documents},
    ),
    max_size=3,
)
SIGNATURES = [
    signature(x=("FP64", (-1, 2))),
    signature(x=("INT64", (-1,))),
    signature(x=("BYTES", (-1,))),
    signature(x=("BOOL", (-1, 1)), z=("FP16", (-1, -1))),
    Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),),
        outputs=(TensorSpec(name="y", datatype="FP64", shape=(-1,)),),
        feature_names=("name", "data"),
    ),
]


@settings(quick, max_examples=400)
@given(
    st.one_of(
        documents,
        st.fixed_dictionaries({"instances": documents}, optional={"outputs": documents, "parameters": documents}),
        st.fixed_dictionaries(
            {"inputs": st.one_of(documents, v2_inputs)}, optional={"outputs": documents, "parameters": documents, "id": scalars}
        ),
    ),
    st.sampled_from(SIGNATURES),
    st.binary(max_size=40),
    st.one_of(st.none(), st.integers(-5, 5)),
)
def test_any_json_is_understood_or_refused_in_words(document: Any, wanted: Signature, tail: bytes, longer: int | None) -> None:
    body = json.dumps(document).encode() + tail
    head_length = None if longer is None else len(body) - len(tail) + longer
    names = {spec.name for spec in wanted.inputs}
    for parse in (lambda: v1.parse(body, wanted), lambda: v2.parse(body, wanted, head_length)):
        read = understood(parse)
        assert 0 < len(read) < 3000 if isinstance(read, str) else set(read.inputs) == names


VALID = orjson.dumps(
    {
        "id": "1",
        "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP64", "parameters": {"binary_data_size": 16}}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
)


@settings(quick, max_examples=400)
@given(st.integers(0, len(VALID) - 1), st.binary(min_size=0, max_size=3), st.integers(0, 20))
def test_a_damaged_body_is_understood_or_refused_in_words(place: int, replacement: bytes, tail: int) -> None:
    head = VALID[:place] + replacement + VALID[place + len(replacement) :]
    assert understood(lambda: v2.parse(head + bytes(tail), SIGNATURES[0], len(head)))


@pytest.mark.parametrize(
    "shape", [[2**62, 2**62], [2**63, 2], [-1, 2], [1, -2], [1.0, 2], [True, 2], [10**30, 2], [2] * 100_000, "12", {}, None]
)
@pytest.mark.parametrize("datatype", ["FP64", "BOOL", "BYTES", "BF16"])
def test_a_shape_that_is_a_lie_is_refused(shape: Any, datatype: str) -> None:
    wanted = signature(x=("BYTES" if datatype == "BYTES" else "FP64", (-1, 2)))
    item = {"name": "x", "datatype": datatype, "shape": shape}
    for given_as, tail in (({"data": [1, 2]}, b""), ({"parameters": {"binary_data_size": 16}}, bytes(16))):
        head = json.dumps({"inputs": [{**item, **given_as}]}).encode()
        with pytest.raises(InvalidInputError) as caught:
            v2.parse(head + tail, wanted, len(head) if tail else None)
        assert len(caught.value.message) < 1000


@pytest.mark.parametrize("size", [-1, 8, 15, 17, 2**40, 2**64, 1.5, True, "16", [], {}])
def test_a_binary_size_that_does_not_add_up_is_refused(size: Any) -> None:
    head = json.dumps({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 2], "parameters": {"binary_data_size": size}}]}).encode()
    with pytest.raises(InvalidInputError):
        v2.parse(head + bytes(16), SIGNATURES[0], len(head))


@pytest.mark.parametrize("depth", [17, 200, 1000])
@pytest.mark.parametrize("datatype", ["FP64", "BYTES"])
def test_lists_nested_too_deeply_are_refused(depth: int, datatype: str) -> None:
    nest = b"[" * depth + b"1" + b"]" * depth
    wanted = signature(x=(datatype, (-1, 2)))
    item = b'{"inputs": [{"name": "x", "datatype": "%s", "shape": [1, 2], "data": %s}]}' % (datatype.encode(), nest)
    mixed = b'{"instances": [[1, 2], ' + nest + b"]}"
    for parse in (
        lambda: v1.parse(b'{"instances": %s}' % nest, wanted),
        lambda: v1.parse(mixed, wanted),
        lambda: v2.parse(item, wanted),
    ):
        with pytest.raises(InvalidInputError):
            parse()


def test_one_long_string_among_numbers_costs_its_own_length_only() -> None:
    body = orjson.dumps({"instances": ["x" * 1_000_000, *range(100_000)]})
    with pytest.raises(InvalidInputError, match="the string"):
        v1.parse(body, signature(x=("FP64", (-1,))))


def test_a_binary_string_that_ends_early_is_refused() -> None:
    for tail in (b"\x05\0\0\0ab", b"\xff\xff\xff\xff", b"\x01\0", b"\x01\0\0\0ab"):
        head = json.dumps(
            {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(tail)}}]}
        ).encode()
        with pytest.raises(InvalidInputError, match="input 'x'"):
            v2.parse(head + tail, SIGNATURES[2], len(head))
