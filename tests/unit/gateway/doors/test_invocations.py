"""The scoring door of SageMaker and MLflow, as a function from a request to an answer."""

import gzip
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.errors import InvalidArgumentError, MillraceError, NotFoundError, NotReadyError, PayloadTooLargeError
from libs.inference.errors import InvalidInputError
from libs.inference.requests import InferResponse
from libs.inference.routing import Route
from schemas.inference import Signature, TensorSpec
from schemas.registry import EndpointSnapshot, ModelSnapshot
from services.gateway.catalog import Catalog
from services.gateway.doors import invocations
from services.gateway.errors import NotAcceptableError, UnsupportedMediaTypeError
from services.gateway.exchange import Incoming, Outgoing
from services.gateway.health import Health
from services.gateway.predictions import Ask, Prediction, Protocol, Target
from tests.unit.gateway.conftest import NOW, deployment, endpoint

SIGNATURE = Signature(
    inputs=(TensorSpec(name="input", datatype="FP64", shape=(-1, 2)),),
    outputs=(
        TensorSpec(name="predict", datatype="FP64", shape=(-1,)),
        TensorSpec(name="predict_proba", datatype="FP64", shape=(-1, 2)),
        TensorSpec(name="label", datatype="BYTES", shape=(-1,)),
    ),
    feature_names=("a", "b"),
)
ROUTE = Route("e", "e.m.1", "m", 1, SIGNATURE, ())
ANSWER = {
    "predict": np.array([3.0, 7.5]),
    "predict_proba": np.array([[0.25, 0.75], [1.0, 0.0]]),
    "label": np.array([b"yes", b"no"], dtype=object),
}
MAX_BYTES = 10_000


def catalog_of(*snapshots: Any) -> Catalog:
    catalog = Catalog()
    for snapshot in snapshots:
        catalog._put(snapshot)
    return catalog


@pytest.fixture
def catalog() -> Catalog:
    """One endpoint with two versions, one of them with an alias."""
    aliases = ModelSnapshot(model_name="m", latest_version=2, aliases={"prod": 2}, created_at=NOW, updated_at=NOW)
    return catalog_of(
        endpoint("e.m.1", "e.m.2", **{"e.m.1": 90, "e.m.2": 10}), deployment("e.m.1"), deployment("e.m.2", version=2), aliases
    )


def ask(
    catalog: Catalog, body: bytes = b"", path: str = "/endpoints/{endpoint}/invocations", default: str | None = None, **headers: str
) -> Ask:
    read = invocations.reads(catalog, default, MAX_BYTES)["POST", path]
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return read(Incoming({"endpoint": "e"} if "{" in path else {}, named, body))


def answer(asked: Ask) -> tuple[list, Outgoing]:
    """The rows that reach the model, and the answer to them."""
    request = asked.parse(SIGNATURE)
    names = request.outputs or ("predict",)
    outgoing = asked.write(Prediction(ROUTE, request, InferResponse({name: ANSWER[name] for name in names})))
    return request.inputs["input"].tolist(), outgoing


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


BODIES = {
    "application/json": b'{"instances": [[1, 2], [3, 4.5]]}',
    "application/json; charset=utf-8": b'{"dataframe_split": {"columns": ["b", "a"], "data": [[2, 1], [4.5, 3]]}}',
    "application/json;charset=UTF-8": b'{"dataframe_records": [{"b": 2, "a": 1}, {"b": 4.5, "a": 3}]}',
    "Application/JSON": b'{"inputs": [[1, 2], [3, 4.5]]}',
    "text/csv": b"1,2\n3,4.5\n",
    "text/csv; header=present": b"b,a\n2,1\n4.5,3\n",
    "application/x-npy": npy(np.array([[1, 2], [3, 4.5]])),
}


@pytest.mark.parametrize("content_type", BODIES)
def test_the_content_type_says_what_the_body_is(catalog, content_type):
    rows, outgoing = answer(ask(catalog, BODIES[content_type], content_type=content_type))
    assert rows == [[1, 2], [3, 4.5]]
    assert (outgoing.status, outgoing.media_type) == (200, b"application/json")
    assert json.loads(outgoing.body) == {"predictions": [3.0, 7.5]}
    assert dict(outgoing.headers) == {b"x-millrace-model-version": b"m@1", b"x-amzn-invoked-production-variant": b"e.m.1"}


