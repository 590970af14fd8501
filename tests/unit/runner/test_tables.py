"""Models on tables: the columns that are found, and answers equal to the local ``predict`` on the same DataFrame."""

import io
import warnings
from typing import Any

import joblib
import numpy as np
import orjson
import pandas as pd
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.ensemble import VotingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from libs.inference import examples, tabular, v1, v2
from libs.inference.errors import InvalidInputError as InvalidRequestError
from libs.inference.requests import InferRequest, InferResponse
from libs.runner.errors import InvalidInputError, LoadError
from libs.runner.formats.sklearn import SklearnModel
from libs.runner.formats.sklearn import load as load_sklearn
from libs.runner.formats.tables import Column
from schemas.inference import Signature
from tests.models.zoo import CASES, Case


@pytest.fixture(scope="module", params=CASES, ids=lambda make: make.__name__.strip("_"))
def case(request: pytest.FixtureRequest) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return request.param()


def test_the_answer_equals_the_local_prediction(case: Case, tmp_path: Any) -> None:
    joblib.dump(case.model, tmp_path / "m")
    model = load_sklearn(str(tmp_path / "m"), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signature = Signature.model_validate(model.describe())
        rows = case.rows.drop(columns=list(signature.ignored_columns))
        cells = {name: [None if value != value else value for value in rows[name].tolist()] for name in rows.columns}
        if not signature.is_table and signature.feature_names is None:
            document: dict[str, Any] = {"instances": [list(row) for row in zip(*cells.values(), strict=True)]}
        else:
            document = {"inputs": cells}
        request = v1.from_document(document, signature)
        answer = model.predict(request.inputs, ["predict"])["predict"]
        restarted = SklearnModel(case.model, signature.model_dump(mode="json"))
        assert Signature.model_validate(restarted.describe()).inputs == signature.inputs
        if not case.as_dicts:  # the keys of dictionaries have no order
            whole = [[None if value != value else value for value in row] for row in case.rows.astype(object).to_numpy().tolist()]
            lists = v1.from_document({"instances": whole}, signature)
            assert model.predict(lists.inputs, ["predict"])["predict"].tolist() == case.expected()
    assert answer.tolist() == case.expected()


def test_columns_are_typed_as_the_encoders_remember_them() -> None:
    mixed = next(make for make in CASES if make.__name__ == "_mixed")()
    inputs = SklearnModel(mixed.model).describe()["inputs"]
    assert {spec["name"]: spec["datatype"] for spec in inputs} == {
        "age": "FP64",
        "income": "FP64",
        "city": "BYTES",
        "plan": "BYTES",
        "zip": "BYTES",
        "active": "FP64",
    }


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_target_has_an_output_of_its_own(count: int) -> None:
    x, y = load_iris(return_X_y=True)
    model = DecisionTreeClassifier(max_depth=2, random_state=0).fit(x, np.c_[y > 0, x[:, 0] > 5.8].astype(int))
    served = SklearnModel(model)
    assert [(spec["name"], spec["shape"]) for spec in served.describe()["outputs"]] == [
        ("predict", [-1, 2]),
        ("predict_proba_0", [-1, 2]),
        ("predict_proba_1", [-1, 2]),
    ]
    answer = served.predict({"input": x[:count]}, ["predict_proba_0", "predict_proba_1"])
    for target, expected in enumerate(model.predict_proba(x[:count])):
        assert np.array_equal(answer[f"predict_proba_{target}"], expected)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_predict_proba_of_several_targets_is_answered_row_by_row_in_v1(count: int, ragged: bool) -> None:
    x, y = load_iris(return_X_y=True)
    labels = np.c_[y if ragged else y > 0, x[:, 0] > 5.8].astype(int)
    model = DecisionTreeClassifier(max_depth=2, random_state=0).fit(x, labels)
    rows = x[[0, 60, 149]].tolist()[:count]
    served = SklearnModel(model)
    signature = Signature.model_validate(served.describe())

    def answered(**asked: Any) -> Any:
        request = v1.parse(orjson.dumps({"instances": rows, **asked}), signature)
        return orjson.loads(v1.render(InferResponse(served.predict(request.inputs, request.outputs or ["predict"])), request.groups))

    by_row = [[target[row].tolist() for target in model.predict_proba(rows)] for row in range(count)]
    assert answered(outputs=["predict_proba"]) == {"predictions": by_row}
    assert answered(parameters={"outputs": ["predict_proba"]}) == {"predictions": by_row}
    assert answered(outputs=["predict_proba_1"]) == {"predictions": [targets[1] for targets in by_row]}
    both = [{"predict": label, "predict_proba": targets} for label, targets in zip(model.predict(rows).tolist(), by_row, strict=True)]
    assert answered(outputs=["predict", "predict_proba"]) == {"predictions": both}
    one = [{"predict_proba": targets, "predict_proba_0": targets[0]} for targets in by_row]
    assert answered(outputs=["predict_proba", "predict_proba_0"]) == {"predictions": one}


def test_targets_may_have_different_classes() -> None:
    x, y = load_iris(return_X_y=True)
    model = MultiOutputClassifier(LogisticRegression(max_iter=500)).fit(x, np.c_[y, x[:, 0] > 5.8].astype(int))
    outputs = {spec["name"]: spec["shape"] for spec in SklearnModel(model).describe()["outputs"]}
    assert outputs == {"predict": [-1, 2], "predict_proba_0": [-1, 3], "predict_proba_1": [-1, 2]}


def test_a_method_that_only_says_that_it_is_not_supported_is_no_output() -> None:
    class Half(DecisionTreeClassifier):
        def predict_proba(self, X: Any, check_input: bool = True) -> Any:
            raise NotImplementedError

    x, y = load_iris(return_X_y=True)
    assert [spec["name"] for spec in SklearnModel(Half().fit(x, y)).describe()["outputs"]] == ["predict"]


def test_several_outputs_of_a_pipeline_are_those_of_its_methods_and_its_steps_run_once(case: Case) -> None:
    if not isinstance(case.model, Pipeline):
        pytest.skip("not a pipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served = SklearnModel(case.model)
        signature = Signature.model_validate(served.describe())
        outputs = [spec.name for spec in signature.outputs]
        made_up = served._table.made_up(4) if served._table is not None else None
        inputs = made_up or {
            "input": np.array([b"some text"] * 4, object) if served._takes_text else np.ones((4, signature.inputs[0].shape[1]))
        }
        together = served.predict(inputs, outputs)
        for name in outputs:
            alone = served.predict(inputs, [name])[name]
            assert together[name].dtype == alone.dtype
            assert together[name].tolist() == alone.tolist()


def test_the_steps_of_a_pipeline_run_once_for_all_outputs() -> None:
    seen: list[int] = []

    def counted(values: Any) -> Any:
        seen.append(len(values))
        return values

    x, y = load_iris(return_X_y=True)
    model = make_pipeline(FunctionTransformer(counted), "passthrough", LogisticRegression(max_iter=1000)).fit(x, y)
    served = SklearnModel(model)
    outputs = [spec["name"] for spec in served.describe()["outputs"]]
    seen.clear()
    answer = served.predict({"input": x[:3]}, outputs)
    assert (seen, list(answer)) == ([3], ["predict", "predict_proba", "decision_function"])
    assert np.array_equal(answer["predict_proba"], model.predict_proba(x[:3]))


def test_dates_as_labels_are_text() -> None:
    x, y = load_iris(return_X_y=True)
    days = np.array(["2020-01-01", "2021-01-01", "2022-01-01"], "datetime64[D]")
    served = SklearnModel(KNeighborsClassifier(3).fit(x, days[y]))
    assert served.describe()["outputs"][0] == {"name": "predict", "datatype": "BYTES", "shape": [-1]}
    assert served.predict({"input": x[:1]}, ["predict"])["predict"].tolist() == ["2020-01-01"]


def test_what_predict_gives_is_never_passed_over_in_silence() -> None:
    class Odd:
        n_features_in_ = 1

        def predict(self, values: Any) -> Any:
            return np.ones(len(values), dtype=complex)

        def predict_proba(self, values: Any) -> Any:
            return np.ones((len(values), 2))

    with pytest.raises(LoadError, match="predict gives what no datatype"):
        SklearnModel(Odd()).describe()


def test_a_column_of_text_and_numbers_is_refused() -> None:
    class Encoder:
        categories_ = (np.array([1, "one"], dtype=object),)
        feature_names_in_ = np.array(["mixed"], dtype=object)

        def predict(self, values: Any) -> Any:
            return values

    with pytest.raises(LoadError, match="column 'mixed' of the model holds text and numbers"):
        SklearnModel(Encoder())


def test_a_declared_column_outranks_what_was_found() -> None:
    class Model:
        feature_names_in_ = np.array(["day", "n"], dtype=object)

        def predict(self, table: pd.DataFrame) -> Any:
            return (table["day"].dt.year + table["n"].fillna(0).astype(int)).to_numpy()

    declared = [
        {"name": "day", "datatype": "BYTES", "shape": [-1], "dtype": "datetime64[ns]"},
        {"name": "n", "datatype": "FP64", "shape": [-1], "dtype": "Int64"},
    ]
    served = SklearnModel(Model(), {"inputs": declared})
    assert [spec["dtype"] for spec in served.describe()["inputs"]] == ["datetime64[ns]", "Int64"]
    days = np.array([b"2026-11-30", b"2020-02-29T12:00:00"], dtype=object)
    assert served.predict({"day": days, "n": np.array([1.0, np.nan])}, ["predict"])["predict"].tolist() == [2027, 2020]


def test_the_example_completes_columns_that_the_model_remembers_nothing_of() -> None:
    class Model:
        feature_names_in_ = np.array(["city", "n"], dtype=object)

        def predict(self, table: pd.DataFrame) -> Any:
            return (table["city"].str.len() + table["n"]).to_numpy()

    shown = examples.shown_columns({"instances": [{"city": "Paris", "n": 2, "stray": "x"}]})
    assert shown is not None
    served = SklearnModel(Model(), shown.model_dump(mode="json"))
    assert [(spec["name"], spec["datatype"]) for spec in served.describe()["inputs"]] == [("city", "BYTES"), ("n", "FP64")]
    assert served.predict({"city": np.array([b"Paris"], dtype=object), "n": np.array([2.0])}, ["predict"])["predict"].tolist() == [7.0]


def test_the_example_does_not_outrank_what_the_model_remembers() -> None:
    categories = next(make for make in CASES if make.__name__ == "_categories")()
    shown = examples.shown_columns({"instances": categories.rows.astype(object).to_dict("records")})
    assert shown is not None
    inputs = SklearnModel(categories.model, shown.model_dump(mode="json")).describe()["inputs"]
    assert {spec["name"]: spec["dtype"] for spec in inputs} == {"income": "float64", "city": "category", "plan": "category"}


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("boolean", 7.0), ("boolean", 0.5), ("Int64", 3.5), ("Int64", float(2**53)), ("Int64", -float(2**60)), ("Int64", np.inf)],
)
def test_a_value_that_a_nullable_column_does_not_have_is_refused_by_name(dtype: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match="column 'c' takes"):
        Column("c", "FP64", dtype).series(np.array([1.0, np.nan, value]))


