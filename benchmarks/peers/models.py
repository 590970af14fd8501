"""The models that every server is given: trained here, dumped with joblib, with the rows that they are asked about."""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

SCIKIT_LEARN = ("scikit-learn==1.9.1", "numpy==2.4.6", "joblib==1.5.3", "pandas==3.1.1")
"""What every server's environment holds: one model file for all of them."""

SLOW_MS = 5.0


@dataclass(frozen=True)
class TrainedModel:
    """A model's file, rows to ask about (numbers, or records of columns) and the right answers."""

    name: str
    path: Path
    rows: np.ndarray
    labels: list[int]


def train(folder: Path) -> dict[str, TrainedModel]:
    """Train all of them into ``folder``, as ``<name>.joblib``, each with ``<name>.example.json`` beside it.

    ``iris`` (1×4) costs tens of microseconds, ``cancer`` (1×30) a little more, ``boosted`` (300 trees over 30 features) about two
    milliseconds for one row or thirty. ``table`` is a pipeline over 10 columns of numbers and 10 of text.
    """
    iris_rows, iris_labels = load_iris(return_X_y=True)
    rows, labels = load_breast_cancer(return_X_y=True)
    return {
        "iris": _dump(folder, "iris", LogisticRegression(max_iter=1_000).fit(iris_rows, iris_labels), iris_rows),
        "cancer": _dump(folder, "cancer", linear(1.0), np.tile(rows, (2, 1))[:1_000]),
        "boosted": _dump(folder, "boosted", HistGradientBoostingClassifier(max_iter=300, random_state=0).fit(rows, labels), rows),
        "table": table(folder),
    }


def table(folder: Path) -> TrainedModel:
    """A logistic regression behind a scaler for 10 columns of numbers and a one-hot encoder for 10 columns of text."""
    rows, labels = load_breast_cancer(return_X_y=True)
    words = np.array([f"kind {number}" for number in range(8)])
    frame = pd.DataFrame({f"number {column}": rows[:, column] for column in range(10)})
    for column in range(10):
        ranks = rows[:, 10 + column].argsort().argsort()
        frame[f"text {column}"] = words[ranks * len(words) // len(ranks)]
    numbers, texts = list(frame.columns[:10]), list(frame.columns[10:])
    encoded = make_column_transformer((StandardScaler(), numbers), (OneHotEncoder(handle_unknown="ignore"), texts))
    return _dump(folder, "table", make_pipeline(encoded, LogisticRegression(max_iter=1_000)).fit(frame, labels), frame)


def another_version(folder: Path) -> Path:
    """A second version of ``cancer``."""
    return _dump(folder, "cancer-2", linear(0.5), load_breast_cancer(return_X_y=True)[0]).path


def slow(folder: Path) -> tuple[TrainedModel, float]:
    """A model that takes about ``SLOW_MS`` milliseconds for each row, alone or with others; with the milliseconds measured.

    It compares the row with every row it has seen, so batches make it no cheaper: what it can answer in a second is fixed.
    """
    kept = 100_000
    for _ in range(4):
        model = _neighbours(kept)
        took_ms = _row_ms(model)
        if 0.8 * SLOW_MS <= took_ms <= 1.2 * SLOW_MS:
            break
        kept = int(kept * SLOW_MS / took_ms)
    return _dump(folder, "slow", model, load_breast_cancer(return_X_y=True)[0]), took_ms


def linear(strength: float) -> object:
    """A scaled logistic regression on the breast-cancer data."""
    rows, labels = load_breast_cancer(return_X_y=True)
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1_000)).fit(rows, labels)


def _neighbours(kept: int) -> KNeighborsClassifier:
    rows, labels = load_breast_cancer(return_X_y=True)
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, len(rows), kept)
    noisy = rows[chosen] * generator.normal(1.0, 0.05, (kept, rows.shape[1]))
    return KNeighborsClassifier(5, algorithm="brute", metric="manhattan", n_jobs=1).fit(noisy, labels[chosen])


def _row_ms(model: KNeighborsClassifier) -> float:
    rows = load_breast_cancer(return_X_y=True)[0][:8]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        model.predict(rows)
        times.append((time.perf_counter() - began) * 1_000 / len(rows))
    return statistics.median(times)


def _dump(folder: Path, name: str, model: object, rows: "np.ndarray | pd.DataFrame") -> TrainedModel:
    path = folder / f"{name}.joblib"
    joblib.dump(model, path)
    labels = [int(label) for label in model.predict(rows)]  # type: ignore[attr-defined]
    if isinstance(rows, pd.DataFrame):
        rows = np.array(rows.to_dict("records"))
    path.with_suffix(".example.json").write_text(json.dumps({"instances": rows[:1].tolist()}))
    return TrainedModel(name, path, rows, labels)
