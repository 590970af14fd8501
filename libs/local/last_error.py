"""What a process that ended had to say about it: found in the end of its log."""

import json
import re
from collections.abc import Iterator, Sequence

LONGEST = 300

_TRACEBACK = "Traceback (most recent call last):"
_RAISED = re.compile(r"[A-Za-z_][\w.]*(: .*)?$")
_LOGGED = re.compile(r"\b(INFO|WARN|WARNING|DEBUG|TRACE|ERROR|CRITICAL|FATAL)\b")
_BAD = frozenset({"ERROR", "CRITICAL", "FATAL"})
_SECRETS = (
    (re.compile(r"(://[^/\s:@]*):[^/\s@]+@"), r"\1:***@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    (re.compile(r"(?i)\b([\w-]*(?:secret|token|password|api_?key|access_?key)[\w-]*['\"]?\s*[=:]\s*)['\"]?[^\s'\",;]+"), r"\1***"),
)


def last_error(lines: Sequence[str], name: str) -> str:
    """The last line of the last exception, error or farewell in a log; empty when there is none. What looks like a secret is left out.

    Parameters
    ----------
    name
        Of the service: its farewell is ``name: a sentence``.

    Examples
    --------
    >>> last_error(["Traceback (most recent call last):", '  File "a.py", line 1, in f', "ValueError: no"], "registry")
    'ValueError: no'
    """
    found = ""
    for said in _errors(lines, name):
        found = said
    return _shown(found)


def _errors(lines: Sequence[str], name: str) -> Iterator[str]:
    in_traceback = False
    for line in lines:
        if line.startswith(_TRACEBACK):
            in_traceback = True
        elif in_traceback and line[:1].strip():
            in_traceback = False
            if _RAISED.match(line):
                yield line
        elif line.startswith("{"):
            yield from _of_json(line)
        elif line.startswith((f"{name}: ", "Fatal Python error: ", "Exception in thread ")) or _is_logged_as_bad(line):
            yield line


def _is_logged_as_bad(line: str) -> bool:
    level = _LOGGED.search(line[:80])
    return level is not None and level[1] in _BAD


def _of_json(line: str) -> Iterator[str]:
    try:
        document = json.loads(line)
    except json.JSONDecodeError:
        return
    if document.get("level") in _BAD:
        raised = [each for each in str(document.get("exception", "")).splitlines() if each.strip()]
        message = str(document.get("message", ""))
        yield f"{message}: {raised[-1].strip()}" if raised and raised[-1].strip() not in message else message


def _shown(text: str) -> str:
    text = " ".join(text.split())
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
