"""Errors of messaging, beside the shared ones."""

from libs.errors import MillraceError


class FencedError(MillraceError):
    """Another instance with the same transactional id has taken over; this one must stop."""


class StoppingError(Exception):
    """The process is stopping, so what was begun is left undone: its offset stays uncommitted. Not an error of the platform."""


class BrokenClientError(MillraceError):
    """A client of the broker has ended for good; the process must start again."""
