"""The door of Vertex AI, as a function from a request to an answer."""

import base64
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.errors import InvalidArgumentError, MillraceError, NotFoundError, PayloadTooLargeError
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferResponse
from libs.inference.routing import Route
from schemas.inference import Signature, TensorSpec
from services.gateway.catalog import Catalog
from services.gateway.doors import vertex
from services.gateway.errors import NotAcceptableError, UnsupportedMediaTypeError
from services.gateway.exchange import Incoming, Outgoing
from services.gateway.predictions import Ask, Prediction, Protocol, Target
from services.gateway.routes import find
from tests.unit.gateway.conftest import deployment, endpoint

PREDICT = "/v1/projects/{project}/locations/{location}/endpoints/{endpoint}:predict"
RAW = "/v1/projects/{project}/locations/{location}/endpoints/{endpoint}:rawPredict"
ENDPOINT = "/v1/projects/{project}/locations/{location}/endpoints/{endpoint}"
PLACE = {"project": "acme", "location": "us-central1", "endpoint": "e"}
MODEL = "projects/acme/locations/us-central1/models/m"
MAX_BYTES = 10_000


def signature(datatype: str = "FP64", shape: tuple[int, ...] = (-1, 2)) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="input", datatype=datatype, shape=shape),),
        outputs=(
            TensorSpec(name="predict", datatype="FP64", shape=(-1,)),
            TensorSpec(name="predict_proba", datatype="FP64", shape=(-1, 2)),
        ),
        feature_names=("a", "b"),
    )


ANSWER = {"predict": np.array([3.0, 7.5]), "predict_proba": np.array([[0.25, 0.75], [1.0, 0.0]])}


def ask(path: str, body: bytes, **headers: str) -> Ask:
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return vertex.reads(MAX_BYTES)["POST", path](Incoming(PLACE, named, body, request_id="r1"))


def answer(asked: Ask, of: Signature | None = None, outputs: dict | None = None) -> tuple[list, Outgoing]:
    """The rows that reach the model, and the answer to them."""
    of = of or signature()
    request = asked.parse(of)
    given = outputs or {name: ANSWER[name] for name in request.outputs or ("predict",)}
    return request.inputs["input"].tolist(), asked.write(Prediction(Route("e", "e.m.3", "m", 3, of, ()), request, InferResponse(given)))


def test_a_name_stands_for_all_targets():
    targets = ("predict", "predict_proba_0", "predict_proba_1")
    of = signature().model_copy(update={"outputs": tuple(TensorSpec(name=name, datatype="FP64", shape=(-1, 2)) for name in targets)})
    given = {f"predict_proba_{target}": np.array([[0.25, 0.75], [1.0, 0.0]]) + target for target in range(2)}
    expected = [[[0.25, 0.75], [1.25, 1.75]], [[1.0, 0.0], [2.0, 1.0]]]
    body = {"instances": [[1, 2], [3, 4]], "parameters": {"outputs": ["predict_proba"]}}
    for path in (PREDICT, RAW):
        _, outgoing = answer(ask(path, json.dumps(body).encode()), of, given)
        assert json.loads(outgoing.body)["predictions"] == expected
    frame = {"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2], [3, 4]]}, "params": {"outputs": ["predict_proba"]}}
    _, outgoing = answer(ask(RAW, json.dumps(frame).encode()), of, given)
    assert json.loads(outgoing.body)["predictions"] == expected
    _, table = answer(ask(RAW, json.dumps(body).encode(), accept="text/csv"), of, given)
    assert table.body == b"0.25,0.75,1.25,1.75\n1.0,0.0,2.0,1.0\n"
    tensor = {"name": "input", "datatype": "FP64", "shape": [1, 2], "data": [1, 2]}
    asked = ask(RAW, json.dumps({"inputs": [tensor], "outputs": [{"name": "predict_proba"}]}).encode())
    with pytest.raises(InvalidInputError, match="no output 'predict_proba'; it has predict, predict_proba_0, predict_proba_1"):
        asked.parse(of)


def predict(**content: object) -> bytes:
    return json.dumps(content).encode()


def test_an_answer_names_who_gave_it():
    rows, outgoing = answer(ask(PREDICT, predict(instances=[[1, 2], [3, 4.5]])))
    assert rows == [[1, 2], [3, 4.5]]
    assert json.loads(outgoing.body) == {
        "predictions": [3.0, 7.5],
        "deployedModelId": "e.m.3",
        "model": MODEL,
        "modelDisplayName": "m",
        "modelVersionId": "3",
    }
    assert (b"x-millrace-model-version", b"m@3") in outgoing.headers


def test_instances_may_be_objects_and_parameters_name_outputs():
    body = predict(instances=[{"b": 2, "a": 1}, {"a": 3, "b": 4.5}], parameters={"outputs": ["predict_proba"], "unknown": 1})
    rows, outgoing = answer(ask(PREDICT, body))
    assert rows == [[1, 2], [3, 4.5]]
    assert json.loads(outgoing.body)["predictions"] == [[0.25, 0.75], [1.0, 0.0]]
    assert answer(ask(PREDICT, predict(instances=[[1, 2]], parameters=None)))[0] == [[1, 2]]


def test_floats_that_are_whole_reach_a_model_of_integers_exactly():
    big = 2.0**53
    request = ask(PREDICT, predict(instances=[[1.0, big]])).parse(signature("INT64"))
    assert request.inputs["input"].dtype == np.int64
    assert request.inputs["input"].tolist() == [[1, 2**53]]
    for wrong in (1.5, 1e300):
        with pytest.raises(InvalidInputError):
            ask(PREDICT, predict(instances=[[1.0, wrong]])).parse(signature("INT64"))


def test_nan_and_infinity_are_null_and_predictions_always_a_list():
    outgoing = answer(ask(PREDICT, predict(instances=[[1, 2]])), outputs={"predict": np.array([np.nan, np.inf, 1e300])})[1]
    assert json.loads(outgoing.body)["predictions"] == [None, None, 1e300]
    outgoing = answer(ask(PREDICT, predict(instances=[[1, 2]])), outputs={"a": np.zeros(2), "b": np.zeros(3)})[1]
    assert json.loads(outgoing.body)["predictions"] == [{"a": [0, 0], "b": [0, 0, 0]}]
    outgoing = answer(ask(PREDICT, predict(instances=[[1, 2]])), outputs={"a": np.array(1.5)})[1]
    assert json.loads(outgoing.body)["predictions"] == [1.5]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"instances": []}', b'{"instances": [[1, 2, 3]]}', b'{"inputs": [[1, 2]]}', b'{"instances": [[NaN, 1]]}'],
)
def test_a_bad_body_is_the_callers_fault(body):
    with pytest.raises(InvalidArgumentError):
        answer(ask(PREDICT, body))


