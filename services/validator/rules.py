"""The rules by which artifacts are judged, with their versions, so that a verdict can be re-run.

A rule whose judgement changes gets a higher version; a rule that is gone keeps its name reserved.
"""

from typing import Any

from libs.inference.errors import printable
from schemas.validation import Finding, Severity

MAX_FINDINGS = 50
"""A hostile file can break a rule a million times."""

RULES = {
    "artifact.missing": 1,
    "artifact.empty": 1,
    "artifact.size": 1,
    "artifact.digest": 1,
    "artifact.expanded_size": 1,
    "artifact.broken": 1,
    "archive.entry": 1,
    "archive.model": 1,
    "code.forbidden": 1,
    "code.unreadable": 1,
    "format.unknown": 1,
    "format.contradiction": 1,
    "onnx.external_data": 2,
    "onnx.custom_operators": 1,
    "pickle.broken": 1,
    "pickle.forbidden_global": 2,
    "pickle.computed_global": 2,
    "pickle.extension_code": 1,
    "pickle.persistent_id": 1,
    "pickle.training_script": 2,
    "pickle.unknown_module": 2,
    "pickle.trailing_bytes": 1,
    "pickle.too_long": 1,
    "pickle.consented_code": 1,
    "requirements.invalid": 1,
    "requirements.missing": 1,
    "requirements.version_differs": 1,
    "requirements.unreleased_version": 1,
    "requirements.no_wheels": 1,
    "trial.environment": 1,
    "trial.start": 1,
    "trial.load_warning": 1,
    "trial.example": 1,
    "trial.predict": 1,
    "trial.not_deterministic": 1,
    "trial.no_example": 2,
    "trial.rows_depend": 1,
    "trial.golden_size": 1,
}


def rejection(rule: str, message: str, **evidence: Any) -> Finding:
    """A finding that ends the version's life."""
    return Finding(rule=rule, rule_version=RULES[rule], severity=Severity.REJECT, message=printable(message), evidence=_clean(evidence))


def warning(rule: str, message: str, **evidence: Any) -> Finding:
    """A finding that is kept with the version."""
    return Finding(rule=rule, rule_version=RULES[rule], severity=Severity.WARN, message=printable(message), evidence=_clean(evidence))


def _clean(evidence: dict[str, Any]) -> dict[str, Any]:
    """Names in a file may be megabytes long or no text at all; events carry neither."""
    return {key: printable(value) if isinstance(value, str) else value for key, value in evidence.items()}


def most_important(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Return the findings that an event carries: at most ``MAX_FINDINGS``, rejections first."""
    return tuple(sorted(findings, key=lambda finding: finding.severity != Severity.REJECT))[:MAX_FINDINGS]


def rejections(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Return those that end the version's life."""
    return tuple(finding for finding in findings if finding.severity == Severity.REJECT)