def test_nullable_columns_hold_every_value_they_have() -> None:
    booleans = Column("c", "FP64", "boolean").series(np.array([1.0, 0.0, np.nan]))
    assert (str(booleans.dtype), booleans[:2].tolist(), booleans.isna().tolist()) == ("boolean", [True, False], [False, False, True])
    integers = Column("c", "FP64", "Int64").series(np.array([float(2**53 - 1), -3.0, np.nan]))
    assert (str(integers.dtype), integers[:2].tolist(), integers.isna().tolist()) == ("Int64", [2**53 - 1, -3], [False, False, True])


@pytest.mark.parametrize("encoder", [OneHotEncoder(handle_unknown="ignore"), OrdinalEncoder()])
def test_a_boolean_column_that_may_miss_values_takes_null(encoder: Any) -> None:
    table = pd.DataFrame({"active": np.array([True, np.nan, False, True], dtype=object), "age": [1.0, 2, 3, 4]})
    imputed = make_pipeline(SimpleImputer(strategy="most_frequent"), encoder)
    model = make_pipeline(ColumnTransformer([("b", imputed, ["active"]), ("n", StandardScaler(), ["age"])]), LogisticRegression())
    model.fit(table, [0, 1, 1, 0])
    first = SklearnModel(model).describe()
    served = SklearnModel(model, first)
    assert served.describe() == first
    signature = Signature.model_validate(first)
    assert [(spec.name, spec.dtype) for spec in signature.inputs] == [("active", "boolean"), ("age", "float64")]
    inputs = v1.from_document({"inputs": {"active": [True, None, False], "age": [1, 2, 3]}}, signature).inputs
    assert np.array_equal(served.predict(inputs, ["predict_proba"])["predict_proba"], model.predict_proba(table[:3]))


