"""Ray Serve by itself: its own HTTP proxy and ``@serve.batch``, one replica a model. ``ray_serve.py MODELS PORT``"""

import logging
import signal
import sys
from pathlib import Path

import joblib
import numpy as np
import ray
from ray import serve


@serve.deployment(max_ongoing_requests=1024, logging_config={"enable_access_log": False})
class SklearnModel:
    def __init__(self, path: str) -> None:
        self.estimator = joblib.load(path)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.001)
    async def predict(self, rows: list[np.ndarray]) -> list[list[int]]:
        answers = self.estimator.predict(np.concatenate(rows))
        return [part.tolist() for part in np.split(answers, np.cumsum([len(each) for each in rows])[:-1])]

    async def __call__(self, request):
        body = await request.json()
        return {"predictions": await self.predict(np.array(body["instances"]))}


if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, object_store_memory=200 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])}, logging_config={"enable_access_log": False})
    for path in Path(sys.argv[1]).glob("*.joblib"):
        serve.run(SklearnModel.bind(str(path)), name=path.stem, route_prefix=f"/{path.stem}")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
