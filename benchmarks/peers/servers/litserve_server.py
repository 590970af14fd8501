"""LitServe with batching and its ZeroMQ queue, one worker a model. ``litserve_server.py MODELS PORT``"""

import sys
from pathlib import Path

import joblib
import litserve
import numpy as np


class SklearnApi(litserve.LitAPI):
    path: Path

    def setup(self, device):  # noqa: ARG002
        self.estimator = joblib.load(self.path)

    def decode_request(self, request):
        return np.array(request["instances"])

    def batch(self, inputs):
        self.sizes = [len(rows) for rows in inputs]
        return np.concatenate(inputs)

    def predict(self, rows):
        return self.estimator.predict(rows)

    def unbatch(self, output):
        return np.split(output, np.cumsum(self.sizes)[:-1])

    def encode_response(self, output):
        return {"predictions": output.tolist()}


def api(path):
    made = SklearnApi(max_batch_size=64, batch_timeout=0.0005, api_path=f"/{path.stem}")
    made.path = path
    return made


if __name__ == "__main__":
    apis = [api(path) for path in Path(sys.argv[1]).glob("*.joblib")]
    server = litserve.LitServer(apis, accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
