"""Everything Millrace raises on purpose.

MillraceError
├── TransientError          broker, store or timeout: retry with back-off, do not commit · 503
├── InvalidMessage          a message that can never be handled: dead-letter it, commit · 422
├── InvalidArgumentError    a request that can never succeed as it is · 400
├── UnauthenticatedError    no or unknown credentials · 401
├── NotFoundError           the thing named does not exist · 404
├── ConflictError           the thing's state does not allow it · 409
├── PayloadTooLargeError    over a stated limit · 413
├── OverloadedError         no room now · 429
├── NotReadyError           exists, cannot serve yet · 503
├── DeadlineExceededError   the caller's time is over · 504
└── ConfigurationError      refuse to start
"""

from http import HTTPStatus
from typing import ClassVar


class MillraceError(Exception):
    """Root of the tree; the message is one sentence that names the thing and the offending value.

    ``retryable`` says whether the same attempt may succeed later; ``http_status`` is what an HTTP door answers.
    """

    retryable: ClassVar[bool] = False
    http_status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class TransientError(MillraceError):
    """Broker, store or timeout: the same attempt may succeed later."""

    retryable = True
    http_status = HTTPStatus.SERVICE_UNAVAILABLE


class InvalidMessage(MillraceError):  # noqa: N818 - the name that consumers of messages use for it
    """A record that can never be handled; it goes to the dead-letter topic with this message as its cause."""

    http_status = HTTPStatus.UNPROCESSABLE_ENTITY


class InvalidArgumentError(MillraceError):
    """A request that can never succeed as it is."""

    http_status = HTTPStatus.BAD_REQUEST


class UnauthenticatedError(MillraceError):
    """No credentials, or unknown ones."""

    http_status = HTTPStatus.UNAUTHORIZED


class NotFoundError(MillraceError):
    """The thing named does not exist."""

    http_status = HTTPStatus.NOT_FOUND


class ConflictError(MillraceError):
    """The thing exists in a state that does not allow this."""

    http_status = HTTPStatus.CONFLICT


class PayloadTooLargeError(MillraceError):
    """Over a stated limit."""

    http_status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class OverloadedError(MillraceError):
    """No room now; the caller may come back."""

    retryable = True
    http_status = HTTPStatus.TOO_MANY_REQUESTS


class NotReadyError(MillraceError):
    """The thing exists and cannot serve yet."""

    retryable = True
    http_status = HTTPStatus.SERVICE_UNAVAILABLE


class DeadlineExceededError(MillraceError):
    """The caller's time is over."""

    http_status = HTTPStatus.GATEWAY_TIMEOUT


class ConfigurationError(MillraceError):
    """The process cannot start as it is configured."""
