"""The first gate: is the artifact intact, what is it, is there anything in it that forbids going on, and what does it need?

Nothing of the upload runs here.
"""

import hashlib
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from libs.artifacts.manifest import File, Manifest
from schemas.registry import ArtifactFormat
from schemas.validation import Finding
from services.validator.errors import BrokenArtifactError, ForbiddenEntryError, OversizedContentError
from services.validator.folders import Unpacked, find_model, imported, mlflow_requirements, modules
from services.validator.formats import Recognition, archive_kind, recognise
from services.validator.pickle_scan import Consent, judge
from services.validator.requirements import NeededPackages, check_given, infer_for_onnx, infer_for_pickle, known_roots, may_provide
from services.validator.rules import rejection, rejections, warning
from services.validator.unpacking import unpack

DEFAULT_EXPANDED_LIMIT_BYTES = 8 * 2**30
_CHUNK_BYTES = 1024 * 1024
_MAX_MODULE_BYTES = 16 * 2**20
_MODULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\.py")
_KINDS = {"tar": "a tar archive", "tar.gz": "a tar archive", "zip": "a zip archive"}


@dataclass(frozen=True, slots=True)
class Code:
    """What came as ``--code``: an archive, or the one module that the uploader's name for the file says."""

    path: Path
    filename: str


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
    files, code
        What archives were unpacked to; ``None`` where the artifact is one file, and where no code came with it.
    """

    format: ArtifactFormat | None
    requirements: tuple[str, ...]
    inferred: bool
    findings: tuple[Finding, ...]
    files: Unpacked | None = None
    code: Unpacked | None = None

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
    code: Code | None = None,
) -> Inspection:
    """Inspect a file; an archive is unpacked beside it, to the file's name with ``.files`` behind.

    Parameters
    ----------
    sha256, size_bytes
        What the uploader said of it; ``None`` where another has checked already.
    declared_format
        Format that the uploader named; ``None`` is decided by content.
    requirements
        Requirements that the uploader gave; ``None`` are inferred.
    expanded_limit_bytes
        Largest content after decompression, in bytes; of an archive, of all its files together.
    consent
        Whether a pickle may carry code, or call more than is known to be needed; code that came beside it needs the platform's permission.
    code
        The modules that came with it.
    """
    inferred = requirements is None
    damaged = _damage(path, sha256, size_bytes)
    if damaged:
        return Inspection(None, (), inferred, damaged)
    brought, code_findings = _code(code, consent, expanded_limit_bytes)
    files, set_findings = _files(path, expanded_limit_bytes)
    if set_findings or (files is not None and files.model is None):
        return Inspection(None, (), inferred, (*set_findings, *code_findings))
    model = files.root / files.model if files is not None and files.model is not None else path
    if model.stat().st_size == 0:
        return Inspection(None, (), inferred, (rejection("artifact.empty", f"the model's file '{model.name}' is empty (0 bytes)"),))
    if requirements is None and files is not None:
        requirements = mlflow_requirements(files)
    recognition = recognise(model, expanded_limit_bytes)
    own = modules(brought.manifest.paths) if brought else frozenset()
    uses = imported(brought) if brought else frozenset()
    needed = _needed(recognition, requirements, uses)
    named = None if rejections(needed.findings) else requirements
    findings = (
        *code_findings,
        *recognition.findings,
        *_contradiction(recognition, declared_format),
        *_contents(recognition, known_roots(named) | own, consent, may_provide(needed.requirements, requirements is None)),
        *_outside(recognition, files),
        *needed.findings,
    )
    return Inspection(recognition.format, needed.requirements, inferred, findings, files, brought)


def _files(path: Path, limit_bytes: int) -> tuple[Unpacked | None, tuple[Finding, ...]]:
    """Unpack an artifact that is an archive, and find the model in it."""
    kind = archive_kind(path)
    if kind is None:
        return None, ()
    files, findings = _unpacked(path, kind, limit_bytes, "the artifact")
    if files is None:
        return None, findings
    model, findings = find_model(files.manifest, _KINDS[kind])
    return replace(files, model=model), findings


def _unpacked(path: Path, kind: str, limit_bytes: int, what: str) -> tuple[Unpacked | None, tuple[Finding, ...]]:
    root = path.with_name(f"{path.name}.files")
    root.mkdir()
    try:
        return Unpacked(root, unpack(path, kind, root, limit_bytes)), ()
    except BrokenArtifactError as error:
        finding = rejection("artifact.broken", f"{what} begins as {_KINDS[kind]} but {error.message}", kind=_KINDS[kind])
    except ForbiddenEntryError as error:
        finding = rejection("archive.entry", f"{what} is {_KINDS[kind]} that is not unpacked: {error.message}")
    except OversizedContentError as error:
        finding = rejection("artifact.expanded_size", f"{what} is {_KINDS[kind]}, and {error.message}", limit_bytes=limit_bytes)
    return None, (finding,)


def _code(code: Code | None, consent: Consent, limit_bytes: int) -> tuple[Unpacked | None, tuple[Finding, ...]]:
    """Unpack the modules that came with an artifact."""
    if code is None:
        return None, ()
    if not consent.permitted:
        return None, (rejection("code.forbidden", "this platform does not accept code beside models (VALIDATOR_ALLOW_CODE)"),)
    kind = archive_kind(code.path)
    if kind is not None:
        unpacked, findings = _unpacked(code.path, kind, limit_bytes, "the code")
        if unpacked is None or modules(unpacked.manifest.paths):
            return unpacked, findings
        return None, (rejection("code.unreadable", "the code is an archive without a Python module or package at its top"),)
    reason = _no_module(code)
    if reason:
        return None, (rejection("code.unreadable", f"the code is neither an archive nor a Python module: {reason}"),)
    root = code.path.with_name(f"{code.path.name}.files")
    root.mkdir()
    (root / code.filename).hardlink_to(code.path)
    file = File(code.filename, sha256_of(code.path), code.path.stat().st_size)
    return Unpacked(root, Manifest.of([file])), ()


def _no_module(code: Code) -> str:
    if not _MODULE_NAME.fullmatch(code.filename):
        return f"'{code.filename}' is no module's name"
    if code.path.stat().st_size > _MAX_MODULE_BYTES:
        return f"it is larger than {_MAX_MODULE_BYTES} bytes"
    try:
        text = code.path.read_text("utf-8")
    except UnicodeDecodeError:
        return "it is not UTF-8 text"
    return "it has a null character" if "\0" in text else ""


def _outside(recognition: Recognition, files: Unpacked | None) -> tuple[Finding, ...]:
    """Weights of a graph that are in no file that came with it."""
    if recognition.onnx is None:
        return ()
    here = os.path.dirname(files.model or "") if files is not None else ""
    known = files.manifest.paths if files is not None else ()
    missing = sorted(name for name in recognition.onnx.external_data if (f"{here}/{name}" if here else name) not in known)
    if not missing:
        return ()
    named = ", ".join(f"'{name}'" for name in missing[:3] if name)
    message = f"the graph keeps weights in files that did not come with it ({named})" if named else "the graph keeps weights in other files"
    return (rejection("onnx.external_data", f"{message}; upload the folder they are in, or save it with all its data in one file"),)


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


def _contents(recognition: Recognition, known: frozenset[str], consent: Consent, may_be_provided: bool) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    if recognition.pickle is not None:
        findings += judge(recognition.pickle, known, consent, may_be_provided=may_be_provided)
    if recognition.onnx is not None and recognition.onnx.custom_domains:
        domains = recognition.onnx.custom_domains
        message = f"the graph uses operators of {', '.join(repr(domain) for domain in domains)}, which ONNX Runtime may not have"
        findings.append(warning("onnx.custom_operators", message, domains=list(domains)))
    return tuple(findings)


def _needed(recognition: Recognition, given: Sequence[str] | None, uses: frozenset[str]) -> NeededPackages:
    if given is not None:
        return check_given(given, recognition.pickle)
    if recognition.pickle is not None:
        return infer_for_pickle(recognition.pickle, uses)
    if recognition.onnx is not None:
        return infer_for_onnx(recognition.onnx)
    return NeededPackages(())
