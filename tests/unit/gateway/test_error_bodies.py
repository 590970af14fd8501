"""Errors speak the language of the path they happen on."""

import json

import pytest

from libs.errors import (
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    MillraceError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
    TransientError,
    UnauthenticatedError,
)
from libs.inference.errors import InvalidInputError, ModelError
from services.gateway.error_bodies import error_answer
from services.gateway.errors import ForbiddenError, InternalError, MethodNotAllowedError, NotAcceptableError, UnsupportedMediaTypeError

PLAIN = ("/v1/models/m:predict", "/v2/models/m/infer", "/", "", "*", "/nowhere", "/v1", "/v1/project", "/api/v1/endpoints", b"/\xff\xfe")
GOOGLE = (
    "/v1/projects/p/locations/l/endpoints/e:predict",
    b"/v1/projects/p/locations/l/endpoints/e:rawPredict?$alt=json",
    "/v1beta1/projects/p",
    "/ui/projects/p/locations/l/operations/1",
    "/v1/%70rojects/p/models/m",
)
SCORING = ("/invocations", b"/endpoints/e/invocations", "/ping", "/health", "/version", "/api/2.0/endpoints/", "/api/2.0/endpoints/e")


def answered(error: MillraceError, path: bytes | str) -> tuple[int, dict, dict[bytes, bytes]]:
    answer = error_answer(error, path)
    assert answer.media_type == b"application/json"
    return answer.status, json.loads(answer.body), dict(answer.headers)


@pytest.mark.parametrize("path", PLAIN)
def test_most_paths_get_a_plain_sentence(path):
    assert answered(NotFoundError("no such thing"), path) == (404, {"error": "no such thing"}, {})


@pytest.mark.parametrize("path", ["/v1/models/m:predict", "/v1/projects/p/locations/l/endpoints/e:predict", "/invocations"])
def test_a_message_with_half_a_character_is_told_all_the_same(path):
    _, body, _ = answered(NotFoundError("there is no 'é\ud800'"), path)
    assert "there is no 'é?'" in json.dumps(body, ensure_ascii=False)


@pytest.mark.parametrize("path", GOOGLE)
def test_vertex_paths_get_a_google_status(path):
    status, body, _ = answered(NotFoundError("no such thing"), path)
    assert (status, body) == (404, {"error": {"code": 404, "message": "no such thing", "status": "NOT_FOUND"}})


@pytest.mark.parametrize("path", SCORING)
def test_scoring_paths_get_what_both_mlflow_and_sagemaker_read(path):
    status, body, headers = answered(InvalidArgumentError("not so"), path)
    assert (status, body) == (400, {"error_code": "BAD_REQUEST", "message": "not so"})
    assert headers == {b"x-amzn-errortype": b"ValidationError"}


@pytest.mark.parametrize(
    ("error", "status", "google", "mlflow", "sagemaker"),
    [
        (InvalidInputError("x"), 400, "INVALID_ARGUMENT", "BAD_REQUEST", "ValidationError"),
        (UnauthenticatedError("x"), 401, "UNAUTHENTICATED", "UNAUTHENTICATED", "AccessDeniedException"),
        (ForbiddenError("x"), 403, "PERMISSION_DENIED", "PERMISSION_DENIED", "AccessDeniedException"),
        (NotFoundError("x"), 404, "NOT_FOUND", "RESOURCE_DOES_NOT_EXIST", "ValidationError"),
        (MethodNotAllowedError("x", ["GET"]), 405, "UNIMPLEMENTED", "BAD_REQUEST", "ValidationError"),
        (NotAcceptableError("x"), 406, "INVALID_ARGUMENT", "BAD_REQUEST", "ValidationError"),
        (ConflictError("x"), 409, "ABORTED", "RESOURCE_CONFLICT", "ValidationError"),
        (PayloadTooLargeError("x"), 413, "INVALID_ARGUMENT", "BAD_REQUEST", "ValidationError"),
        (UnsupportedMediaTypeError("x"), 415, "INVALID_ARGUMENT", "BAD_REQUEST", "ValidationError"),
        (OverloadedError("x"), 429, "RESOURCE_EXHAUSTED", "REQUEST_LIMIT_EXCEEDED", "ThrottlingException"),
        (InternalError("x"), 500, "INTERNAL", "INTERNAL_ERROR", "InternalFailure"),
        (ModelError("x"), 500, "INTERNAL", "INTERNAL_ERROR", "ModelError"),
        (NotReadyError("x"), 503, "UNAVAILABLE", "TEMPORARILY_UNAVAILABLE", "ServiceUnavailable"),
        (TransientError("x"), 503, "UNAVAILABLE", "TEMPORARILY_UNAVAILABLE", "ServiceUnavailable"),
        (DeadlineExceededError("x"), 504, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "ModelError"),
    ],
)
def test_every_kind_of_error_has_its_word_in_each_family(error, status, google, mlflow, sagemaker):
    told, body, headers = answered(error, GOOGLE[0])
    assert (told, body["error"]["code"], body["error"]["status"]) == (status, status, google)
    told, body, headers = answered(error, SCORING[1])
    assert (told, body["error_code"], headers[b"x-amzn-errortype"]) == (status, mlflow, sagemaker.encode())
    assert answered(error, PLAIN[0])[:2] == (status, {"error": "x"})


