"""KServe's model server with scikit-learn models, as its own scikit-learn runtime writes them. ``kserve_server.py MODELS --http_port …``"""

import sys
from pathlib import Path

import joblib
from kserve import Model, ModelServer
from kserve.utils.utils import get_predict_input, get_predict_response


class SklearnModel(Model):
    def __init__(self, name, estimator):
        super().__init__(name)
        self.estimator = estimator
        self.ready = True

    def predict(self, payload, headers=None):  # noqa: ARG002
        return get_predict_response(payload, self.estimator.predict(get_predict_input(payload)), self.name)


if __name__ == "__main__":
    ModelServer().start([SklearnModel(path.stem, joblib.load(path)) for path in Path(sys.argv.pop(1)).glob("*.joblib")])
