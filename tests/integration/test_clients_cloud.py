"""The clients of Google, Amazon and MLflow, unmodified, against a real gateway."""

import asyncio
import json
import os
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.environments import Environment, built
from schemas.inference import Signature, TensorSpec
from tests.unit.gateway import conftest
from tests.unit.gateway.conftest import World, make_world

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

CLIENTS = Environment(
    "cloud-clients",
    ("google-cloud-aiplatform==2.7.0", "boto3==1.44.5", "mlflow-skinny==3.17.2", "pandas==3.1.1", "numpy==2.4.6", "scipy==1.17.1"),
)
KEY = "correct-horse-battery"
COUNTS = Signature(
    inputs=(TensorSpec(name="input", datatype="INT64", shape=(-1, 2)),),
    outputs=(TensorSpec(name="predict", datatype="INT64", shape=(-1,)),),
    feature_names=("a", "b"),
)


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has the clients."""
    return built(CLIENTS)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Endpoint ``cancer`` adds 0.5 to the sum of two floats, ``counts`` takes whole numbers by name; a key is needed."""
    async with make_world(tmp_path, api_keys=f"ops:{KEY}") as made:
        made.http.headers["authorization"] = f"Bearer {KEY}"
        await made.deployed(0.5)
        monkeypatch.setattr(conftest, "SIGNATURE", COUNTS)
        await made.deployed(0.0, model="counts", endpoint="counts")
        yield made


async def run(python: Path, world: World, script: str) -> dict[str, Any]:
    """What a script leaves in ``out``; it finds the gateway's address in ``url`` and its key in ``key``."""
    source = f"import json, sys\nurl, key = sys.argv[1:]\nout = {{}}\n{textwrap.dedent(script)}\nprint(json.dumps(out))"
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        python, "-W", "ignore", "-c", source, str(world.http.base_url).rstrip("/"), KEY,
        env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(120):
            told, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()[-4000:]
    return dict(json.loads(told.splitlines()[-1]))


ERRORS = """
    def told(call):
        try:
            call()
        except Exception as error:
            return [type(error).__name__, getattr(error, "code", None), str(error)]
"""


async def test_google_s_generated_client_predicts_over_rest(python: Path, world: World) -> None:
    out = await run(
        python,
        world,
        ERRORS
        + """
    from google.api import httpbody_pb2
    from google.cloud import aiplatform_v1, aiplatform_v1beta1
    from google.oauth2.credentials import Credentials

    def client(module):
        options = {"api_endpoint": url}
        return module.PredictionServiceClient(transport="rest", client_options=options, credentials=Credentials(token=key))

    def keyed(api_key):
        return aiplatform_v1.PredictionServiceClient(transport="rest", client_options={"api_endpoint": url, "api_key": api_key})

    parent = "projects/acme/locations/us-central1/endpoints/"
    for name, module in (("v1", aiplatform_v1), ("v1beta1", aiplatform_v1beta1)):
        answer = client(module).predict(endpoint=parent + "cancer", instances=[[1, 2], [3, 4.25]])
        out[name] = [list(answer.predictions), answer.deployed_model_id, answer.model, answer.model_display_name, answer.model_version_id]
    google = client(aiplatform_v1)
    out["counts"] = list(google.predict(endpoint=parent + "counts", instances=[{"b": 2, "a": 1}]).predictions)
    answer = keyed(key).predict(endpoint=parent + "cancer", instances=[[1, 2]], parameters={"outputs": ["predict"]})
    out["api_key"] = list(answer.predictions)
    for name, content_type, data in (("raw_json", "application/json", b'{"instances": [[1, 2]]}'), ("raw_csv", "text/csv", b"1,2")):
        body = httpbody_pb2.HttpBody(content_type=content_type, data=data)
        answer = google.raw_predict(endpoint=parent + "cancer", http_body=body)
        out[name] = [answer.content_type, answer.data.decode()]
    out["not_whole"] = told(lambda: google.predict(endpoint=parent + "counts", instances=[[1.5, 2]]))
    out["empty"] = told(lambda: google.predict(endpoint=parent + "cancer", instances=[]))
    out["unknown"] = told(lambda: google.predict(endpoint=parent + "nowhere", instances=[[1, 2]]))
    out["stranger"] = told(lambda: keyed("wrong").predict(endpoint=parent + "cancer", instances=[[1, 2]]))
    out["explain"] = told(lambda: google.explain(endpoint=parent + "cancer", instances=[[1, 2]]))
    """,
    )
    model = "projects/acme/locations/us-central1/models/cancer"
    for name in ("v1", "v1beta1"):
        assert out[name] == [[3.5, 7.75], "cancer.cancer.1", model, "cancer", "1"]
    assert (out["counts"], out["api_key"]) == ([3.0], [3.5])
    for name in ("raw_json", "raw_csv"):
        assert out[name] == ["application/json", '{"predictions":[3.5]}']
    assert out["not_whole"][:2] == ["BadRequest", 400]
    assert "1.5" in out["not_whole"][2]
    assert out["empty"][:2] == ["BadRequest", 400]
    assert out["unknown"][:2] == ["NotFound", 404]
    assert "there is no endpoint 'nowhere'" in out["unknown"][2]
    assert out["stranger"][:2] == ["Unauthorized", 401]
    assert out["explain"][1] in (404, 405)