def test_bodies_and_answers_may_be_compressed():
    body = gzip.compress(predict(instances=[[1, 2]]))
    asked = ask(PREDICT, body, content_encoding="gzip", accept_encoding="gzip")
    outgoing = answer(asked, outputs={"predict": np.arange(1000.0)})[1]
    assert len(json.loads(gzip.decompress(outgoing.body))["predictions"]) == 1000
    for path in (PREDICT, RAW):
        with pytest.raises(PayloadTooLargeError):
            answer(ask(path, gzip.compress(b" " * 100_000), content_encoding="gzip"))


V2 = predict(inputs=[{"name": "input", "shape": [2, 2], "datatype": "FP64", "data": [1, 2, 3, 4.5]}])
RAW_BODIES = {
    "V1": predict(instances=[[1, 2], [3, 4.5]]),
    "V2": V2,
    "V2 that asks for bytes": V2[:-1] + b', "parameters": {"binary_data_output": true}}',
    "inputs": predict(inputs=[[1, 2], [3, 4.5]]),
    "split": predict(dataframe_split={"columns": ["b", "a"], "data": [[2, 1], [4.5, 3]]}),
    "records": predict(dataframe_records=[{"b": 2, "a": 1}, {"b": 4.5, "a": 3}]),
    "CSV": b"b,a\n2,1\n4.5,3\n",
}


@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "application/x-www-form-urlencoded", "text/plain"])
@pytest.mark.parametrize("form", RAW_BODIES)
def test_a_raw_body_is_told_by_its_content(form, content_type):
    headers = {} if content_type is None else {"content_type": content_type}
    rows, outgoing = answer(ask(RAW, RAW_BODIES[form], **headers))
    assert rows == [[1, 2], [3, 4.5]]
    body = json.loads(outgoing.body)
    if form.startswith("V2"):
        assert (body["model_name"], body["model_version"], body["id"]) == ("e", "3", "r1")
        assert body["outputs"] == [
            {"name": "predict", "datatype": "FP64", "shape": [2], "data": [3.0, 7.5]},
            {"name": "predict_proba", "datatype": "FP64", "shape": [2, 2], "data": [0.25, 0.75, 1.0, 0.0]},
        ]
    else:
        assert body == {"predictions": [3.0, 7.5]}


@pytest.mark.parametrize(
    ("path", "content_type"),
    [(PREDICT, "application/octet-stream"), (PREDICT, "application/x-npy"), *[(path, "Image/PNG; q=1") for path in (PREDICT, RAW)]],
)
def test_a_body_that_is_plainly_something_else_is_refused(path, content_type):
    with pytest.raises(UnsupportedMediaTypeError, match=content_type.split(";", maxsplit=1)[0].lower()):
        ask(path, predict(instances=[[1, 2]]), content_type=content_type)


