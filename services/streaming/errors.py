"""Errors of streaming.

TransientError
└── SessionLostError       what the log says of a transaction or a membership is doubtful: begin anew with new clients · 503
MillraceError
├── SupersededError        another process has this one's name in the group: this one must stop
└── InternalError          a bug, met over one record · 500
NotReadyError
└── NotAskedError          no runner could be asked, so nothing is known about the records · 503
"""

from libs.errors import MillraceError, NotReadyError, TransientError


class SessionLostError(TransientError):
    """A transaction or a membership of the group is in doubt; its clients are given up, and what was not committed is read again.

    ``is_too_large`` is true when the broker refused a record for its size: its limit is lower than ours.
    """

    def __init__(self, message: str, *, is_too_large: bool = False) -> None:
        super().__init__(message)
        self.is_too_large = is_too_large


class SupersededError(MillraceError):
    """Another process runs under the same ``KAFKA_GROUP_INSTANCE`` and has taken over; two of them need two names."""


class InternalError(MillraceError):
    """A bug, met over one record, which fails; its traceback is in the log. Any record may come from anybody: none may stop the others."""


class NotAskedError(NotReadyError):
    """No runner could be asked at this moment, so nothing is known about the records that it should have been asked."""
