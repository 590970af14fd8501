"""A BentoML service; each model is a method. The folder of the models is in ``MODELS``."""

import os
from pathlib import Path

import bentoml
import joblib
import numpy as np

MODELS = Path(os.environ["MODELS"])


@bentoml.service(workers=1, traffic={"timeout": 30, "max_concurrency": 1024}, logging={"access": {"enabled": False}})
class Service:
    def __init__(self) -> None:
        self.models = {path.stem: joblib.load(path) for path in MODELS.glob("*.joblib")}

    @bentoml.api(route="/iris")
    def iris(self, instances: np.ndarray) -> np.ndarray:
        return self.models["iris"].predict(instances)

    @bentoml.api(route="/cancer")
    def cancer(self, instances: np.ndarray) -> np.ndarray:
        return self.models["cancer"].predict(instances)

    @bentoml.api(route="/boosted")
    def boosted(self, instances: np.ndarray) -> np.ndarray:
        return self.models["boosted"].predict(instances)
