"""Errors of the gateway, beside the shared ones.

MillraceError
├── ForbiddenError          known, or local, and not allowed · 403
├── MethodNotAllowedError   the path exists, the method does not · 405
└── InternalError           a bug; what happened is in the log · 500
"""

from collections.abc import Sequence
from http import HTTPStatus

from libs.errors import MillraceError


class ForbiddenError(MillraceError):
    """The caller is known, or local, and this is not allowed."""

    http_status = HTTPStatus.FORBIDDEN


class MethodNotAllowedError(MillraceError):
    """The path exists and does not take this method; ``allowed`` are the methods it takes."""

    http_status = HTTPStatus.METHOD_NOT_ALLOWED

    def __init__(self, message: str, allowed: Sequence[str]) -> None:
        super().__init__(message)
        self.allowed = tuple(allowed)


class InternalError(MillraceError):
    """What a caller is told of a bug."""
