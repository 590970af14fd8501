"""The models: kinds that public bug reports name, each with the table it was trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier

Rows = pd.DataFrame


@dataclass(frozen=True)
class Case:
    """A fitted model and rows to ask it for.

    Attributes
    ----------
    as_dicts
        Whether the model takes a list of objects instead of a DataFrame.
    """

    name: str
    model: Any
    rows: Rows
    as_dicts: bool = False

    def expected(self) -> list[Any]:
        """The local answer."""
        table: Any = self.rows.to_dict("records") if self.as_dicts else self.rows
        if not self.as_dicts and not hasattr(self.model, "feature_names_in_"):
            table = self.rows.to_numpy()
        return list(np.asarray(self.model.predict(table)).tolist())


def _table(n: int = 160) -> Rows:
    r = np.random.default_rng(3)
    table = pd.DataFrame(
        {
            "age": r.integers(18, 80, n).astype(float),
            "income": r.normal(50, 12, n).round(1),
            "city": r.choice(["Paris", "Köln", "東京"], n),
            "plan": r.choice(["free", "pro"], n),
            "active": r.choice([True, False], n),
            "zip": r.choice(["00501", "10115", "75001"], n),
        }
    )
    table.loc[::17, "age"] = np.nan
    return table


def _label(table: Rows) -> Any:
    return np.where((table.income > 50) ^ (table.plan == "pro"), "stays", "leaves")


def _numeric() -> Case:
    x, y = load_iris(as_frame=True, return_X_y=True)
    return Case("numbers with names", DecisionTreeClassifier(random_state=0).fit(x, y), x.iloc[[0, 60, 149]])


def _array() -> Case:
    x, y = load_iris(return_X_y=True)
    return Case("numbers without names", LogisticRegression(max_iter=500).fit(x, y), pd.DataFrame(x[[0, 60, 149]], columns=list("abcd")))


def _mixed() -> Case:
    table = _table()
    numbers, texts = ["age", "income"], ["city", "plan", "zip"]
    columns = ColumnTransformer(
        [("n", SimpleImputer(), numbers), ("t", OneHotEncoder(handle_unknown="ignore"), texts), ("b", "passthrough", ["active"])]
    )
    return Case(
        "numbers, text and booleans", make_pipeline(columns, LogisticRegression(max_iter=500)).fit(table, _label(table)), table[15:21]
    )


def _dropped() -> Case:
    table = _table()
    columns = ColumnTransformer([("t", OrdinalEncoder(), ["plan"]), ("n", StandardScaler(), ["income"])])
    return Case(
        "columns that are dropped", make_pipeline(columns, DecisionTreeClassifier(random_state=0)).fit(table, _label(table)), table[:4]
    )


def _pandas_output() -> Case:
    x, y = load_iris(as_frame=True, return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).set_output(transform="pandas").fit(x, y)
    return Case("set_output('pandas')", model, x.iloc[[0, 60, 149]])


def _categories() -> Case:
    table = _table()[["income", "city", "plan"]].astype({"city": "category", "plan": "category"})
    model = HistGradientBoostingClassifier(categorical_features="from_dtype", max_iter=20, random_state=0).fit(table, _label(table))
    return Case("category dtype (HistGradientBoosting)", model, table[:5])


def _words() -> Case:
    r = np.random.default_rng(5)
    words = np.array(["slow", "fast", "broken", "great", "late", "kind"])
    table = pd.DataFrame({"text": [" ".join(r.choice(words, 4)) for _ in range(120)], "stars": r.integers(1, 6, 120).astype(float)})
    label = (table.stars > 3) | table.text.str.contains("great")
    columns = ColumnTransformer([("w", TfidfVectorizer(), "text"), ("n", StandardScaler(), ["stars"])])
    return Case("Tfidf inside a ColumnTransformer", make_pipeline(columns, LogisticRegression()).fit(table, label.astype(int)), table[:5])


def _dicts() -> Case:
    table = _table()[["income", "city", "plan"]]
    model = make_pipeline(DictVectorizer(), LogisticRegression(max_iter=500)).fit(table.to_dict("records"), _label(table))
    return Case("DictVectorizer", model, table[:5], as_dicts=True)


CASES: tuple[Callable[[], Case], ...] = (_array, _numeric, _mixed, _dropped, _pandas_output, _categories, _words, _dicts)
