"""Why the registry refuses a command."""

from libs.errors import MillraceError
from schemas.registry import RefusalKind


class RefusedError(MillraceError):
    """A command that was understood and is not carried out; the message says why."""

    def __init__(self, kind: RefusalKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def not_found(message: str) -> RefusedError:
    """The command names something that does not exist."""
    return RefusedError(RefusalKind.NOT_FOUND, message)


def conflict(message: str) -> RefusedError:
    """What the command names is in a state that does not allow it."""
    return RefusedError(RefusalKind.CONFLICT, message)


def invalid(message: str) -> RefusedError:
    """The command contradicts itself."""
    return RefusedError(RefusalKind.INVALID, message)