async def test_google_s_sdk_predicts_with_an_endpoint_object(python: Path, world: World) -> None:
    out = await run(
        python,
        world,
        """
    import requests
    from google.cloud import aiplatform
    from google.oauth2.credentials import Credentials

    aiplatform.init(
        project="acme", location="us-central1", api_endpoint=url, api_transport="rest", credentials=Credentials(token=key)
    )
    endpoint = aiplatform.Endpoint("cancer")
    answer = endpoint.predict([[1, 2], [3, 4.25]])
    out["predict"] = [answer.predictions, answer.deployed_model_id, answer.model_resource_name, answer.model_version_id]
    out["display_name"] = endpoint.display_name
    out["split"] = dict(endpoint.traffic_split)

    class Redirected(requests.adapters.HTTPAdapter):
        def send(self, request, **options):
            path = request.url.split("googleapis.com", 1)[1]
            request.url = url + path
            request.headers["authorization"] = f"Bearer {key}"
            return super().send(request, **options)

    endpoint.authorized_session = requests.Session()
    endpoint.authorized_session.mount("https://", Redirected())
    answer = endpoint.predict([[1, 2]], use_raw_predict=True)
    out["raw"] = [answer.predictions, answer.deployed_model_id, answer.model_resource_name, answer.model_version_id]
    """,
    )
    model = "projects/acme/locations/us-central1/models/cancer"
    assert out["predict"] == [[3.5, 7.75], "cancer.cancer.1", model, "1"]
    assert (out["display_name"], out["split"]) == ("cancer", {"cancer.cancer.1": 100})
    assert out["raw"] == [[3.5], "cancer.cancer.1", model, "1"]