def test_an_encoder_that_knows_missing_booleans_takes_null() -> None:
    table = pd.DataFrame({"active": np.array([True, None, False, True], dtype=object)})
    model = make_pipeline(ColumnTransformer([("b", OneHotEncoder(), ["active"])]), LogisticRegression()).fit(table, [0, 1, 1, 0])
    served = SklearnModel(model)
    signature = Signature.model_validate(served.describe())
    inputs = v1.from_document({"inputs": {"active": [None, True, None]}}, signature).inputs
    expected = model.predict_proba(table.iloc[[1, 0, 1]])
    assert np.array_equal(served.predict(inputs, ["predict_proba"])["predict_proba"], expected)


@pytest.mark.parametrize("stands", [pd.NA])
def test_a_missing_text_is_what_the_imputer_was_fitted_with(stands: Any) -> None:
    table = pd.DataFrame({"city": np.array(["Paris", stands, "Lyon", "Paris"], dtype=object)})
    imputer = SimpleImputer(strategy="constant", fill_value="?", missing_values=stands)
    model = make_pipeline(ColumnTransformer([("t", make_pipeline(imputer, OneHotEncoder()), ["city"])]), LogisticRegression())
    model.fit(table, [0, 1, 1, 0])
    served = SklearnModel(model)
    inputs = v1.from_document({"inputs": {"city": ["Paris", None]}}, Signature.model_validate(served.describe())).inputs
    assert np.array_equal(served.predict(inputs, ["predict_proba"])["predict_proba"], model.predict_proba(table[:2]))


