"""FastAPI and joblib as a competent hand writes it, all in one process. ``fastapi_joblib.py MODELS PORT``

The model runs in the event loop: for models this quick a thread pool costs more than it gives.
"""

import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

MODELS = {path.stem: joblib.load(path) for path in Path(sys.argv[1]).glob("*.joblib")}
app = FastAPI()


class Instances(BaseModel):
    instances: list[list[float]]


class Predictions(BaseModel):
    predictions: list[int]


class Records(BaseModel):
    instances: list[dict[str, float | str]]


@app.post("/table:predict")
async def table(body: Records) -> Predictions:
    return Predictions(predictions=MODELS["table"].predict(pd.DataFrame(body.instances)).tolist())


@app.post("/{model}:predict")
async def predict(model: str, body: Instances) -> Predictions:
    return Predictions(predictions=MODELS[model].predict(np.array(body.instances)).tolist())


@app.post("/{model}:raw")
async def raw(model: str, request: Request) -> Response:
    estimator = MODELS[model]
    rows = np.frombuffer(await request.body()).reshape(-1, estimator.n_features_in_)
    return Response(estimator.predict(rows).tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), http="httptools", loop="uvloop", access_log=False, log_level="warning")
