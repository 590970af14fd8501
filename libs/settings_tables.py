"""``python -m libs.settings_tables``: rewrite the tables of settings; ``--check`` only says whether that would change anything.

A service's own settings stand in its README between ``<!-- settings -->`` and ``<!-- /settings -->``, those that several share in
``docs/settings.md``.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from libs import settings as shared

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- settings -->", "<!-- /settings -->"
PAGE = "docs/settings.md"
LINK = f"../../{PAGE}"

_HEAD = "| variable | type | default | meaning |\n|---|---|---|---|"
_INTRO = """# Settings

Every process reads its settings once, when it starts, from environment variables. Those of one service are in its README
(`services/*/README.md`); these groups are read by several. Written by `python -m libs.settings_tables`.
"""
_PLACES = {"libs.local.settings.LocalSettings": "`millrace up`", "libs.cli.settings.CliSettings": "The command line"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when all is well, 1 when something is stale."""
    parser = argparse.ArgumentParser(prog="python -m libs.settings_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is stale")
    options = parser.parse_args(arguments)
    stale = {path: text for path, text in derived_files().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if not options.check:
            path.write_text(text)
        sys.stdout.write(f"{path.relative_to(ROOT)} {'is stale; run `make schemas`' if options.check else 'written'}\n")
    return int(options.check and bool(stale))


def derived_files() -> dict[Path, str]:
    """What every file with a table should hold."""
    files = {ROOT / PAGE: shared_page()}
    for readme, settings in service_settings().items():
        files[readme] = with_table(readme.read_text(), service_table(settings), readme)
    return files


def service_settings() -> dict[Path, type[BaseSettings]]:
    """The settings class of each service, by its README."""
    readmes = sorted(path.parent / "README.md" for path in ROOT.glob("services/*/settings.py"))
    return {readme: _class(f"services.{readme.parent.name}.settings.Settings") for readme in readmes}


def shared_groups() -> list[type[BaseSettings]]:
    """The groups that several services read, in the order of their module."""
    found = [each for each in vars(shared).values() if isinstance(each, type) and issubclass(each, BaseSettings)]
    return [each for each in found if each.__module__ == shared.__name__]


def with_table(text: str, table: str, where: Path) -> str:
    """The text with the table between its marks; raises ``ValueError`` when it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{where} has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def service_table(settings: type[BaseSettings]) -> str:
    """The table of a service's own settings, and links to the groups it shares with others."""
    own = list(rows(settings))
    groups = [group for field in settings.model_fields.values() if (group := _group(field)) in shared_groups()]
    links = ", ".join(f"[{_title(group)}]({LINK}#{_anchor(group)})" for group in groups if group is not None)
    table = "\n".join([_HEAD, *own]) if own else "None of its own."
    return f"{table}\n\nShared groups: {links}." if links else table


def shared_page() -> str:
    """The page of the shared groups."""
    groups = (*shared_groups(), *map(_class, _PLACES))
    return "\n".join([_INTRO, *map(_section, groups)])


def rows(settings: type[BaseSettings]) -> Iterator[str]:
    """One line per setting; groups of the class's own are included, shared ones are not."""
    for name, field in settings.model_fields.items():
        group = _group(field)
        if group is None:
            names = " or ".join(f"`{variable}`" for variable in variables(settings, name))
            cells = (names, _type(field.annotation), _default(field), _meaning(field))
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        elif group not in shared_groups():
            yield from rows(group)


def variables(settings: type[BaseSettings], name: str) -> list[str]:
    """The environment variables of a field; the first that is set counts."""
    alias = settings.model_fields[name].validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [alias if isinstance(alias, str) else f"{settings.model_config.get('env_prefix', '')}{name}".upper()]


def _class(path: str) -> type[BaseSettings]:
    module, _, name = path.rpartition(".")
    found: type[BaseSettings] = getattr(importlib.import_module(module), name)
    return found


def _group(field: FieldInfo) -> type[BaseSettings] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseSettings) else None


def _type(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(_type(part) for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{member.value}`" for member in kind)
    names: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "boolean", SecretStr: "secret", Path: "path"}
    return names.get(kind, str(kind))


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is None or value == "" or isinstance(value, SecretStr):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    return f"`{value:g}`" if isinstance(value, float) and value < 1e6 else f"`{value}`"


def _meaning(field: FieldInfo) -> str:
    signs = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}
    bounds = [
        f"{sign} {getattr(limit, kind.__name__.lower())}" for limit in field.metadata for kind, sign in signs.items() if type(limit) is kind
    ]
    return f"{field.description or ''} ({', '.join(bounds)})" if bounds else field.description or ""


def _title(group: type[BaseSettings]) -> str:
    place = _PLACES.get(f"{group.__module__}.{group.__name__}")
    return place or group.__name__.removesuffix("Settings")


def _anchor(group: type[BaseSettings]) -> str:
    return _title(group).lower().replace("`", "").replace(" ", "-")


def _section(group: type[BaseSettings]) -> str:
    what = (group.__doc__ or "").strip().partition("\n\n")[0].replace("``", "`")
    return "\n".join([f"## {_title(group)}", "", what, "", _HEAD, *rows(group), ""])


if __name__ == "__main__":
    sys.exit(main())
