"""What a check is, and all checks by id."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx

from tests.conformance.subject import Subject

OIP = "Open Inference Protocol, REST"
GRPC = "Open Inference Protocol, gRPC"
BINARY = "Binary Tensor Data Extension"
REPOSITORY = "Model Repository Extension"
STATISTICS = "Statistics Extension"
V1 = "V1 Inference Protocol"
HTTP = "HTTP (RFC 9110)"
GROUPS = (OIP, BINARY, REPOSITORY, STATISTICS, HTTP, GRPC, V1)
"""Specifications, in the order of the table."""


class Level(StrEnum):
    """Whether a specification demands something or advises it."""

    MUST = "MUST"
    SHOULD = "SHOULD"


class Outcome(StrEnum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


class NotApplicable(Exception):
    """The check has nothing to try out on this server or model; the message says why."""


class Failed(Exception):
    """The server does not do what the check's sentence says; the message says what it does."""


@dataclass(frozen=True)
class Check:
    """One sentence, where it comes from, and how it is tried out: ``run`` returns, or raises ``Failed`` or ``NotApplicable``.

    ``group`` is the specification, ``section`` the place in it.
    """

    id: str
    level: Level
    group: str
    section: str
    sentence: str
    run: Callable[[Subject], None]


@dataclass(frozen=True)
class Result:
    """What came of one check, with the reason if it did not pass."""

    check: Check
    outcome: Outcome
    reason: str = ""


CHECKS: dict[str, Check] = {}


def check(id: str, level: Level, group: str, section: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:  # noqa: A002
    """Register a function as a check; its docstring is the sentence."""

    def register(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        assert id not in CHECKS, id
        CHECKS[id] = Check(id, level, group, section, (run.__doc__ or "").strip(), run)
        return run

    return register


def run_all(subject: Subject, checks: Iterable[Check]) -> list[Result]:
    """Try all of them out, one after the other."""
    return [_run(subject, one) for one in checks]


def _run(subject: Subject, one: Check) -> Result:
    try:
        one.run(subject)
    except NotApplicable as reason:
        return Result(one, Outcome.NOT_APPLICABLE, str(reason))
    except Failed as reason:
        return Result(one, Outcome.FAILED, str(reason))
    except httpx.TransportError as error:
        return Result(one, Outcome.FAILED, f"no answer: {type(error).__name__}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return Result(one, Outcome.FAILED, f"the answer has another form: {type(error).__name__} {error}"[:200])
    return Result(one, Outcome.PASSED)


def expect(condition: Any, otherwise: str) -> None:
    """Raise ``Failed`` unless the condition holds."""
    if not condition:
        raise Failed(otherwise[:300])


def expect_ok(answer: httpx.Response) -> httpx.Response:
    """Raise ``Failed`` unless the answer is a 200."""
    expect(answer.status_code == 200, f"answers {answer.status_code}: {_short(answer)}")
    return answer


def expect_refusal(answer: httpx.Response) -> None:
    """Raise ``Failed`` unless the answer is an error with the object that both protocols have for it."""
    expect(answer.status_code >= 400, f"answers {answer.status_code}: {_short(answer)}")
    try:
        body = answer.json()
    except ValueError:
        raise Failed(f"answers {answer.status_code} with no JSON: {_short(answer)}") from None
    expect(
        isinstance(body, dict) and isinstance(body.get("error"), str),
        f"answers {answer.status_code} with no object that has an 'error' string: {_short(answer)}",
    )


def _short(answer: httpx.Response) -> str:
    text = " ".join(answer.content[:160].decode("utf-8", "replace").split())
    return text or "an empty body"