async def test_amazon_s_client_invokes_endpoints(python: Path, world: World) -> None:
    out = await run(
        python,
        world,
        """
    import io
    import boto3
    import botocore.exceptions
    import numpy as np

    def client(access_key):
        return boto3.client(
            "sagemaker-runtime", endpoint_url=url, region_name="eu-west-1", aws_access_key_id=access_key, aws_secret_access_key="unused"
        )

    def invoke(content, name="cancer", access_key=key, **options):
        answer = client(access_key).invoke_endpoint(EndpointName=name, Body=content, **options)
        return [answer["Body"].read().decode("latin-1"), answer["ContentType"], answer["InvokedProductionVariant"]]

    def refused(*arguments, **options):
        try:
            invoke(*arguments, **options)
        except botocore.exceptions.ClientError as error:
            told = error.response["Error"]
            return [error.response["ResponseMetadata"]["HTTPStatusCode"], told["Code"], told["Message"]]

    rows = b'{"instances": [[1, 2], [3, 4.25]]}'
    array = io.BytesIO()
    np.save(array, np.array([[1, 2], [3, 4.25]]))
    out["json"] = invoke(rows, ContentType="application/json")
    out["untyped"] = invoke(rows)
    out["csv"] = invoke(b"1,2\\n3,4.25\\n", ContentType="text/csv", Accept="text/csv")
    out["npy"] = invoke(array.getvalue(), ContentType="application/x-npy")
    out["variant"] = invoke(rows, ContentType="application/json", TargetVariant="cancer.cancer.1", InferenceId="i", CustomAttributes="c=1")
    answer = client(key).invoke_endpoint(EndpointName="cancer", Body=rows, ContentType="application/json", Accept="application/x-npy")
    out["npy_answer"] = np.load(io.BytesIO(answer["Body"].read())).tolist()
    out["bad"] = refused(b'{"instances": [[1]]}', ContentType="application/json")
    out["unknown"] = refused(rows, "nowhere", ContentType="application/json")
    out["type"] = refused(rows, ContentType="application/xml")
    out["no_variant"] = refused(rows, ContentType="application/json", TargetVariant="7")
    out["stranger"] = refused(rows, access_key="AKIDEXAMPLE", ContentType="application/json")
    """,
    )
    for name in ("json", "untyped", "npy", "variant"):
        assert out[name] == ['{"predictions":[3.5,7.75]}', "application/json", "cancer.cancer.1"], name
    assert out["csv"] == ["3.5\n7.75\n", "text/csv", "cancer.cancer.1"]
    assert out["npy_answer"] == [3.5, 7.75]
    assert out["bad"][:2] == [400, "ValidationError"]
    assert "expects rows of 2 numbers" in out["bad"][2]
    assert out["unknown"] == [404, "ValidationError", "there is no endpoint 'nowhere'"]
    assert out["type"][:2] == [415, "ValidationError"]
    assert out["no_variant"][:2] == [404, "ValidationError"]
    assert out["stranger"] == [401, "AccessDeniedException", "the API key is not known here"]


async def test_mlflow_s_deployments_client_lists_and_predicts(python: Path, world: World) -> None:
    out = await run(
        python,
        world,
        ERRORS
        + """
    import os
    os.environ["MLFLOW_TRACKING_TOKEN"] = key
    from mlflow.deployments import get_deploy_client

    client = get_deploy_client(url)
    out["list"] = [[item.name, item.model.name, item.endpoint_url.removeprefix(url)] for item in client.list_endpoints()]
    out["get"] = client.get_endpoint("counts").name
    out["predict"] = client.predict(endpoint="counts", inputs={"dataframe_split": {"columns": ["b", "a"], "data": [[2, 1], [4, 3]]}})
    out["missing"] = told(lambda: client.predict(endpoint="counts", inputs={"dataframe_records": [{"a": 1}]}))
    """,
    )
    assert out["list"] == [[name, name, f"/endpoints/{name}/invocations"] for name in ("cancer", "counts")]
    assert (out["get"], out["predict"]) == ("counts", {"predictions": [3, 7]})
    assert "lacks the column 'b'" in out["missing"][2]


async def test_mlflow_s_scoring_client_invokes_the_default_endpoint(python: Path, tmp_path: Path) -> None:
    async with make_world(tmp_path, default_endpoint="cancer") as world:
        await world.deployed(0.5)
        await world.deployed(0.0, model="other", endpoint="other")
        out = await run(
            python,
            world,
            ERRORS
            + """
    import numpy as np
    import pandas as pd
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    client = ScoringServerClient("127.0.0.1", int(url.rsplit(":", 1)[1]))
    client.wait_server_ready()
    out["version"] = client.get_version()
    frame = pd.DataFrame({"x": [1.0, 3.0], "y": [2.0, 4.25]})
    out["frame"] = client.invoke(frame)
    out["array"] = client.invoke(frame.to_numpy()).get_predictions()[0].tolist()
    out["missing"] = client.invoke(pd.DataFrame({"x": [1.0], "y": [np.nan]}))
    client.url_prefix = url + "/endpoints/other"
    out["other"] = client.invoke(frame, params={"outputs": ["predict"]})
    out["bad"] = told(lambda: client.invoke(pd.DataFrame({"x": [1.0]})))
    """,
        )
    assert out["version"]
    assert (out["frame"], out["array"]) == ({"predictions": [3.5, 7.75]}, [3.5, 7.75])
    assert (out["missing"], out["other"]) == ({"predictions": [None]}, {"predictions": [3.0, 7.25]})
    assert "BAD_REQUEST" in out["bad"][2]