@pytest.mark.parametrize("path", [PLAIN[0], GOOGLE[0], SCORING[0]])
def test_the_headers_of_an_error_are_the_same_in_all_families(path):
    assert answered(UnauthenticatedError("x"), path)[2][b"www-authenticate"] == b"Bearer"
    assert answered(MethodNotAllowedError("x", ["GET", "POST"]), path)[2][b"allow"] == b"GET, POST"
    for error in (OverloadedError("x"), NotReadyError("x")):
        assert int(answered(error, path)[2][b"retry-after"]) >= 1
    assert b"retry-after" not in answered(ModelError("x"), path)[2]


VERTEX = "/v1/projects/p/locations/us-central1/endpoints/{}:{}"
STATUSES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 405: "UNIMPLEMENTED", 413: "INVALID_ARGUMENT", 500: "INTERNAL", 503: "UNAVAILABLE"}


async def test_every_refusal_on_vertex_s_paths_is_a_google_status(tmp_path, make):
    async with make(tmp_path, predict_max_bytes=10_000) as world:
        await world.deployed(0.0)
        await world.http.post("/api/v1/endpoints", json={"name": "empty"})
        rows = {"instances": [[1, 2]]}

        async def told(status: int, method: str, path: str, code: str = "", **arguments) -> None:
            answer = await world.http.request(method, path, **arguments)
            assert answer.status_code == status, answer.text
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()["error"]["code"] == status
            assert answer.json()["error"]["status"] == (code or STATUSES.get(status, "DEADLINE_EXCEEDED"))
            assert answer.json()["error"]["message"]

        for method in ("predict", "rawPredict"):
            path = VERTEX.format("cancer", method)
            assert (await world.http.post(path, json=rows, params={"$alt": "json;enum-encoding=int"})).status_code == 200
            await told(400, "POST", path, content=b"{")
            await told(400, "POST", path, json=rows, headers={"x-request-timeout-ms": "soon"})
            await told(404, "POST", VERTEX.format("nowhere", method), json=rows)
            await told(405, "GET", path)
            await told(405, "DELETE", path)
            await told(413, "POST", path, content=b" " * 10_001)
            await told(400, "POST", VERTEX.format("empty", method), "FAILED_PRECONDITION", json=rows)
        await told(404, "POST", "/v1/projects/p/locations/us-central1/publishers/google/models/m:predict", json=rows)
        await told(404, "GET", "/v1beta1/projects/p")
        world.runners[0].behave = lambda _: ("model_error", "it fell")
        await told(500, "POST", VERTEX.format("cancer", "predict"), json=rows)
        world.runners[0].behave = lambda _: "hang"
        await told(504, "POST", VERTEX.format("cancer", "predict"), json=rows, headers={"x-request-timeout-ms": "30"})


async def test_every_refusal_on_scoring_paths_is_read_by_mlflow_and_sagemaker(tmp_path, make):
    async with make(tmp_path, predict_max_bytes=10_000) as world:
        await world.deployed(0.0)
        headers = {"content-type": "text/csv"}
        assert (await world.http.post("/invocations", content=b"1,2", headers=headers)).json() == {"predictions": [3.0]}
        for status, method, path, arguments in (
            (400, "POST", "/invocations", {"content": b"1", "headers": headers}),
            (404, "POST", "/endpoints/nowhere/invocations", {"content": b"1,2", "headers": headers}),
            (404, "GET", "/api/2.0/endpoints/nowhere", {}),
            (405, "GET", "/invocations", {}),
            (406, "POST", "/invocations", {"content": b"1,2", "headers": {**headers, "accept": "image/png"}}),
            (413, "POST", "/invocations", {"content": b" " * 10_001}),
            (415, "POST", "/invocations", {"content": b"1,2", "headers": {"content-type": "image/png"}}),
        ):
            answer = await world.http.request(method, path, **arguments)
            assert answer.status_code == status, answer.text
            assert answer.json().keys() == {"error_code", "message"}
            assert answer.headers["x-amzn-errortype"] == "ValidationError"


async def test_strangers_are_told_in_the_words_of_the_path(tmp_path, make):
    async with make(tmp_path, api_keys="ops:correct-horse-battery") as world:
        answer = await world.http.post(VERTEX.format("cancer", "predict"), json={})
        assert (answer.status_code, answer.json()["error"]["status"], answer.headers["www-authenticate"]) == (
            401,
            "UNAUTHENTICATED",
            "Bearer",
        )
        answer = await world.http.post("/invocations", json={})
        assert (answer.status_code, answer.json()["error_code"], answer.headers["x-amzn-errortype"]) == (
            401,
            "UNAUTHENTICATED",
            "AccessDeniedException",
        )
        assert (await world.http.get("/ping")).status_code == 200