def test_a_raw_answer_says_in_its_head_who_gave_it_and_is_what_was_accepted():
    outgoing = answer(ask(RAW, RAW_BODIES["CSV"], content_type="text/csv", accept="text/csv"))[1]
    assert (outgoing.media_type, outgoing.body) == (b"text/csv", b"3.0\n7.5\n")
    assert dict(outgoing.headers) == {
        b"x-millrace-model-version": b"m@3",
        b"x-vertex-ai-endpoint-id": b"e",
        b"x-vertex-ai-deployed-model-id": b"e.m.3",
        b"x-vertex-ai-model": MODEL.encode(),
        b"x-vertex-ai-model-version-id": b"3",
    }
    with pytest.raises(NotAcceptableError):
        ask(RAW, RAW_BODIES["CSV"], accept="application/xml")


def test_google_s_http_body_is_unwrapped_and_the_answer_wrapped():
    for content_type, content in (("application/json", RAW_BODIES["V1"]), ("text/csv", RAW_BODIES["CSV"]), ("", V2)):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            data = encode(content).decode().rstrip("=")
            wrapped = predict(httpBody={"contentType": content_type, "data": data})
            rows, outgoing = answer(ask(RAW, wrapped, content_type="application/json"))
            assert rows == [[1, 2], [3, 4.5]]
            answered = json.loads(outgoing.body)
            assert answered["contentType"] == "application/json"
            assert json.loads(base64.b64decode(answered["data"]))
            assert b"x-vertex-ai-model" in dict(outgoing.headers)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        predict(httpBody=3),
        predict(httpBody={"data": 3}),
        predict(httpBody={"data": "!!"}),
        predict(httpBody={"contentType": "text/csv"}),
        predict(httpBody={"contentType": 3, "data": ""}),
        predict(httpBody={"data": base64.b64encode(predict(httpBody={"data": ""})).decode()}),
        predict(inputs=[{"datatype": "FP64"}]),
        b"a,b,c\n1,2,3\n",
        b"\x93NUMPY",
    ],
)
def test_a_bad_raw_body_is_the_callers_fault(body):
    with pytest.raises(InvalidArgumentError):
        answer(ask(RAW, body))


def test_both_bases_and_any_project_and_location_lead_to_the_endpoint():
    for base in ("/v1", "/v1beta1"):
        for path in ("/projects/123/locations/europe-west4/endpoints/e", "/projects/acme.com:p/locations/here/endpoints/e"):
            found = find("POST", f"{base}{path}:predict")
            assert found.error is None
            assert found.route is not None
            asked = vertex.reads(MAX_BYTES)["POST", found.route.template](Incoming(found.parameters, {}, b"{}"))
            assert (asked.target, asked.protocol) == (Target("e"), Protocol.VERTEX)
            assert find("GET", f"{base}{path}").error is None
    assert find("GET", "/v1/projects/p/locations/l/endpoints/e:predict").error.http_status == 405
    assert find("POST", "/v1/projects/p/locations/l/endpoints/e:explain").error.http_status in (404, 405)
    for wrong in ("/v1/projects/a%0ab/locations/l/endpoints/e:predict", "/v1/projects/p/locations/%2e/endpoints/e:predict"):
        assert find("POST", wrong).error.http_status == 400


async def test_google_s_sdk_can_read_the_endpoint():
    catalog = Catalog()
    for snapshot in (endpoint("e.m.1", **{"e.m.1": 100}), deployment("e.m.1")):
        catalog._put(snapshot)
    show = vertex.handlers(catalog)["GET", ENDPOINT]
    shown = json.loads((await show(Incoming(PLACE, {}))).body)
    assert shown["name"] == "projects/acme/locations/us-central1/endpoints/e"
    assert shown["createTime"] == "2026-01-01T00:00:00.000000Z"
    assert shown["trafficSplit"] == {"e.m.1": 100}
    assert [(model["id"], model["model"], model["modelVersionId"]) for model in shown["deployedModels"]] == [("e.m.1", MODEL, "1")]
    with pytest.raises(NotFoundError):
        await show(Incoming({**PLACE, "endpoint": "x"}, {}))


WRAPPED = st.builds(
    lambda content_type, data: predict(httpBody={"contentType": content_type, "data": base64.b64encode(data).decode()}),
    st.sampled_from(["application/json", "text/csv", "", "text/csv; header=absent", "application/json; charset=x"]),
    st.one_of(st.sampled_from([*RAW_BODIES.values()]), st.binary(max_size=40)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([PREDICT, RAW]),
    st.one_of(WRAPPED, st.sampled_from([*RAW_BODIES.values()]), st.binary(max_size=60)),
    st.sampled_from(["application/json", "text/csv", "application/x-npy", "", "x", "text/csv; header=yes"]),
    st.sampled_from(["", "*/*", "text/csv", "application/x-npy", "x"]),
)
def test_no_request_does_anything_else_than_fit_or_be_the_callers_fault(path, body, content_type, accept):
    try:
        answer(ask(path, body, content_type=content_type, accept=accept))
    except MillraceError as error:
        status = int(error.http_status)
    else:
        status = 200
    assert status in (200, 400, 406, 413, 415)