@pytest.mark.parametrize("content_type", [None, "", "application/octet-stream"])
@pytest.mark.parametrize(
    "body", [BODIES["application/json"], b"\n  " + BODIES["application/json"], BODIES["text/csv"], npy(np.ones((1, 2)))]
)
def test_without_a_telling_content_type_the_content_tells(catalog, content_type, body):
    headers = {} if content_type is None else {"content_type": content_type}
    assert answer(ask(catalog, body, **headers))[1].status == 200


@pytest.mark.parametrize("content_type", ["application/xml", "text/plain", "application/json; charset=utf-16", "text/csv;charset=latin-1"])
def test_other_content_types_are_refused(catalog, content_type):
    with pytest.raises(UnsupportedMediaTypeError):
        answer(ask(catalog, b"{}", content_type=content_type))


@pytest.mark.parametrize(
    ("accept", "media_type", "body"),
    [
        ("*/*", b"application/json", b'{"predictions":[3.0,7.5]}'),
        ("", b"application/json", b'{"predictions":[3.0,7.5]}'),
        ("text/csv", b"text/csv", b"3.0\n7.5\n"),
        ("application/json;q=0.5, text/csv", b"text/csv", b"3.0\n7.5\n"),
        ("application/xml, text/*;q=0.1", b"text/csv", b"3.0\n7.5\n"),
        ("application/x-npy", b"application/x-npy", npy(ANSWER["predict"])),
    ],
)
def test_accept_says_what_the_answer_is(catalog, accept, media_type, body):
    outgoing = answer(ask(catalog, b"1,2", content_type="text/csv", accept=accept))[1]
    assert (outgoing.media_type, outgoing.body) == (media_type, body)


@pytest.mark.parametrize("accept", ["application/xml", "application/json;q=0", "text/csv;q=soon", ";;;,"])
def test_what_no_form_satisfies_is_not_acceptable(catalog, accept):
    with pytest.raises(NotAcceptableError):
        ask(catalog, b"1,2", accept=accept)


def test_params_name_the_outputs_wanted(catalog):
    body = json.dumps({"instances": [[1, 2], [3, 4]], "params": {"outputs": ["predict", "predict_proba"]}}).encode()
    assert json.loads(answer(ask(catalog, body))[1].body)["predictions"][0] == {"predict": 3.0, "predict_proba": [0.25, 0.75]}
    assert answer(ask(catalog, body, accept="text/csv"))[1].body == b"3.0,0.25,0.75\n7.5,1.0,0.0\n"


def test_a_form_that_cannot_hold_the_answer_is_refused_before_the_model_is_asked(catalog):
    body = json.dumps({"instances": [[1, 2]], "params": {"outputs": ["label"]}}).encode()
    with pytest.raises(InvalidInputError, match="text"):
        ask(catalog, body, accept="application/x-npy").parse(SIGNATURE)


def test_bodies_may_be_compressed_and_answers_are_when_they_are_long(catalog):
    body = json.dumps({"instances": [[1, 2], [3, 4.5]]}).encode()
    assert answer(ask(catalog, gzip.compress(body), content_encoding="gzip"))[0] == [[1, 2], [3, 4.5]]
    with pytest.raises(PayloadTooLargeError):
        answer(ask(catalog, gzip.compress(b" " * 100_000), content_encoding="gzip"))
    asked = ask(catalog, body, accept_encoding="gzip")
    long = asked.write(Prediction(ROUTE, asked.parse(SIGNATURE), InferResponse({"predict": np.arange(1000.0)})))
    assert len(json.loads(gzip.decompress(long.body))["predictions"]) == 1000


@pytest.mark.parametrize("body", [b"", b"{", b'{"rows": []}', b"1,2,3", b"\x93NUMPY", b"a,b\n"])
def test_a_bad_body_is_the_callers_fault(catalog, body):
    with pytest.raises(InvalidArgumentError):
        answer(ask(catalog, body))


def test_a_header_parameter_has_two_values(catalog):
    with pytest.raises(InvalidArgumentError, match="'present' or 'absent'"):
        answer(ask(catalog, b"1,2", content_type="text/csv; header=yes"))


