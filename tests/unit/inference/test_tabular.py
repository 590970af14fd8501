"""Tables: CSV, NumPy arrays and data frames become the model's inputs, or a sentence that says why not."""

import csv
import io
import json
import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from libs.errors import PayloadTooLargeError
from libs.inference import tabular
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferRequest, InferResponse
from schemas.inference import Signature, TensorSpec

OUTPUT = TensorSpec(name="predict", datatype="FP64", shape=(-1,))


def matrix(datatype: str = "FP64", width: int = 3, names: tuple[str, ...] | None = ("a", "b", "c")) -> Signature:
    return Signature(inputs=(TensorSpec(name="input", datatype=datatype, shape=(-1, width)),), outputs=(OUTPUT,), feature_names=names)


NAMED = matrix()
UNNAMED = matrix(names=None)
TEXT = Signature(inputs=(TensorSpec(name="input", datatype="BYTES", shape=(-1,)),), outputs=(OUTPUT,))
MIXED = Signature(
    inputs=(
        TensorSpec(name="age", datatype="INT64", shape=(-1, 1)),
        TensorSpec(name="name", datatype="BYTES", shape=(-1,)),
        TensorSpec(name="height", datatype="FP32", shape=(-1, 1)),
        TensorSpec(name="member", datatype="BOOL", shape=(-1,)),
    ),
    outputs=(OUTPUT,),
)


def rows(request: InferRequest) -> list:
    (array,) = request.inputs.values()
    return array.tolist()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def frame(**content: object) -> bytes:
    return json.dumps({"dataframe_split": content}).encode()


def test_a_csv_without_a_header_is_rows_in_order():
    assert rows(tabular.parse_csv(b"1,2,3\r\n4.5,-1e3,.5\r\n", NAMED)) == [[1, 2, 3], [4.5, -1000, 0.5]]


def test_a_header_puts_columns_into_the_order_of_the_features():
    assert rows(tabular.parse_csv(b"c, a,b\n3,1,2\n", NAMED)) == [[1, 2, 3]]
    assert rows(tabular.parse_csv(b"\xef\xbb\xbfc,a,b\n3,1,2\n\n", NAMED)) == [[1, 2, 3]]


def test_a_model_without_feature_names_takes_columns_as_they_come():
    assert rows(tabular.parse_csv(b"z,x,y\n3,1,2\n", UNNAMED)) == [[3, 1, 2]]


def test_the_parameter_header_decides_what_the_first_row_is():
    assert rows(tabular.parse_csv(b"0,1,2\n3,1,2\n", NAMED, header=True)) == [[3, 1, 2]]
    assert rows(tabular.parse_csv(b"0,1,2\n3,1,2\n", NAMED)) == [[0, 1, 2], [3, 1, 2]]
    with pytest.raises(InvalidInputError, match="row 1, column 1 is 'a'"):
        tabular.parse_csv(b"a,b,c\n1,2,3\n", NAMED, header=False)


def test_a_header_of_numbers_is_one_when_the_features_are_called_so():
    numbered = matrix(names=("0", "1", "2"))
    assert rows(tabular.parse_csv(b"2,0,1\n30,10,20\n", numbered)) == [[10, 20, 30]]


def test_text_models_take_the_first_row_as_data_unless_it_is_the_inputs_name_or_they_are_told():
    assert rows(tabular.parse_csv(b'good film\n"bad, long ""film"""\n', TEXT)) == [b"good film", b'bad, long "film"']
    assert rows(tabular.parse_csv(b"input\ngood film\n", TEXT)) == [b"good film"]
    assert rows(tabular.parse_csv(b"review\ngood film\n", TEXT, header=True)) == [b"good film"]


def test_columns_feed_the_inputs_of_their_names():
    inputs = tabular.parse_csv(b"name,member,height,age\nAda,true,1.5,36\nBob,0,,41.0\n", MIXED).inputs
    assert inputs["age"].tolist() == [[36], [41]]
    assert inputs["name"].tolist() == [b"Ada", b"Bob"]
    assert inputs["member"].tolist() == [True, False]
    assert inputs["height"].dtype == np.float32
    assert np.array_equal(inputs["height"], [[1.5], [math.nan]], equal_nan=True)


def test_a_missing_cell_is_nan_for_floats_and_refused_for_integers():
    assert math.isnan(rows(tabular.parse_csv(b"1,,3\n", NAMED))[0][1])
    with pytest.raises(InvalidInputError, match=r"expects INT64; row 1, column 'b' is empty"):
        tabular.parse_csv(b"a,b,c\n1,,3\n", matrix("INT64"))
    with pytest.raises(InvalidInputError, match="INT64"):
        tabular.parse_json(frame(columns=["a", "b", "c"], data=[[1, None, 3]]), matrix("INT64"))