def test_a_missing_text_for_a_vectorizer_is_a_refusal() -> None:
    table = pd.DataFrame({"text": ["slow and late", "fast", "great", "late"]})
    model = make_pipeline(ColumnTransformer([("w", TfidfVectorizer(), "text")]), LogisticRegression()).fit(table, [0, 1, 1, 0])
    served = SklearnModel(model)
    inputs = v1.from_document({"inputs": {"text": ["fast", None]}}, Signature.model_validate(served.describe())).inputs
    with pytest.raises(InvalidInputError, match="invalid document"):
        served.predict(inputs, ["predict"])


def _lower(table: pd.DataFrame) -> pd.DataFrame:
    return table.apply(lambda column: column.str.lower())


def _letters(table: pd.DataFrame) -> pd.DataFrame:
    return table.apply(lambda column: column.str.len())


@pytest.mark.parametrize("is_first", [True, False])
def test_columns_behind_functions_are_text_where_the_functions_take_no_numbers(is_first: bool) -> None:
    table = pd.DataFrame({"city": ["Paris", "lyon", "LYON", "paris"], "name": ["a", "bb", "ccc", "d"], "income": [1.0, 20, 300, 4]})
    parts = [
        ("t", make_pipeline(FunctionTransformer(_lower), OneHotEncoder()), ["city"]),
        ("l", FunctionTransformer(_letters), ["name"]),
        ("n", FunctionTransformer(np.log1p), ["income"]),
    ]
    columns: Any = ColumnTransformer(parts)
    if is_first:
        table = table[["city"]]
        columns = make_pipeline(FunctionTransformer(_lower), OneHotEncoder())
    model = make_pipeline(columns, LogisticRegression()).fit(table, [0, 1, 1, 0])
    first = SklearnModel(model).describe()
    assert SklearnModel(model, first).describe() == first
    signature = Signature.model_validate(first)
    assert {spec.name for spec in signature.inputs if spec.datatype == "BYTES"} == set(table) - {"income"}
    served = SklearnModel(model, first)
    inputs = v1.from_document({"inputs": {name: table[name].tolist() for name in table}}, signature).inputs
    assert np.array_equal(served.predict(inputs, ["predict_proba"])["predict_proba"], model.predict_proba(table))


