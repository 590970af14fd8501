"""Random scikit-learn pipelines, asked in every form: what they answer to the DataFrame themselves is the answer."""

import csv
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import VotingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer, MinMaxScaler, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from libs.inference import tabular, v1, v2, v2_grpc
from libs.inference.errors import InvalidInputError as InvalidRequestError
from libs.inference.oip_proto.open_inference_pb2 import ModelInferRequest
from libs.inference.requests import InferRequest
from libs.runner.errors import InvalidInputError
from libs.runner.formats.sklearn import SklearnModel
from libs.runner.wire import Arrays, decode_tensors, encode_tensor, encode_tensors
from schemas.inference import Signature

TRAINED, ASKED = 16, 4
NAMES = ["age", "city name", "Größe", "a,b", "1", "0", 'say "so"', "x" * 40]
TEXTS = ["Paris", "Köln", " lead", "1", "nan", "None", "true", "a,b", "two\nlines", 'a "quote"', "東京"]

EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass
class Case:
    """A fitted model, the table it was fitted on, and the rows it is asked for."""

    model: Any
    table: pd.DataFrame
    rows: pd.DataFrame

    def __repr__(self) -> str:
        return f"{self.model!r}\n{self.table.dtypes}\n{self.rows!r}"


Part = Callable[[], Any]
PARTS: dict[str, list[Part]] = {
    "number": [
        StandardScaler,
        MinMaxScaler,
        SimpleImputer,
        lambda: make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler()),
        lambda: make_pipeline(SimpleImputer(), KBinsDiscretizer(3, encode="ordinal", quantile_method="averaged_inverted_cdf")),
        lambda: FeatureUnion([("a", StandardScaler()), ("b", MinMaxScaler())]),
        lambda: "passthrough",
        lambda: "drop",
    ],
    "integer": [
        partial(OneHotEncoder, handle_unknown="ignore"),
        OrdinalEncoder,
        StandardScaler,
        partial(SimpleImputer, strategy="most_frequent"),
        lambda: "passthrough",
        lambda: "drop",
    ],
    "text": [
        partial(OneHotEncoder, handle_unknown="ignore"),
        partial(OneHotEncoder, drop="first", handle_unknown="error"),
        partial(OrdinalEncoder, handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2),
        lambda: make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")),
        lambda: make_pipeline(
            SimpleImputer(strategy="constant", fill_value="missing"), OrdinalEncoder(categories="auto", dtype=np.float32)
        ),
        lambda: "drop",
    ],
    "boolean": [
        OneHotEncoder,
        OrdinalEncoder,
        lambda: "passthrough",
        lambda: "drop",
    ],
    "flag": [
        OneHotEncoder,
        partial(OrdinalEncoder, encoded_missing_value=-1),
        lambda: make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()),
        lambda: make_pipeline(SimpleImputer(strategy="most_frequent"), OrdinalEncoder()),
        lambda: "drop",
    ],
    "words": [CountVectorizer, partial(CountVectorizer, analyzer="char", binary=True)],
}
"""What is made of a column, by its kind; a flag is a boolean that may be missing."""


@st.composite
def cells(draw: st.DrawFn, kind: str, count: int, may_miss: bool) -> list[Any]:
    if kind == "number":
        values = st.floats(-1e6, 1e6, allow_subnormal=False) | st.integers(-9, 9).map(float)
        return draw(st.lists(values | st.just(np.nan) if may_miss else values, min_size=count, max_size=count))
    if kind == "integer":
        return draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))
    if kind == "boolean":
        return draw(st.lists(st.booleans(), min_size=count, max_size=count))
    if kind == "words":
        texts = st.lists(st.sampled_from(["slow", "fast", "größer", "a1"]), min_size=1, max_size=3).map(" ".join)
        return draw(st.lists(texts, min_size=count, max_size=count))
    texts = st.booleans() if kind == "flag" else st.sampled_from(TEXTS)
    return draw(st.lists(texts | st.just(np.nan) if may_miss else texts, min_size=count, max_size=count))


