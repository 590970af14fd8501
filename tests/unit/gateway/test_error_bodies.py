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
