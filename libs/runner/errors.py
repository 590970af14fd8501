"""What can go wrong in a runner, in the kinds that cross the socket and the ready line."""

from __future__ import annotations

import os
import re
import sys
import traceback

MAX_MESSAGE_CHARACTERS = 500

_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class InvalidInputError(Exception):
    """The request's tensors do not fit the model; the caller's fault."""


class LoadError(Exception):
    """The artifact cannot become a model.

    Attributes
    ----------
    kind
        ``missing_module``, ``missing_name``, ``forbidden``, ``memory``, ``not_a_model``, ``unknown_format``,
        ``timeout`` or ``load_failed``.
    module
        The module that is missing, if that is what happened.
    """

    def __init__(self, kind: str, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.module = module

    def to_dict(self) -> dict[str, str | None]:
        return {"kind": self.kind, "message": self.message, "module": self.module}


def describe_exception(error: object, most: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Return an exception's text as one bounded line; a model's exception may have a ``__str__`` that raises."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 (the text is the model's code)
        text = "(its text cannot be shown)"
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def first_sentence(error: object) -> str:
    """Return the first sentence of an exception's text, without its full stop; libraries like to give advice after it."""
    return _END_OF_SENTENCE.split(describe_exception(error), maxsplit=1)[0].rstrip(".")


def own_line(error: BaseException, code: str | None = None) -> str | None:
    """Return the innermost line of the model's own code that an exception came through, such as ``helpers.py:12``.

    Its own are the files below ``code``, a folder, and what a pickle carried: files that are no library's. None if there is no such line.
    """
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = _own_name(frame.f_code.co_filename, code)
        if name is not None:
            found = f"{name}:{line}"
    return found


def _own_name(filename: str, code: str | None) -> str | None:
    if code is not None and _is_below(filename, code):
        return os.path.relpath(filename, code)
    libraries = [os.path.dirname(os.__file__), os.path.dirname(os.path.abspath(__file__)), *(entry for entry in sys.path if entry != code)]
    if not filename.endswith(".py") or any(entry and _is_below(filename, entry) for entry in libraries):
        return None
    return os.path.basename(filename)


def _is_below(filename: str, folder: str) -> bool:
    return filename.startswith(folder.rstrip(os.sep) + os.sep)