def test_integers_in_csv_are_exact():
    big = 2**63 - 1
    assert rows(tabular.parse_csv(f"{big},-{big},3.0\n".encode(), matrix("INT64"))) == [[big, -big, 3]]
    for cell in ("9007199254740993.0", "1.5", "1e300", "1_000", "٣", "9" * 5000, str(2**63)):
        with pytest.raises(InvalidInputError):
            tabular.parse_csv(f"{cell},1,2\n".encode(), matrix("INT64"), header=False)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"1,2\n", "takes 3 columns; the table has 2"),
        (b"1,2,3\n4,5\n", "row 2 has 2 cells; the first row has 3"),
        (b"a,b,c\n1,2,3,4\n", "row 1 has 4 cells; the header has 3"),
        (b"a,b,z\n1,2,3\n", "lacks the column 'c' and has the column 'z', which the model does not know"),
        (b"a,a,b\n1,2,3\n", "'a' is there twice"),
        (b"a,b,c\n", "no rows"),
        (b"\n\n", "no rows"),
        (b"a,b,c\n1,x,3\n", "row 1, column 'b' is 'x'"),
        (b"a,b,c\n1_0,2,3\n", "column 'a' is '1_0'"),
        ("1,2,٣\n".encode(), "the table"),
        (b'"1,2,3\n', "not CSV"),
        (b'"1"x,2,3\n', "not CSV"),
        (b"\xff\xfe1,2,3\n", "not CSV in UTF-8"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused_with_the_place(body, says):
    with pytest.raises(InvalidInputError, match=says):
        tabular.parse_csv(body, NAMED)


def test_a_csv_of_too_many_cells_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(tabular, "MAX_CELLS", 8)
    tabular.parse_csv(b"1,2,3\n4,5,6", NAMED)
    for body in (b"1,2,3\n4,5,6\n7,8,9\n", b"\n" * 9, b"\r" * 9):
        with pytest.raises(PayloadTooLargeError):
            tabular.parse_csv(body, NAMED)
    with pytest.raises(PayloadTooLargeError):
        tabular.parse_json(frame(columns=["a", "b", "c"], data=[[1, 2, 3]] * 3), NAMED)
    with pytest.raises(PayloadTooLargeError):
        tabular.parse_json(json.dumps({"dataframe_records": [{f"{index}": 1} for index in range(4)]}).encode(), NAMED)
    with pytest.raises(PayloadTooLargeError):
        tabular.parse_npy(npy(np.array(["a"] * 9)), TEXT)


def test_split_frames_go_by_name_and_may_have_an_index():
    assert rows(tabular.parse_json(frame(index=[7], columns=["c", "b", "a"], data=[[3, 2, 1]]), NAMED)) == [[1, 2, 3]]
    assert rows(tabular.parse_json(frame(data=[[3, 2, 1]]), NAMED)) == [[3, 2, 1]]


def test_columns_that_are_only_counted_are_in_order():
    assert rows(tabular.parse_json(frame(columns=[0, 1, 2], data=[[3, 2, 1]]), NAMED)) == [[3, 2, 1]]
    records = {"dataframe_records": [{"2": 1, "0": 3, "1": 2}]}
    assert rows(tabular.parse_json(json.dumps(records).encode(), NAMED)) == [[3, 2, 1]]


def test_records_may_lack_cells_of_floats():
    body = json.dumps({"dataframe_records": [{"a": 1, "b": 2, "c": 3}, {"c": 6, "a": 4}]}).encode()
    assert np.array_equal(rows(tabular.parse_json(body, NAMED)), [[1, 2, 3], [4, math.nan, 6]], equal_nan=True)


def test_records_of_whole_inputs_are_taken_too():
    body = json.dumps({"dataframe_records": [{"input": [1, 2, 3]}, {"input": [4, 5, 6]}]}).encode()
    assert rows(tabular.parse_json(body, UNNAMED)) == [[1, 2, 3], [4, 5, 6]]


def test_python_s_nan_and_infinity_are_understood():
    body = b'{"dataframe_split": {"columns": ["a", "b", "c"], "data": [[1, NaN, -Infinity]]}}'
    assert np.array_equal(rows(tabular.parse_json(body, NAMED)), [[1, math.nan, -math.inf]], equal_nan=True)
    with pytest.raises(InvalidInputError):
        tabular.parse_json(body, matrix("INT32"))
    for broken in (b'{"instances": NaN', b'{"inputs": [1], "inputs": [NaN]}', b"NaN", b'{"a":' * 5000 + b"NaN", b'{"x": "\xff NaN"}'):
        with pytest.raises(InvalidInputError):
            tabular.parse_json(broken, NAMED)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"instances": [NaN' + b",[]" * 2_000_001, "more than 2000000 lists and objects"),
        (b'{"instances": [NaN' + b",1" * 8_000_001, "more than 8000000 values"),
        (b'{"instances": [NaN' + b" " * tabular.MAX_LENIENT_BYTES + b"]}", "send null for a missing number, or binary tensors"),
    ],
)
def test_nan_does_not_lift_the_bounds_of_a_body(body, message, monkeypatch):
    monkeypatch.setattr(tabular.json, "loads", lambda *_, **__: pytest.fail("parsed without bounds"))
    with pytest.raises(InvalidInputError, match=message):
        tabular.parse_json(body, NAMED)


