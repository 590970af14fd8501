"""What can go wrong between a request's body and a model's answer.

MillraceError
├── InvalidArgumentError
│   └── InvalidInputError    the request does not fit the model · 400
├── TransientError
│   └── RunnerGoneError      no runner at the address, or it went away before it answered · 503
├── DeadlineExceededError
│   └── RunnerHungError      the model was busy with the request for too long, and its runner ends · 504
├── ModelError               the model raised on a valid request · 500
└── RunnerStartError         the runner did not become ready
"""

from libs.errors import DeadlineExceededError, InvalidArgumentError, MillraceError, TransientError


class InvalidInputError(InvalidArgumentError):
    """The request does not fit the model; the message names the field, what is expected and what came.

    Attributes
    ----------
    exception
        The type of what the model raised, if it was the model that refused.
    line
        Where in the model's own code that came from, such as ``helpers.py:12``.
    """

    exception: str | None = None
    line: str | None = None


class RunnerGoneError(TransientError):
    """No runner at the address, or it went away before it answered; another one may answer."""


class RunnerHungError(DeadlineExceededError):
    """The model was busy with the request for longer than it may, and its runner ends itself; the same may happen to the next one."""


class ModelError(MillraceError):
    """The model raised on a valid request; the message has the type and text of what it raised.

    Attributes
    ----------
    exception
        The type alone, if it is known.
    line
        Where in the model's own code it came from, such as ``helpers.py:12``; None where it is a library's.
    """

    exception: str | None = None
    line: str | None = None


class RunnerStartError(MillraceError):
    """The runner did not become ready.

    Attributes
    ----------
    kind
        ``missing_module``, ``missing_name``, ``forbidden``, ``memory``, ``not_a_model``, ``unknown_format``, ``load_failed``, ``cage``,
        ``timeout``, ``exited`` or ``not_started``.
    module
        The module that is missing, for ``missing_module``.
    """

    def __init__(self, message: str, kind: str = "load_failed", module: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.module = module


def printable(text: object, limit: int = 600) -> str:
    """Return text that came from a model or a file as one that any log, event or answer can carry: one bounded line, valid Unicode."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in str(text)[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