def _as_text(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype(str)


@pytest.mark.parametrize(("values", "datatype"), [([75001, 10115, 75001, 10115], "INT64"), ([True, False, True, False], "BOOL")])
@pytest.mark.parametrize("with_example", [False, True])
def test_integers_and_booleans_that_a_function_writes_as_text_come_as_what_they_are(
    values: list[Any], datatype: str, with_example: bool
) -> None:
    table = pd.DataFrame({"code": values, "v": [0.1, 0.2, 0.3, 0.4]})
    codes = make_pipeline(FunctionTransformer(_as_text), OneHotEncoder(handle_unknown="ignore"))
    model = make_pipeline(ColumnTransformer([("c", codes, ["code"]), ("v", "passthrough", ["v"])]), DecisionTreeClassifier(random_state=0))
    model.fit(table, [1, 0, 1, 0])
    shown = [{"name": name, "datatype": "FP64", "shape": [-1], "dtype": "float64"} for name in table] if with_example else []
    first = SklearnModel(model, {"inputs": shown}).describe()
    assert [spec["datatype"] for spec in first["inputs"]] == [datatype, "FP64"]
    served = SklearnModel(model, first)
    assert served.describe() == first
    inputs = v1.from_document({"instances": table.to_dict("records")}, Signature.model_validate(first)).inputs
    assert served.predict(inputs, ["predict"])["predict"].tolist() == [1, 0, 1, 0]


def test_integers_beyond_what_floats_keep_are_told_apart() -> None:
    ids = [2**53, 2**53 + 1, 2**53 + 2, 2**53 + 3]
    table = pd.DataFrame({"id": ids, "v": [0, 0, 0, 0]})
    columns = ColumnTransformer([("i", OneHotEncoder(), ["id"]), ("v", "passthrough", ["v"])])
    model = make_pipeline(columns, DecisionTreeClassifier(random_state=0)).fit(table, [0, 1, 0, 1])
    served = SklearnModel(model)
    signature = Signature.model_validate(served.describe())
    inputs = v1.from_document({"inputs": {"id": ids, "v": [0] * 4}}, signature).inputs
    assert served.predict(inputs, ["predict"])["predict"].tolist() == [0, 1, 0, 1]
    matrix = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 2], "data": [2**53 + 1, 0]}]}
    with pytest.raises(InvalidRequestError, match="column 'id' has integers that a matrix of floats does not keep"):
        v2.from_document(matrix, signature)