def test_instances_and_inputs_are_v1s_and_params_name_outputs():
    request = tabular.parse_json(b'{"instances": [[1, 2, 3]], "params": {"outputs": ["predict"], "x": 1}}', NAMED)
    assert (rows(request), request.outputs, request.parameters["x"]) == ([[1, 2, 3]], ("predict",), 1)
    assert rows(tabular.parse_json(b'{"inputs": {"c": [3], "a": [1], "b": [2]}}', NAMED)) == [[1, 2, 3]]
    assert tabular.parse_json(b'{"dataframe_split": {"data": [[1, 2, 3]]}, "params": {"outputs": ["predict"]}}', NAMED).outputs == (
        "predict",
    )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{}", "exactly one of"),
        (b"[]", "must be a JSON object"),
        (b'{"instances": [[1, 2, 3]], "dataframe_split": {}}', "instances and dataframe_split"),
        (b'{"dataframe_split": []}', "must be an object"),
        (b'{"dataframe_split": {"data": [[1, 2, 3]], "colums": ["a"]}}', "not 'colums'"),
        (b'{"dataframe_split": {"data": [1, 2, 3]}}', r"data\[0\] must be a list"),
        (b'{"dataframe_split": {"columns": [["a", 1]], "data": [[1]]}}', "'columns' must be a list of names"),
        (b'{"dataframe_split": {"columns": [], "data": [[]]}}', "no columns"),
        (b'{"dataframe_split": {"columns": ["a", "b", "c"], "data": [[1, 2, "x"]]}}', "FP64"),
        (b'{"dataframe_split": {"columns": ["a", "b", "c"], "data": [[1, 2, [3]]]}}', "input 'input'"),
        (b'{"dataframe_records": {"a": 1}}', "list of objects"),
        (b'{"dataframe_records": []}', "no rows"),
        (b'{"dataframe_records": [{}]}', "no columns"),
        (b'{"dataframe_split": {"data": [[1, 2, 3]]}, "params": 3}', "'params' must be a JSON object"),
        (b'{"dataframe_split": {"data": [[1, 2, 3]]}, "params": {"outputs": ["x"]}}', "no output 'x'"),
        (b'{"instances": [[1, 2, NaN]], "id": "\\ud800"}', "surrogates not allowed"),
        (b'{"instances": [[1, 2, ' + b"9" * 5_000 + b']], "NaN": 1}', "not valid JSON"),
        (b'{"instances": ' + b"[" * 100_000 + b"NaN", "not valid JSON"),
    ],
)
def test_json_that_does_not_fit_is_refused(body, says):
    with pytest.raises(InvalidInputError, match=says):
        tabular.parse_json(body, NAMED)


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", ">i4", "u1", "<i8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_taken_whatever_its_byte_order_and_layout(dtype, order):
    array = np.array([[0, 1, 0], [1, 1, 0]]).astype(dtype, order=order)
    parsed = tabular.parse_npy(npy(array), NAMED).inputs["input"]
    assert parsed.dtype == np.float64
    assert parsed.tolist() == array.astype(float).tolist()


def test_an_array_of_strings_feeds_a_text_model():
    for array in (np.array(["naïve", "b"]), np.array([b"x", b"yz"])):
        expected = [value.encode() if isinstance(value, str) else value for value in array.tolist()]
        assert rows(tabular.parse_npy(npy(array), TEXT)) == expected


