"""What the arguments of commands mean."""

import re
from dataclasses import dataclass

from libs.cli.errors import UsageError


@dataclass(frozen=True)
class ModelReference:
    """``MODEL``, ``MODEL@VERSION`` or ``MODEL:ALIAS``; at most one of ``version`` and ``alias`` is set."""

    name: str
    version: int | None = None
    alias: str | None = None


def check_name(name: str) -> None:
    """Refuse an impossible name before gigabytes are sent under it."""
    from schemas.base import NAME_PATTERN

    if not re.fullmatch(NAME_PATTERN, name):
        said = name if len(name) <= 80 else name[:79] + "…"
        raise UsageError(f"{said!r} is not a name: 1 to 63 letters, digits, '-' or '_'; starts and ends with a letter or digit")


def model_reference(text: str) -> ModelReference:
    """Read a reference to a model or to one of its versions.

    >>> model_reference("cancer@3")
    ModelReference(name='cancer', version=3, alias=None)
    >>> model_reference("cancer:champion").alias
    'champion'
    """
    name, at, version = text.partition("@")
    if at:
        return ModelReference(_name(name, text), version=version_number(version))
    name, colon, alias = text.partition(":")
    if colon and not alias:
        raise UsageError(f"{text!r} names no alias after the colon; write MODEL, MODEL@VERSION or MODEL:ALIAS")
    return ModelReference(_name(name, text), alias=alias or None)


def version_reference(text: str) -> tuple[str, int]:
    """Read ``NAME@VERSION``, where the version must be given."""
    reference = model_reference(text)
    if reference.version is None:
        raise UsageError(f"{text!r} names no version; write NAME@VERSION, for example {reference.name}@1")
    return reference.name, reference.version


def alias_assignment(text: str) -> tuple[str, int]:
    """Read ``ALIAS=VERSION``.

    >>> alias_assignment("champion=2")
    ('champion', 2)
    """
    alias, equals, version = text.partition("=")
    if not alias or not equals:
        raise UsageError(f"{text!r} is not ALIAS=VERSION, for example champion=2")
    return alias, version_number(version)


def traffic_split(assignments: list[str]) -> dict[str, int]:
    """Read ``VERSION=PERCENT …``; the versions may be deployment ids.

    >>> traffic_split(["1=90", "2=10"])
    {'1': 90, '2': 10}
    """
    split: dict[str, int] = {}
    for text in assignments:
        version, equals, percent = text.rpartition("=")
        if not version or not equals or not re.fullmatch(r"\d{1,3}%?", percent):
            raise UsageError(f"{text!r} is not VERSION=PERCENT, for example 2=10")
        if version in split:
            raise UsageError(f"version {version} is named twice")
        split[version] = int(percent.rstrip("%"))
    if sum(split.values()) != 100:
        raise UsageError(f"the percentages sum to {sum(split.values())}, not to 100")
    return split


def labels(assignments: list[str]) -> dict[str, str]:
    """Read ``KEY=VALUE`` labels.

    >>> labels(["team=risk"])
    {'team': 'risk'}
    """
    read: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"the label {text!r} is not KEY=VALUE")
        read[key] = value
    return read


def version_number(text: str) -> int:
    """Read a version: 1, 2, 3 …"""
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise UsageError(f"{text!r} is not a version number (1, 2, 3 …)")
    return int(text)


def _name(name: str, text: str) -> str:
    if not name:
        raise UsageError(f"{text!r} names no model; write MODEL, MODEL@VERSION or MODEL:ALIAS")
    return name
