"""``python -m schemas.generate``: rewrite what is derived from the contracts; ``--check`` only says whether that would change anything.

Derived are ``schemas/snapshots/``, ``schemas/asyncapi.json`` and ``docs/events.md``. Nothing is rewritten when a contract has become
incompatible with its snapshot: a change of meaning is a new type (``.v2``) beside the old one.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from schemas import asyncapi, catalogue, reference
from schemas.compatibility import incompatibilities

_ROOT = catalogue.DIRECTORY.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when all is well, 1 when something is stale or incompatible."""
    parser = argparse.ArgumentParser(prog="python -m schemas.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is stale")
    parser.add_argument("--accept-incompatible", action="store_true", help="rewrite snapshots whose types nobody uses yet")
    options = parser.parse_args(arguments)
    broken = {} if options.accept_incompatible else incompatible_types()
    for event_type, reasons in broken.items():
        for reason in reasons:
            sys.stderr.write(f"{event_type} is no longer compatible with its snapshot: {reason}\n")
    if broken:
        return 1
    stale = stale_files(derived_files())
    for path, content in {} if options.check else stale.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for path in stale:
        sys.stdout.write(f"{path.relative_to(_ROOT)} {'is stale; run `make schemas`' if options.check else 'written'}\n")
    return int(bool(options.check and stale))


def derived_files() -> dict[Path, str]:
    """What every derived file should hold."""
    files = {catalogue.SNAPSHOTS / f"{event_type}.json": catalogue.rendered(schema) for event_type, schema in catalogue.snapshots().items()}
    files[catalogue.DIRECTORY / "asyncapi.json"] = catalogue.rendered(asyncapi.document(importlib.metadata.version("millrace")))
    files[_ROOT / "docs" / "events.md"] = reference.page()
    return files


def stale_files(files: Mapping[Path, str]) -> dict[Path, str]:
    """Those that do not hold what they should."""
    return {path: content for path, content in files.items() if not path.exists() or path.read_text() != content}


def incompatible_types() -> dict[str, list[str]]:
    """Why contracts are not compatible with their stored snapshots, by event type; types that are gone count too."""
    now = catalogue.snapshots()
    reasons = {
        event_type: incompatibilities(stored, now[event_type]) if event_type in now else ["the type has gone"]
        for event_type, stored in catalogue.stored_snapshots().items()
    }
    return {event_type: found for event_type, found in reasons.items() if found}


if __name__ == "__main__":
    sys.exit(main())
