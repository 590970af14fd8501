"""Errors of the gateway, beside the shared ones.

MillraceError
├── ForbiddenError          known, or local, and not allowed · 403
├── MethodNotAllowedError   the path exists, the method does not · 405
├── NotAcceptableError      none of the forms that the caller accepts is known · 406
├── UnsupportedMediaTypeError a body of a type that is not taken here · 415
├── ClientGoneError         nobody is left to be told
├── RunnersLostError        a request has cost two runners; it is not tried again · 503
├── DoubtfulWriteError      a record may have been written, or not · 503
├── LogUnavailableError     an endpoint's log must be complete and cannot be written · 503
└── InternalError           a bug; what happened is in the log · 500
"""

from collections.abc import Sequence
from http import HTTPStatus

from libs.errors import MillraceError, NotReadyError, TransientError
from libs.inference.routing import UnknownEndpointError


def v2_message(error: MillraceError) -> str:
    """What V2 says of an error: of an endpoint that does not exist it begins as Triton's does, by which its clients know it."""
    return f"Request for unknown model: {error.message}" if isinstance(error, UnknownEndpointError) else error.message


class ForbiddenError(MillraceError):
    """The caller is known, or local, and this is not allowed."""

    http_status = HTTPStatus.FORBIDDEN


class MethodNotAllowedError(MillraceError):
    """The path exists and does not take this method; ``allowed`` are the methods it takes."""

    http_status = HTTPStatus.METHOD_NOT_ALLOWED

    def __init__(self, message: str, allowed: Sequence[str]) -> None:
        super().__init__(message)
        self.allowed = tuple(allowed)


class NotAcceptableError(MillraceError):
    """None of the forms that the caller accepts is one that answers are given in."""

    http_status = HTTPStatus.NOT_ACCEPTABLE


class UnsupportedMediaTypeError(MillraceError):
    """A body of a content type, or in a character set, that is not taken here."""

    http_status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class InternalError(MillraceError):
    """What a caller is told of a bug."""


class ClientGoneError(MillraceError):
    """The client went away before it was answered; nobody is told."""


class RunnersLostError(MillraceError):
    """A request has cost two runners; it may well cost the next one, so nobody shall send it again."""

    http_status = HTTPStatus.SERVICE_UNAVAILABLE


class DoubtfulWriteError(TransientError):
    """The broker was sent a record and did not say that it has it: it may have been written."""


class LogUnavailableError(NotReadyError):
    """The endpoint requires its prediction log, which cannot be written at the moment."""