def series(values: list[Any], kind: str) -> pd.Series:
    return pd.Series(values, dtype={"number": "float64", "integer": "int64", "boolean": "bool"}.get(kind, "object"))


@st.composite
def tables(draw: st.DrawFn, kinds: list[str]) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, tuple[str, bool]]]:
    names = draw(st.permutations(NAMES))[: len(kinds)]
    columns, rows, told = {}, {}, {}
    for name, kind in zip(names, kinds, strict=True):
        may_miss = kind == "flag" or (kind in ("number", "text") and draw(st.booleans()))
        values = draw(cells(kind, TRAINED, may_miss))
        if may_miss:
            values[0] = np.nan
        if kind in ("number", "text", "flag"):
            values[1:3] = {"number": [1.5, -2.5], "flag": [True, False]}.get(kind, TEXTS[:2])
        columns[name] = series(values, kind)
        rows[name] = series(draw(cells(kind, ASKED, may_miss)), kind)
        told[name] = (kind, may_miss)
    return pd.DataFrame(columns), pd.DataFrame(rows), told


def labels(draw: st.DrawFn, are_classes: bool) -> Any:
    places = np.arange(TRAINED)
    if not are_classes:
        return draw(st.sampled_from([places / 3, np.c_[places / 3, -places]]))
    kinds = [places % 2, places % 3 - 1, places % 2 == 0, np.array(["nein", "ja", "weiß nicht"])[places % 3], places % 2 + 0.0]
    return draw(st.sampled_from([*kinds, np.c_[places % 2, places % 3]]))


@st.composite
def pipelines(draw: st.DrawFn) -> Case:
    kinds = draw(st.lists(st.sampled_from(list(PARTS)), min_size=1, max_size=5))
    table, rows, told = draw(tables(kinds))
    parts = []
    for place, (name, (kind, _)) in enumerate(told.items()):
        part = draw(st.sampled_from(PARTS[kind]))()
        selected: Any = name if kind == "words" else draw(st.sampled_from([[name], [place], [other == name for other in told]]))
        parts.append((f"p{place}", part, selected))
    if all(part == "drop" for _, part, _ in parts):
        parts[0] = ("p0", draw(st.sampled_from(PARTS[kinds[0]][:2]))(), parts[0][2])
    if draw(st.booleans()) and kinds[-1] in ("number", "integer", "boolean") and len(parts) > 1:
        parts.pop()
    remainder = draw(st.sampled_from(["drop", "passthrough"])) if kinds[-1] not in ("text", "words") else "drop"
    columns: Any = ColumnTransformer(parts, remainder=remainder, sparse_threshold=0)
    form = draw(st.sampled_from(["plain", "plain", "frame", "union", "nested", "steps"]))
    if form == "frame" and "words" not in kinds:
        columns.set_output(transform="pandas")
    elif form == "union":
        columns = FeatureUnion([("a", columns), ("b", clone(columns))])
    elif form == "nested":
        columns = ColumnTransformer([("all", columns, list(table))], sparse_threshold=0)
    elif form == "steps":
        columns = make_pipeline("passthrough", FunctionTransformer(), columns)
    return fitted(draw, columns, table, rows)


@st.composite
def of_numbers(draw: st.DrawFn) -> Case:
    """Pipelines without a column transformer, on numbers."""
    kinds = draw(st.lists(st.sampled_from(["number", "integer", "boolean"]), min_size=2, max_size=4))
    table, rows, _ = draw(tables(kinds))
    step = draw(
        st.sampled_from([StandardScaler(), SimpleImputer(), SimpleImputer(add_indicator=True), FeatureUnion([("a", StandardScaler())])])
    )
    return fitted(draw, step, table.astype("float64"), rows.astype("float64"))