@pytest.mark.parametrize(
    ("encode", "ids"),
    [
        (OneHotEncoder(), [2**53, 2**53 + 1, 2**53 + 2, 2**53 + 3]),
        (make_pipeline(FunctionTransformer(lambda codes: codes.astype(str)), OneHotEncoder()), [75001, 75002, 75003, 75004]),
    ],
)
def test_integers_in_columns_without_names_that_floats_do_not_keep_are_refused_at_load(encode: Any, ids: list[int]) -> None:
    model = make_pipeline(encode, DecisionTreeClassifier()).fit(np.array(ids)[:, None], [0, 1, 0, 1])
    with pytest.raises(LoadError, match=r"integers apart that a matrix of floats does not keep \(column 0\); train it on a DataFrame"):
        SklearnModel(model).describe()
    matrix = {"inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 1]}]}
    assert SklearnModel(model, matrix).describe()["inputs"] == [{"name": "input", "datatype": "FP64", "shape": [-1, 1]}]


def test_small_codes_in_columns_without_names_stay_a_matrix() -> None:
    model = make_pipeline(OneHotEncoder(), DecisionTreeClassifier()).fit(np.array([1, 2, 3, 4])[:, None], [0, 1, 0, 1])
    assert [spec["name"] for spec in SklearnModel(model).describe()["inputs"]] == ["input"]


def test_a_model_that_was_deployed_with_a_matrix_keeps_it() -> None:
    table = pd.DataFrame({"id": [2**53, 2**53 + 2]})
    model = make_pipeline(OneHotEncoder(), DecisionTreeClassifier()).fit(table, [0, 1])
    matrix = {"inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 1]}]}
    assert [spec["name"] for spec in SklearnModel(model, matrix).describe()["inputs"]] == ["input"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_pipeline(FeatureUnion([("w", TfidfVectorizer()), ("c", TfidfVectorizer(analyzer="char"))]), LogisticRegression()),
        lambda: VotingClassifier([(name, make_pipeline(TfidfVectorizer(), LogisticRegression())) for name in "ab"]),
        lambda: CalibratedClassifierCV(make_pipeline(TfidfVectorizer(), LogisticRegression()), cv=2),
        lambda: make_pipeline(FunctionTransformer(np.ravel), TfidfVectorizer(), LogisticRegression()),
    ],
    ids=["union", "voting", "calibrated", "behind a function"],
)
def test_vectorizers_within_other_estimators_take_text(make: Any) -> None:
    texts = np.array(["good day", "bad day", "good night", "bad night"] * 2, dtype=object)
    model = make().fit(texts, [1, 0, 1, 0] * 2)
    served = SklearnModel(model)
    signature = Signature.model_validate(served.describe())
    assert [spec.datatype for spec in signature.inputs] == ["BYTES"]
    inputs = v1.from_document({"instances": texts.tolist()}, signature).inputs
    assert served.predict(inputs, ["predict"])["predict"].tolist() == model.predict(texts).tolist()


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_dates_have_the_unit_of_training(unit: str) -> None:
    days = ["2020-01-01", "2261-06-01" if unit == "ns" else "9999-12-31"]
    table = pd.DataFrame({"day": pd.Series(days).astype(f"datetime64[{unit}]")})
    model = make_pipeline(OrdinalEncoder(), DecisionTreeClassifier()).fit(table, [0, 1])
    served = SklearnModel(model)
    signature = Signature.model_validate(served.describe())
    inputs = v1.from_document({"instances": [{"day": day} for day in days]}, signature).inputs
    assert served.predict(inputs, ["predict"])["predict"].tolist() == [0, 1]
    with pytest.raises(InvalidInputError, match="without a time zone"):
        served.predict(v1.from_document({"instances": [{"day": "2020-01-01T00:00:00Z"}]}, signature).inputs, ["predict"])


def test_a_function_of_numbers_leaves_a_model_on_numbers() -> None:
    table = pd.DataFrame({"a": [1.0, 2, 3, 4], "b": [0.0, 1, 0, 1]})
    model = make_pipeline(FunctionTransformer(np.log1p), StandardScaler(), LogisticRegression()).fit(table, [0, 0, 1, 1])
    signature = Signature.model_validate(SklearnModel(model).describe())
    assert not signature.is_table
    assert signature.feature_names == ("a", "b")


def _odd(table: pd.DataFrame) -> pd.DataFrame:
    if not table["city"].isin(["Paris", "Lyon"]).all():
        raise TypeError("no city")
    return pd.DataFrame({"n": table["city"].str.len()})


def test_columns_that_nothing_tells_of_are_named_with_the_remedy() -> None:
    table = pd.DataFrame({"city": ["Paris", "Lyon", "Lyon", "Paris"]})
    model = make_pipeline(FunctionTransformer(_odd), LogisticRegression()).fit(table, [0, 1, 1, 0])
    served = SklearnModel(model)
    served.describe()
    with pytest.raises(InvalidInputError, match=r"no city.*what belongs into 'city'.*--example.*--signature"):
        served.predict({"input": np.array([[1.0]])}, ["predict"])
    shown = examples.shown_columns({"instances": [{"city": "Paris"}]})
    assert shown is not None
    completed = SklearnModel(model, shown.model_dump(mode="json"))
    signature = Signature.model_validate(completed.describe())
    inputs = v1.from_document({"instances": [{"city": "Lyon"}]}, signature).inputs
    assert completed.predict(inputs, ["predict"])["predict"].tolist() == [1]


def _dropping(table: pd.DataFrame) -> tuple[Any, SklearnModel, Signature]:
    columns = ColumnTransformer([("n", StandardScaler(), ["income"]), ("m", SimpleImputer(), ["age"])])
    model = make_pipeline(columns, LogisticRegression()).fit(table, [0, 1, 1, 0])
    first = SklearnModel(model).describe()
    served = SklearnModel(model, first)
    assert served.describe() == first
    return model, served, Signature.model_validate(first)


def _answer(served: SklearnModel, request: InferRequest) -> Any:
    return served.predict(request.inputs, ["predict_proba"])["predict_proba"]


def test_values_without_names_may_be_in_the_order_of_the_whole_training_table() -> None:
    table = pd.DataFrame({"name": ["a", "b", "c", "d"], "age": [1.0, np.nan, 3, 4], "id": [7, 8, 9, 10], "income": [5.0, 6, 7, 9]})
    model, served, signature = _dropping(table)
    assert (signature.training_columns, signature.ignored_columns) == (("name", "age", "id", "income"), ("name", "id"))
    assert [spec.name for spec in signature.inputs] == ["age", "income"]
    expected = model.predict_proba(table)
    whole = [[None if value != value else value for value in row] for row in table.to_numpy(dtype=object).tolist()]
    used = [[row[1], row[3]] for row in whole]
    for values in (whole, used):
        for form in ("instances", "inputs"):
            assert np.array_equal(_answer(served, v1.from_document({form: values}, signature)), expected)
        for columns in (None, list(range(len(values[0])))):
            split = {"data": values} | ({} if columns is None else {"columns": columns})
            assert np.array_equal(_answer(served, tabular.from_document({"dataframe_split": split}, signature)), expected)
    text = table.to_csv(index=False, header=False).encode()
    assert np.array_equal(_answer(served, tabular.parse_csv(text, signature, header=False)), expected)
    assert np.array_equal(_answer(served, tabular.parse_csv(table.to_csv(index=False).encode(), signature)), expected)
    with pytest.raises(InvalidRequestError, match=r"instances\[0\] has 3 values"):
        v1.from_document({"instances": [[1, 2, 3]]}, signature)
    with pytest.raises(InvalidRequestError, match=r"instances\[1\] has 2 values"):
        v1.from_document({"instances": [whole[0], used[1]]}, signature)


def test_a_table_of_numbers_is_taken_as_a_matrix_too() -> None:
    table = pd.DataFrame({"age": [1.0, np.nan, 3, 4], "id": [7.0, 8, 9, 10], "income": [5.0, 6, 7, 9]})
    model, served, signature = _dropping(table)
    expected = model.predict_proba(table)
    for frame in (table, table[["age", "income"]]):
        file = io.BytesIO()
        np.save(file, frame.to_numpy())
        data = [None if value != value else value for value in frame.to_numpy().reshape(-1).tolist()]
        tensor = {"name": "input", "shape": list(frame.shape), "datatype": "FP64", "data": data}
        assert np.array_equal(_answer(served, tabular.parse_npy(file.getvalue(), signature)), expected)
        assert np.array_equal(_answer(served, v2.from_document({"inputs": [tensor]}, signature)), expected)
    with pytest.raises(InvalidRequestError, match="has 1 columns; the model takes 2, or the 3 of its training table"):
        v2.from_document({"inputs": [{"name": "input", "shape": [1, 1], "datatype": "FP64", "data": [1]}]}, signature)


def test_a_model_that_was_found_to_take_a_matrix_goes_on_taking_it() -> None:
    table = pd.DataFrame({"age": [1.0, 2, 3, 4], "id": [7.0, 8, 9, 10]})
    columns = ColumnTransformer([("n", StandardScaler(), ["age"])])
    model = make_pipeline(columns, LogisticRegression()).fit(table, [0, 1, 1, 0])
    served = SklearnModel(model, {"inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 2]}]})
    assert [spec["name"] for spec in served.describe()["inputs"]] == ["input"]
    assert np.array_equal(served.predict({"input": table.to_numpy()}, ["predict"])["predict"], model.predict(table))
