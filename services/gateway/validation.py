"""Validation errors as one readable sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.base import ALIAS_PATTERN, NAME_PATTERN
from services.gateway.routes import ALIAS_RULE, NAME_RULE

_RULES = {NAME_PATTERN: NAME_RULE, ALIAS_PATTERN: ALIAS_RULE, r"^[0-9a-f]{64}$": "64 lower-case hexadecimal digits (SHA-256)"}
_SHOWN = 3


def sentence(problems: Sequence[Mapping[str, Any]]) -> str:
    """The first few problems, each with its place."""
    parts = [_one(problem) for problem in problems[:_SHOWN]]
    rest = len(problems) - _SHOWN
    return "; ".join(parts) + (f"; and {rest} more" if rest > 0 else "")


def _one(problem: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")) or "the body"
    value = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            return f"the field {place!r} is not known"
        case "missing":
            return f"{place!r} is missing" if place != "the body" else "the body is missing"
        case "string_pattern_mismatch" if problem["ctx"]["pattern"] in _RULES:
            return f"{place} {_shown(value)} is not valid: {_RULES[problem['ctx']['pattern']].rstrip('.')}"
        case _:
            message = str(problem["msg"]).removeprefix("Value error, ")
            return f"{place}: {message[:1].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
