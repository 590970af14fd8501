"""What a command can fail with; each message is the one sentence the user reads.

MillraceError
├── UsageError            the command line makes no sense · exit 2
├── PlatformUnreachableError   nobody answers at the gateway's address
├── RequestRefusedError        the gateway said no, and why
├── StageFailedError           a version or deployment came to a bad end
└── WaitTimeoutError           it may still happen, but we stopped waiting
"""

from typing import Any, ClassVar

from libs.errors import MillraceError


class CommandError(MillraceError):
    """A command did not do what was asked; ``exit_code`` is what the shell sees."""

    exit_code: ClassVar[int] = 1


class UsageError(CommandError):
    """The command line makes no sense."""

    exit_code = 2


class PlatformUnreachableError(CommandError):
    """Nobody answers at the gateway's address."""


class RequestRefusedError(CommandError):
    """The gateway said no; ``status`` is the HTTP status, the message its sentence."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StageFailedError(CommandError):
    """A version or a deployment came to a bad end; ``view`` is the last look at it, if there was one."""

    def __init__(self, message: str, view: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.view = view or {}


class WaitTimeoutError(CommandError):
    """What was waited for may still happen, but we stopped waiting."""