def fitted(draw: st.DrawFn, step: Any, table: pd.DataFrame, rows: pd.DataFrame) -> Case:
    finals = [DecisionTreeClassifier(max_depth=3, random_state=0), DecisionTreeRegressor(max_depth=3, random_state=0)]
    if not table.isna().any(axis=None):
        finals += [KNeighborsClassifier(3)]
    final = draw(st.sampled_from(finals))
    y = labels(draw, not isinstance(final, DecisionTreeRegressor))
    model: Any = make_pipeline(step, final)
    around = draw(st.sampled_from([None, None, None, "search", "vote", "targets", "scaled", "calibrated"]))
    if around == "search":
        model = GridSearchCV(model, {}, cv=2)
    elif around == "vote" and y.ndim == 1 and is_classifier(final):
        model = VotingClassifier([("a", model), ("b", clone(model))], voting="soft")
    elif around == "targets" and y.ndim == 2:
        model = MultiOutputClassifier(model) if is_classifier(final) else MultiOutputRegressor(model)
    elif around == "scaled" and not is_classifier(final):
        model = TransformedTargetRegressor(model, transformer=StandardScaler())
    elif around == "calibrated" and y.ndim == 1 and is_classifier(final):
        model = CalibratedClassifierCV(model, cv=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Case(model.fit(table, y), table, rows)
        except ValueError:  # such as a category that only one part of a cross validation has
            reject()


def plain(rows: pd.DataFrame) -> dict[str, list[Any]]:
    return {name: [None if value != value else value for value in rows[name].tolist()] for name in rows.columns}


def objects(rows: pd.DataFrame) -> list[dict[str, Any]]:
    named = plain(rows)
    return [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]


def body(**members: Any) -> bytes:
    return json.dumps(members).encode()


def datatype(values: list[Any]) -> str:
    kinds = {type(value) for value in values if value is not None}
    return "BYTES" if str in kinds else "BOOL" if bool in kinds else "INT64" if kinds == {int} else "FP64"


def as_array(values: list[Any]) -> np.ndarray:
    if datatype(values) == "BYTES":
        array = np.empty(len(values), dtype=object)
        array[:] = [value.encode() for value in values]
        return array
    return np.array([np.nan if value is None else value for value in values])


def as_v2(rows: pd.DataFrame, signature: Signature, shape: list[int] | None = None) -> InferRequest:
    inputs = [
        {"name": name, "shape": shape or [len(values)], "datatype": datatype(values), "data": values}
        for name, values in plain(rows).items()
    ]
    return v2.parse(body(inputs=inputs), signature)


def as_binary(rows: pd.DataFrame, signature: Signature) -> InferRequest:
    inputs, tail = [], b""
    for name, values in plain(rows).items():
        described, data = encode_tensor(name, as_array(values))
        inputs.append(described)
        tail += bytes(data)
    head = body(inputs=inputs)
    return v2.parse(head + tail, signature, len(head))


def as_grpc(rows: pd.DataFrame, signature: Signature, is_raw: bool) -> InferRequest:
    arrays = {name: as_array(values) for name, values in plain(rows).items()}
    written = v2_grpc.write_request(InferRequest(arrays, binary_data_output=is_raw), "m")
    return v2_grpc.from_message(ModelInferRequest.FromString(written), signature)


def as_npy(rows: pd.DataFrame, signature: Signature) -> InferRequest:
    file = io.BytesIO()
    np.save(file, rows.to_numpy(dtype=float))
    return tabular.parse_npy(file.getvalue(), signature)


def shuffled(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[list(rows.columns[::-1])]


def requests(case: Case, signature: Signature) -> dict[str, Callable[[], InferRequest]]:
    """The rows in every form that can hold them."""
    rows = case.rows
    lists = [list(row.values()) for row in objects(rows)]
    used = rows.drop(columns=list(signature.ignored_columns))
    has_missing_text = any(datatype(values) == "BYTES" and None in values for values in plain(rows).values())
    all_missing = any(set(values) == {None} for values in plain(rows).values())
    split = {"columns": list(rows.columns), "data": lists}
    forms: dict[str, Callable[[], InferRequest]] = {
        "V1 objects": lambda: v1.parse(body(instances=objects(shuffled(rows))), signature),
        "V1 lists": lambda: v1.parse(body(instances=lists), signature),
        "V1 used columns": lambda: v1.parse(body(inputs=plain(used)), signature),
        "V1 used lists": lambda: v1.parse(body(instances=[list(row.values()) for row in objects(used)]), signature),
        "V1 columns": lambda: v1.parse(body(inputs=plain(shuffled(rows))), signature),
        "split": lambda: tabular.parse_json(body(dataframe_split=split), signature),
        "split without names": lambda: tabular.parse_json(body(dataframe_split={"data": lists}), signature),
        "records": lambda: tabular.parse_json(body(dataframe_records=objects(rows)), signature),
        "CSV": lambda: tabular.parse_csv(shuffled(rows).to_csv(index=False, quoting=csv.QUOTE_MINIMAL).encode(), signature),
        "CSV without names": lambda: tabular.parse_csv(rows.to_csv(index=False, header=False).encode(), signature, header=False),
    }
    if not all_missing:
        forms["V2"] = lambda: as_v2(shuffled(rows), signature)
        forms["V2 [n, 1]"] = lambda: as_v2(rows, signature, [len(rows), 1])
    if not has_missing_text and not all_missing:
        forms["V2 binary"] = lambda: as_binary(rows, signature)
        forms["gRPC"] = lambda: as_grpc(shuffled(rows), signature, is_raw=False)
        forms["gRPC, raw"] = lambda: as_grpc(rows, signature, is_raw=True)
    if all(dtype.kind in "fib" for dtype in rows.dtypes):
        forms["NumPy"] = lambda: as_npy(rows, signature)
    return forms


def own_answers(model: Any, rows: pd.DataFrame, outputs: list[str]) -> dict[str, Any] | str:
    """What the model itself says: arrays by output, or that it refuses."""
    answers: dict[str, Any] = {}
    try:
        for name in outputs:
            method, _, target = name.rpartition("_") if name[-1].isdigit() else (name, "", "")
            answer = getattr(model, method)(rows)
            answers[name] = answer[int(target)] if target else answer
    except ValueError:
        return "refused"
    return answers


def check(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = SklearnModel(case.model).describe()
        served = SklearnModel(case.model, json.loads(Signature.model_validate(first).model_dump_json()))
        assert served.describe() == first
        signature = Signature.model_validate(first)
        outputs = [spec.name for spec in signature.outputs]
        expected = own_answers(case.model, case.rows, outputs)
        asked: set[Any] = set()
        for form, read in requests(case, signature).items():
            described = f"{form} of {signature}"
            try:
                specs, buffers = encode_tensors(read().inputs)
            except InvalidRequestError as error:
                refused(described, error, expected)
                continue
            data = b"".join(buffers)
            if (frozenset(specs), data) not in asked:
                asked.add((frozenset(specs), data))
                compare(described, decode_tensors(specs, data, may_miss=None), served, outputs, expected)


def refused(form: str, error: Exception, expected: Any) -> None:
    assert expected == "refused", f"{form}: {error}"


def compare(form: str, inputs: Arrays, served: SklearnModel, outputs: list[str], expected: Any) -> None:
    try:
        answers = served.predict(inputs, outputs)
    except InvalidInputError as error:
        refused(form, error, expected)
        return
    assert expected != "refused", f"{form}: answered {answers}"
    for name in outputs:
        wanted = np.asarray(expected[name])
        assert answers[name].shape == wanted.shape, form
        assert answers[name].tolist() == wanted.tolist(), form


@EXAMPLES
@given(pipelines())
def test_column_transformers_answer_as_they_do_themselves(case: Case) -> None:
    check(case)


@EXAMPLES
@given(of_numbers())
def test_pipelines_on_numbers_answer_as_they_do_themselves(case: Case) -> None:
    check(case)
