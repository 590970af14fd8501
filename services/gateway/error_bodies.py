"""What an error is in HTTP: its status, and a body in the form that the clients of its path know.

Vertex AI's clients read a ``google.rpc.Status``, those of SageMaker and MLflow ``{"error_code", "message"}`` and the header
``x-amzn-ErrorType``, all others ``{"error": "…"}``.

References
----------
``google/rpc/status.proto`` and ``google/rpc/code.proto``; SageMaker Runtime API, ``InvokeEndpoint``, "Errors"; MLflow
``databricks.proto``, ``ErrorCode``.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from libs.errors import MillraceError
from libs.inference.errors import ModelError
from libs.inference.routing import NothingDeployedError
from services.gateway.errors import MethodNotAllowedError, v2_message
from services.gateway.exchange import Outgoing, json_answer

_GOOGLE_CODES: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: "UNAUTHENTICATED",
    HTTPStatus.FORBIDDEN: "PERMISSION_DENIED",
    HTTPStatus.NOT_FOUND: "NOT_FOUND",
    HTTPStatus.METHOD_NOT_ALLOWED: "UNIMPLEMENTED",
    HTTPStatus.REQUEST_TIMEOUT: "DEADLINE_EXCEEDED",
    HTTPStatus.CONFLICT: "ABORTED",
    HTTPStatus.TOO_MANY_REQUESTS: "RESOURCE_EXHAUSTED",
    HTTPStatus.INTERNAL_SERVER_ERROR: "INTERNAL",
    HTTPStatus.NOT_IMPLEMENTED: "UNIMPLEMENTED",
    HTTPStatus.SERVICE_UNAVAILABLE: "UNAVAILABLE",
    HTTPStatus.GATEWAY_TIMEOUT: "DEADLINE_EXCEEDED",
}

_MLFLOW_CODES: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: "UNAUTHENTICATED",
    HTTPStatus.FORBIDDEN: "PERMISSION_DENIED",
    HTTPStatus.NOT_FOUND: "RESOURCE_DOES_NOT_EXIST",
    HTTPStatus.REQUEST_TIMEOUT: "DEADLINE_EXCEEDED",
    HTTPStatus.CONFLICT: "RESOURCE_CONFLICT",
    HTTPStatus.TOO_MANY_REQUESTS: "REQUEST_LIMIT_EXCEEDED",
    HTTPStatus.SERVICE_UNAVAILABLE: "TEMPORARILY_UNAVAILABLE",
    HTTPStatus.GATEWAY_TIMEOUT: "DEADLINE_EXCEEDED",
}

_SAGEMAKER_TYPES: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: "AccessDeniedException",
    HTTPStatus.FORBIDDEN: "AccessDeniedException",
    HTTPStatus.TOO_MANY_REQUESTS: "ThrottlingException",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailable",
    HTTPStatus.GATEWAY_TIMEOUT: "ModelError",
}


_SCORING = frozenset({"invocations", "endpoints", "ping", "health", "version"})
"""First segments of the paths of SageMaker and MLflow."""


def error_answer(error: MillraceError, path: bytes | str) -> Outgoing:
    """The answer that tells an error.

    Parameters
    ----------
    path
        The request's path as it came, still percent-encoded.
    """
    status = int(error.http_status)
    headers = tuple(_headers(error, status))
    segments = _segments(path)
    message = v2_message(error) if segments[0] == "v2" else error.message
    message = message if message.isascii() else message.encode("utf-8", "replace").decode()
    if _is_google(segments):
        if isinstance(error, NothingDeployedError):
            return json_answer(_google(message, 400, "FAILED_PRECONDITION"), 400)
        return json_answer(_google(message, status), status, headers)
    if _is_scoring(segments):
        return json_answer(_mlflow(message, status), status, (*headers, (b"x-amzn-errortype", _sagemaker_type(error, status).encode())))
    return json_answer({"error": message}, status, headers)


def _headers(error: MillraceError, status: int) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = []
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    if error.retryable:
        headers.append((b"retry-after", b"1"))
    return headers


def _segments(path: bytes | str) -> list[str]:
    """The first segments of a path, decoded each for itself."""
    text = path.decode("latin-1") if isinstance(path, bytes) else path
    return [unquote(segment) for segment in text.split("?", 1)[0].split("/", 5)[1:5]] or [""]


def _is_google(segments: list[str]) -> bool:
    return len(segments) >= 2 and segments[0] in ("v1", "v1beta1", "ui") and segments[1] == "projects"


def _is_scoring(segments: list[str]) -> bool:
    return segments[0] in _SCORING or segments[:3] == ["api", "2.0", "endpoints"]


def _google(message: str, status: int, code: str = "") -> dict[str, Any]:
    code = code or _GOOGLE_CODES.get(status, "INVALID_ARGUMENT" if status < 500 else "UNKNOWN")
    return {"error": {"code": status, "message": message, "status": code}}


def _mlflow(message: str, status: int) -> dict[str, str]:
    return {"error_code": _MLFLOW_CODES.get(status, "BAD_REQUEST" if status < 500 else "INTERNAL_ERROR"), "message": message}


def _sagemaker_type(error: MillraceError, status: int) -> str:
    if isinstance(error, ModelError):
        return "ModelError"
    return _SAGEMAKER_TYPES.get(status, "ValidationError" if status < 500 else "InternalFailure")