def test_columns_of_an_array_feed_several_inputs():
    both = Signature(inputs=tuple(TensorSpec(name=name, datatype="INT32", shape=(-1, 1)) for name in "xy"), outputs=(OUTPUT,))
    inputs = tabular.parse_npy(npy(np.array([[1.0, 2.0], [3.0, 4.0]])), both).inputs
    assert {name: array.tolist() for name, array in inputs.items()} == {"x": [[1], [3]], "y": [[2], [4]]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\x93NUMPY", "not in NumPy's"),
        (b"PK\x03\x04" + bytes(20), "not in NumPy's"),
        (npy(np.zeros((2, 3)))[:-1], "bytes"),
        (npy(np.zeros((2, 3))) + b"x", "bytes"),
        (npy(np.zeros((0, 3))), "empty"),
        (npy(np.zeros((2, 2))), "shape"),
        (npy(np.array([[1j, 1, 1]])), "not one of"),
        (npy(np.array([["a", "b", "c"]])), "expects FP64"),
        (npy(np.zeros(2, dtype=[("a", "<f8")])), "not one of"),
        (npy(np.zeros((1, 3), dtype="?"))[:-1] + b"\x07", "other than 0 and 1"),
        (npy(np.zeros((1, 3))).replace(b"<f8", b"|O8"), "never read"),
        (npy(np.zeros((1, 3))).replace(b"(1, 3)", b"(-1,3)"), "not one of"),
        (npy(np.zeros((1, 3))).replace(b"(1, 3), }", b"(1, 3) ** "), "not one of"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(20), "header"),
        (b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118, "not one of"),
    ],
)
def test_what_is_no_plain_array_is_refused(body, says):
    with pytest.raises(InvalidInputError, match=says):
        tabular.parse_npy(body, NAMED)


def test_integers_come_out_of_an_array_of_floats_only_if_they_are_whole():
    assert rows(tabular.parse_npy(npy(np.array([[1.0, 2.0, 3.0]])), matrix("INT64"))) == [[1, 2, 3]]
    with pytest.raises(InvalidInputError, match=r"1\.5"):
        tabular.parse_npy(npy(np.array([[1.5, 2.0, 3.0]])), matrix("INT64"))


def test_answers_in_csv_are_lines_of_all_columns():
    response = InferResponse(
        {
            "predict": np.array([1, 2]),
            "proba": np.array([[0.1, math.nan], [1e300, math.inf]]),
            "text": np.array([b'a "b"', "ü".encode()], dtype=object),
            "flag": np.array([True, False]),
        }
    )
    assert tabular.render_csv(response).decode() == '1,0.1,nan,"a ""b""",true\n2,1e+300,inf,ü,false\n'


def test_answers_that_a_form_cannot_hold_are_refused():
    for response in (
        InferResponse({"a": np.zeros(2), "b": np.zeros(3)}),
        InferResponse({"a": np.zeros((2, 2, 2))}),
        InferResponse({"a": np.float64(1.0)}),
        InferResponse({"a": np.array([b"\xff"], dtype=object)}),
    ):
        with pytest.raises(InvalidInputError):
            tabular.render_csv(response)
    for response in (InferResponse({"a": np.zeros(2), "b": np.zeros(2)}), InferResponse({"a": np.array([b"x"], dtype=object)})):
        with pytest.raises(InvalidInputError):
            tabular.render_npy(response)


def test_a_form_that_cannot_hold_the_answer_is_refused_before_the_model_is_asked():
    outputs = (
        OUTPUT,
        TensorSpec(name="text", datatype="BYTES", shape=(-1,)),
        TensorSpec(name="cube", datatype="FP64", shape=(-1, 2, 2)),
    )
    signature = NAMED.model_copy(update={"outputs": outputs})
    tabular.check_writable(InferRequest({}), signature, "npy")
    tabular.check_writable(InferRequest({}, outputs=("predict", "text")), signature, "csv")
    for names, form in ((("text",), "npy"), (("predict", "cube"), "npy"), (("cube",), "csv")):
        with pytest.raises(InvalidInputError):
            tabular.check_writable(InferRequest({}, outputs=names), signature, form)


REFUSALS = (InvalidInputError, PayloadTooLargeError)
FLOATS = st.floats(allow_nan=False, width=64)
SIGNATURES = st.sampled_from([NAMED, UNNAMED, TEXT, MIXED, matrix("INT64"), matrix("BOOL"), matrix("FP16"), matrix("BYTES")])


@settings(deadline=None)
@given(st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=8), st.permutations(["a", "b", "c"]))
def test_csv_and_frames_of_any_floats_come_back_exactly(values, order):
    expected = [list(row) for row in values]
    shuffled = [[row["abc".index(name)] for name in order] for row in values]
    text = io.StringIO()
    csv.writer(text).writerows([order, *shuffled])
    assert rows(tabular.parse_csv(text.getvalue().encode(), NAMED)) == expected
    assert rows(tabular.parse_json(frame(columns=order, data=shuffled), NAMED)) == expected