@pytest.mark.parametrize(
    ("variant", "target"),
    [("2", Target("e", version=2)), ("prod", Target("e", alias="prod")), ("e.m.1", Target("e", version=1))],
)
def test_a_variant_is_a_version_an_alias_or_a_deployment(catalog, variant, target):
    assert ask(catalog, b"1,2", x_amzn_sagemaker_target_variant=variant).target == target


def test_an_unknown_variant_is_not_found(catalog):
    for variant in ("e.m.3", "x.m.1", "AllTraffic"):
        with pytest.raises(NotFoundError, match="no version, alias or deployment"):
            ask(catalog, b"1,2", x_amzn_sagemaker_target_variant=variant)
    with pytest.raises(InvalidArgumentError, match="Target-Model"):
        ask(catalog, b"1,2", x_amzn_sagemaker_target_model="m.tar.gz")


def test_a_deployment_whose_version_another_model_has_too_must_be_named_otherwise():
    catalog = catalog_of(endpoint("e.m.1", "e.n.1"), deployment("e.m.1"), deployment("e.n.1", model="n"))
    with pytest.raises(InvalidArgumentError, match="several models"):
        ask(catalog, b"1,2", x_amzn_sagemaker_target_variant="e.n.1")


def test_without_a_name_the_request_is_for_the_only_endpoint_or_the_default_one(catalog):
    assert ask(catalog, b"1,2", "/invocations").target == Target("e")
    assert ask(catalog, b"1,2", "/invocations", default="other").target == Target("other")
    assert ask(catalog, b"1,2").protocol is Protocol.INVOCATIONS
    catalog._put(EndpointSnapshot(endpoint_name="f", created_at=NOW, updated_at=NOW))
    with pytest.raises(InvalidArgumentError, match=r"/endpoints/\{name\}/invocations"):
        ask(catalog, b"1,2", "/invocations")
    with pytest.raises(NotFoundError, match="no endpoint yet"):
        ask(Catalog(), b"1,2", "/invocations")


def test_the_time_a_caller_gives_is_kept(catalog):
    assert ask(catalog, b"1,2", x_request_timeout_ms="250").timeout_ms == 250
    assert ask(catalog, b"1,2").timeout_ms is None


async def test_ping_follows_the_gateways_health(catalog):
    health = Health()
    handlers = invocations.handlers(catalog, health)
    for path in ("/ping", "/health"):
        with pytest.raises(NotReadyError):
            await handlers["GET", path](Incoming({}, {}))
    health.caught_up = True
    assert (await handlers["GET", "/ping"](Incoming({}, {}))).status == 200
    assert (await handlers["GET", "/version"](Incoming({}, {}))).body


async def test_mlflow_s_deployments_client_sees_endpoints(catalog):
    handlers = invocations.handlers(catalog, Health())
    shown = {
        "name": "e",
        "endpoint_type": "predict",
        "model": {"name": "m", "provider": "millrace"},
        "endpoint_url": "/endpoints/e/invocations",
        "limit": None,
    }
    assert json.loads((await handlers["GET", "/api/2.0/endpoints/"](Incoming({}, {}))).body) == {"endpoints": [shown]}
    assert json.loads((await handlers["GET", "/api/2.0/endpoints/{endpoint}"](Incoming({"endpoint": "e"}, {}))).body) == shown
    with pytest.raises(NotFoundError):
        await handlers["GET", "/api/2.0/endpoints/{endpoint}"](Incoming({"endpoint": "x"}, {}))


HEADERS = st.dictionaries(
    st.sampled_from(
        ["content_type", "accept", "content_encoding", "accept_encoding", "x_request_timeout_ms", "x_amzn_sagemaker_target_variant"]
    ),
    st.one_of(
        st.sampled_from([*BODIES, "gzip", "*/*", "1", "text/csv;header=absent", "a;q=2"]),
        st.text(st.characters(max_codepoint=127), max_size=30),
    ),
)


@settings(max_examples=300, deadline=None)
@given(HEADERS, st.one_of(st.sampled_from([*BODIES.values()]), st.binary(max_size=60)))
def test_no_request_does_anything_else_than_fit_or_be_the_callers_fault(headers, body):
    catalog = catalog_of(endpoint("e.m.1", **{"e.m.1": 100}), deployment("e.m.1"))
    try:
        answer(ask(catalog, body, **headers))
    except MillraceError as error:
        status = int(error.http_status)
    else:
        status = 200
    assert status in (200, 400, 404, 406, 413, 415)
