"""Status codes of gRPC, and which one each of our errors is.

References
----------
gRPC, "Status codes and their use in gRPC".
"""

from enum import IntEnum

from libs.errors import (
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    InvalidMessage,
    MillraceError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
    TransientError,
    UnauthenticatedError,
)
from services.gateway.errors import ClientGoneError, ForbiddenError, MethodNotAllowedError


class Status(IntEnum):
    """A call's end, as gRPC numbers it."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class UnimplementedError(MillraceError):
    """The method, or what the request wants of it, does not exist here."""


STATUSES: dict[type[MillraceError], Status] = {
    InvalidArgumentError: Status.INVALID_ARGUMENT,
    InvalidMessage: Status.INVALID_ARGUMENT,
    UnauthenticatedError: Status.UNAUTHENTICATED,
    ForbiddenError: Status.PERMISSION_DENIED,
    NotFoundError: Status.NOT_FOUND,
    ConflictError: Status.FAILED_PRECONDITION,
    PayloadTooLargeError: Status.RESOURCE_EXHAUSTED,
    OverloadedError: Status.RESOURCE_EXHAUSTED,
    NotReadyError: Status.UNAVAILABLE,
    TransientError: Status.UNAVAILABLE,
    DeadlineExceededError: Status.DEADLINE_EXCEEDED,
    ClientGoneError: Status.CANCELLED,
    MethodNotAllowedError: Status.UNIMPLEMENTED,
    UnimplementedError: Status.UNIMPLEMENTED,
    MillraceError: Status.INTERNAL,
}
"""A class that is not here has the status of its nearest ancestor that is."""


def status_of(error: MillraceError) -> Status:
    """The status that tells an error.

    >>> status_of(NotFoundError("there is no endpoint 'iris'")).name
    'NOT_FOUND'
    """
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
