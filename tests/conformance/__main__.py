"""Examine a server, or write the table of all of them.

    python -m tests.conformance --url http://127.0.0.1:8080 --model cancer [--version 1] [--grpc 127.0.0.1:8081] [--only v2.] [--json]
    python -m tests.conformance --table docs/conformance.md

The exit code is 1 when a MUST is not kept.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from tests.conformance import table, v1_checks, v2_checks  # noqa: F401 (they register their checks)
from tests.conformance.checks import CHECKS, Check, Level, Outcome, Result, run_all
from tests.conformance.servers import MODEL, SERVERS
from tests.conformance.subject import Subject

if importlib.util.find_spec("tests.conformance.grpc_checks") is not None:
    importlib.import_module("tests.conformance.grpc_checks")


def main() -> int:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="base URL of the server")
    parser.add_argument("--model", help="a model that it serves; its metadata must name its inputs")
    parser.add_argument("--version", help="a version of the model; without, checks of versions are left out")
    parser.add_argument("--grpc", help="host:port of its gRPC side; without, those checks are left out")
    parser.add_argument("--only", default="", help="examine only checks whose id begins with this")
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    parser.add_argument("--table", metavar="FILE", type=Path, help="start every server of the table, and write the table")
    arguments = parser.parse_args()
    checks = [one for one in CHECKS.values() if one.id.startswith(arguments.only)]
    if arguments.table:
        return _write_table(arguments.table, checks)
    if not arguments.url or not arguments.model:
        parser.error("--url and --model are needed, or --table")
    results = examine(Subject(arguments.url, arguments.model, arguments.version, arguments.grpc), checks)
    print(_as_json(results) if arguments.json else _as_text(results))
    return int(any(result.outcome is Outcome.FAILED and result.check.level is Level.MUST for result in results))


def examine(subject: Subject, checks: list[Check]) -> list[Result]:
    """Try checks out on a server."""
    try:
        return run_all(subject, checks)
    finally:
        subject.close()


def _write_table(path: Path, checks: list[Check]) -> int:
    columns = {}
    for server in SERVERS:
        with server.running() as address:
            columns[server] = examine(Subject(address.url, MODEL, address.version, address.grpc), checks)
        print(f"{server.title}: {table.summary(columns[server])}", file=sys.stderr)
    path.write_text(table.document(columns))
    return 0


def _as_json(results: list[Result]) -> str:
    rows = [
        {
            "id": result.check.id,
            "level": result.check.level,
            "specification": result.check.group,
            "section": result.check.section,
            "sentence": result.check.sentence,
            "outcome": result.outcome,
            "reason": result.reason,
        }
        for result in results
    ]
    return json.dumps(rows, indent=2)


def _as_text(results: list[Result]) -> str:
    lines = [
        f"{result.outcome:15} {result.check.level:7} {result.check.id:26} {result.reason or result.check.sentence}" for result in results
    ]
    return "\n".join([*lines, table.summary(results)])


if __name__ == "__main__":
    sys.exit(main())
