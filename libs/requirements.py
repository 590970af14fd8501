"""What a model may ask for: requirements by name and version, as PEP 508 writes them.

A requirements file can do much more than name packages: pull code from any URL or repository, read local files, change the index.
All of that is refused here, at the door, so that the resolver only ever sees names and versions.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement as _Pep508Requirement
from packaging.utils import InvalidName, canonicalize_name

from libs.errors import InvalidArgumentError

MAX_REQUIREMENTS = 500
"""Lines that name a package. ``pip freeze`` of a large training environment has about 300."""

MAX_REQUIREMENTS_BYTES = 64 * 1024
MAX_LINE_CHARACTERS = 1000

_ARCHIVE_SUFFIXES = (".whl", ".zip", ".tar.gz", ".tar.bz2", ".tgz", ".egg")
_DIRECT_SCHEME = re.compile(r"^(?:[a-z][a-z0-9+.-]*://|(?:git|hg|svn|bzr|file|https?)[+:])", re.IGNORECASE)
_COMMENT = re.compile(r"(^|\s)#.*$")


class InvalidRequirementsError(InvalidArgumentError):
    """Requirements that Millrace does not accept; the message names the line and what is wrong with it."""


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """A package by name, with the versions that will do.

    Attributes
    ----------
    name
        Canonical (PEP 503) name of the distribution.
    extras
        Sorted optional features.
    specifier
        Version specifier such as ``>=1.7,<2``; empty accepts any version.
    marker
        Environment marker such as ``python_version < "3.12"``; empty applies everywhere.
    """

    name: str
    extras: tuple[str, ...] = ()
    specifier: str = ""
    marker: str = ""

    def __str__(self) -> str:
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        marker = f" ; {self.marker}" if self.marker else ""
        return f"{self.name}{extras}{self.specifier}{marker}"


def parse_requirements(text_or_lines: str | Iterable[str]) -> tuple[Requirement, ...]:
    """Read requirements from the text of a file, or from its lines; sorted, without duplicates.

    Blank lines and comments are skipped. The result depends on what is asked, not on how it was written, so that it can be a key.

    Raises
    ------
    InvalidRequirementsError
        An option line, a URL, a repository, a local path, something that is not a requirement, or too much of it.

    Examples
    --------
    >>> [str(r) for r in parse_requirements("Scikit_Learn == 1.7.2  # pinned\\n\\nnumpy<3,>=2")]
    ['numpy<3,>=2', 'scikit-learn==1.7.2']
    """
    text = text_or_lines if isinstance(text_or_lines, str) else "\n".join(text_or_lines)
    if len(text.encode("utf-8", "replace")) > MAX_REQUIREMENTS_BYTES:
        raise InvalidRequirementsError(f"The requirements are longer than {MAX_REQUIREMENTS_BYTES} bytes.")
    found = {
        _parse_line(number, line)
        for number, raw in enumerate(text.removeprefix("\ufeff").splitlines(), start=1)
        if (line := _COMMENT.sub("", raw).strip())
    }
    if len(found) > MAX_REQUIREMENTS:
        raise InvalidRequirementsError(f"{len(found)} requirements are more than the {MAX_REQUIREMENTS} allowed.")
    return tuple(sorted(found))


def with_requirement(requirements: tuple[Requirement, ...], name: str) -> tuple[Requirement, ...]:
    """The same requirements, with any version of ``name`` added unless they name it (without a marker) already."""
    if any(r.name == name and not r.marker for r in requirements):
        return requirements
    return tuple(sorted((*requirements, Requirement(name))))


def _parse_line(number: int, line: str) -> Requirement:
    shown = line if len(line) <= 80 else f"{line[:77]}..."
    if reason := _refusal(line):
        raise InvalidRequirementsError(f"Line {number} of the requirements, {shown!r}, {reason}.")
    try:
        parsed = _Pep508Requirement(line)
    except InvalidRequirement as error:
        raise InvalidRequirementsError(f"Line {number} of the requirements, {shown!r}, is not a requirement such as 'numpy>=2'.") from error
    if parsed.url:
        raise InvalidRequirementsError(
            f"Line {number} of the requirements, {shown!r}, points to a URL; name a package and a version instead."
        )
    try:
        name, extras = canonicalize_name(parsed.name, validate=True), {canonicalize_name(extra, validate=True) for extra in parsed.extras}
    except InvalidName as error:
        raise InvalidRequirementsError(f"Line {number} of the requirements, {shown!r}, has a name that no package can have.") from error
    return Requirement(
        name=name,
        extras=tuple(sorted(extras)),
        specifier=str(parsed.specifier),
        marker=str(parsed.marker) if parsed.marker else "",
    )


def _refusal(line: str) -> str | None:
    """Why this line is refused before it is even parsed, or None."""
    if len(line) > MAX_LINE_CHARACTERS:
        return f"is longer than {MAX_LINE_CHARACTERS} characters"
    if not line.isprintable():
        return "holds characters that cannot be printed"
    if "$" in line:
        return "holds a variable; write out what it stands for"
    if "--hash" in line or line.endswith("\\"):
        return "carries hashes; leave them out, the builder makes its own"
    if line.startswith("-"):
        return "is an option; only names and versions of packages are accepted"
    if _DIRECT_SCHEME.match(line):
        return "points to a URL; name a package and a version instead"
    if line.startswith((".", "/", "~")) or "\\" in line or line.lower().endswith(_ARCHIVE_SUFFIXES):
        return "is a file; name a package and a version instead"
    return None
