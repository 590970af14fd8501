"""The first gate: is the artifact intact, what is it, is there anything in it that forbids going on, and what does it need?

Nothing of the upload runs here.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.registry import ArtifactFormat
from schemas.validation import Finding
from services.validator.formats import Recognition, recognise
from services.validator.pickle_scan import Consent, judge
from services.validator.requirements import NeededPackages, check_given, infer_for_onnx, infer_for_pickle, known_roots
from services.validator.rules import rejection, rejections, warning

DEFAULT_EXPANDED_LIMIT_BYTES = 8 * 2**30
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Inspection:
    """The verdict of the first gate.

    Attributes
    ----------
    format
        How the artifact is served; ``None`` when it cannot be.
    requirements
        The given ones, normalised, or the inferred ones.
    inferred
        Whether they were inferred.
    findings
        Everything the rules found.
    """

    format: ArtifactFormat | None
    requirements: tuple[str, ...]
    inferred: bool
    findings: tuple[Finding, ...]

    @property
    def accepted(self) -> bool:
        return self.format is not None and not rejections(self.findings)

    @property
    def reason(self) -> str:
        """The gravest finding, one sentence; empty when accepted."""
        grave = rejections(self.findings)
        return grave[0].message if grave else ""


def inspect(
    path: Path,
    *,
    sha256: str | None = None,
    size_bytes: int | None = None,
    declared_format: ArtifactFormat | None = None,
    requirements: Sequence[str] | None = None,
    expanded_limit_bytes: int = DEFAULT_EXPANDED_LIMIT_BYTES,
    consent: Consent = Consent(),  # noqa: B008 (it is frozen)
) -> Inspection:
    """Inspect a file.

    Parameters
    ----------
    sha256, size_bytes
        What the uploader said of it; ``None`` where another has checked already.
    declared_format
        Format that the uploader named; ``None`` is decided by content.
    requirements
        Requirements that the uploader gave; ``None`` are inferred.
    expanded_limit_bytes
        Largest content after decompression, in bytes.
    consent
        Whether a pickle may carry code, or call more than is known to be needed.
    """
    inferred = requirements is None
    damaged = _damage(path, sha256, size_bytes)
    if damaged:
        return Inspection(None, (), inferred, damaged)
    recognition = recognise(path, expanded_limit_bytes)
    needed = _needed(recognition, requirements)
    findings = (
        *recognition.findings,
        *_contradiction(recognition, declared_format),
        *_contents(recognition, None if rejections(needed.findings) else requirements, consent),
        *needed.findings,
    )
    return Inspection(recognition.format, needed.requirements, inferred, findings)


def _damage(path: Path, sha256: str | None, size_bytes: int | None) -> tuple[Finding, ...]:
    actual = path.stat().st_size
    if actual == 0:
        return (rejection("artifact.empty", "the artifact is empty (0 bytes)"),)
    if size_bytes is not None and actual != size_bytes:
        return (
            rejection(
                "artifact.size", f"the artifact has {actual} bytes; {size_bytes} were announced", actual=actual, announced=size_bytes
            ),
        )
    if sha256 is not None and (digest := sha256_of(path)) != sha256:
        message = f"the artifact's SHA-256 is {digest}; {sha256} was announced"
        return (rejection("artifact.digest", message, actual=digest, announced=sha256),)
    return ()


def sha256_of(path: Path) -> str:
    """Return the digest of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _contradiction(recognition: Recognition, declared: ArtifactFormat | None) -> tuple[Finding, ...]:
    if declared is None or recognition.format is None or declared == recognition.format:
        return ()
    message = f"the artifact was declared as {declared.value} but is {recognition.kind} ({recognition.format.value})"
    return (rejection("format.contradiction", message, declared=declared.value, found=recognition.format.value),)


def _contents(recognition: Recognition, requirements: Sequence[str] | None, consent: Consent) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    if recognition.pickle is not None:
        findings += judge(recognition.pickle, known_roots(requirements), consent)
    if recognition.onnx is not None and recognition.onnx.has_external_data:
        message = "the graph keeps weights in other files; save it with all its data in one file"
        findings.append(rejection("onnx.external_data", message))
    if recognition.onnx is not None and recognition.onnx.custom_domains:
        domains = recognition.onnx.custom_domains
        message = f"the graph uses operators of {', '.join(repr(domain) for domain in domains)}, which ONNX Runtime may not have"
        findings.append(warning("onnx.custom_operators", message, domains=list(domains)))
    return tuple(findings)


def _needed(recognition: Recognition, given: Sequence[str] | None) -> NeededPackages:
    if given is not None:
        return check_given(given, recognition.pickle)
    if recognition.pickle is not None:
        return infer_for_pickle(recognition.pickle)
    if recognition.onnx is not None:
        return infer_for_onnx(recognition.onnx)
    return NeededPackages(())
