"""KServe's model server with scikit-learn models that say what they take and give. ``kserve_server.py MODELS --http_port …``"""

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

    def get_input_types(self):
        return [{"name": "input-0", "datatype": "FP64", "shape": [-1, self.estimator.n_features_in_]}]

    def get_output_types(self):
        return [{"name": "output-0", "datatype": "INT64", "shape": [-1]}]

    def predict(self, payload, headers=None):
        return get_predict_response(payload, self.estimator.predict(get_predict_input(payload)), self.name)


if __name__ == "__main__":
    ModelServer().start([SklearnModel(path.stem, joblib.load(path)) for path in Path(sys.argv.pop(1)).glob("*.joblib")])