@settings(deadline=None)
@given(npst.arrays(st.sampled_from(["<f8", ">f4", "<i8", "u2", "?"]), npst.array_shapes(max_dims=4, max_side=4)), st.sampled_from("CF"))
def test_any_array_that_numpy_writes_is_read_as_numpy_reads_it(array, order):
    read = tabular.read_npy(npy(np.asarray(array, order=order)))
    assert read.shape == array.shape
    assert np.array_equal(read, array, equal_nan=array.dtype.kind == "f")


@settings(deadline=None)
@given(npst.arrays(st.sampled_from(["<f8", "<f4", "<i8"]), npst.array_shapes(max_dims=2, max_side=5)))
def test_answers_in_npy_are_what_numpy_reads(array):
    assert np.array_equal(tabular.read_npy(tabular.render_npy(InferResponse({"a": array}))), array, equal_nan=True)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet='a,bc"\n\r 01.e-+nanNIf_\x00', max_size=80).map(str.encode)), SIGNATURES)
def test_no_bytes_do_anything_else_than_fit_or_be_refused(body, signature):
    for parse in (tabular.parse_csv, tabular.parse_npy, tabular.parse_json):
        with suppress(*REFUSALS):
            parse(body, signature)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "c", "input", "data", "columns"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["instances", "inputs", "dataframe_split", "dataframe_records"]), JSON, JSON, SIGNATURES)
def test_no_json_does_anything_else_than_fit_or_be_refused(form, value, data, signature):
    for content in (value, {"columns": value, "data": data}, [value, data]):
        with suppress(*REFUSALS):
            tabular.from_document({form: content}, signature)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 120), st.binary(min_size=1, max_size=4))
def test_no_damaged_header_does_anything_else_than_be_refused(place, damage):
    body = bytearray(npy(np.zeros((1, 3))))
    body[place : place + len(damage)] = damage
    with suppress(*REFUSALS):
        tabular.parse_npy(body, NAMED)


@pytest.mark.parametrize("cell", ["1" * 100_000 + "x", "1." + "1" * 100_000 + "x", " " * 100_000 + "x"])
def test_a_long_cell_is_refused_without_trying_every_way_to_read_it(cell):
    with pytest.raises(InvalidInputError, match="row 1, column 1"):
        tabular.parse_csv(f"{cell},2,3".encode(), NAMED, header=False)


def test_a_header_that_misses_a_column_is_no_row_of_texts():
    columns = [TensorSpec(name=name, datatype="BYTES", shape=(-1,), dtype="object") for name in ("city", "plan")]
    signature = Signature(inputs=tuple(columns), outputs=(columns[0],))
    with pytest.raises(InvalidInputError, match="lacks the column 'city' and has the column 'City'"):
        tabular.parse_csv(b"City,plan\nParis,pro\n", signature)
    with pytest.raises(InvalidInputError, match="has the column '', which the model does not know"):
        tabular.parse_csv(b",city,plan\n0,Paris,pro\n", signature)
    assert [array.tolist() for array in tabular.parse_csv(b"Paris,pro\n", signature).inputs.values()] == [[b"Paris"], [b"pro"]]


def test_a_header_of_very_many_names_is_read_once():
    names = [f"n{index}" for index in range(200_000)]
    with pytest.raises(InvalidInputError, match="'n7' is there twice"):
        tabular.parse_csv((",".join([*names, "n7"]) + "\n" + "1," * 200_000 + "1").encode(), NAMED)


CELLS = st.sampled_from(["", "0", "1", "-2", "3.5", "1e3", "+4", ".5", "6.", "007", "nan", " 8 ", "9007199254740993", "x", "1_0", "-0.0"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.booleans(),
    st.sampled_from([NAMED, UNNAMED, matrix("INT64"), matrix("FP32"), matrix("BOOL")]),
)
def test_the_quick_way_to_read_numbers_says_the_same_as_the_slow_one(cells, end, has_header, signature):
    lines = [["c", "a", "b"], *cells] if has_header else cells
    body = (end.join(",".join(line) for line in lines) + end).encode()

    def outcome() -> tuple[str, object]:
        try:
            return "fits", rows(tabular.parse_csv(body, signature))
        except InvalidInputError as error:
            return "refused", error.message

    quick = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tabular, "_parse_numbers", lambda *_: None)
        slow = outcome()
    assert quick[0] == slow[0]
    assert np.array_equal(quick[1], slow[1], equal_nan=True) if quick[0] == "fits" else quick[1] == slow[1]
