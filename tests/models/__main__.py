"""``python -m tests.models [--table FILE]``: every model through every protocol; exit status 1 for a wrong answer."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import joblib

from tests.e2e.platforms import PATIENT_GATEWAY, RunningPlatform
from tests.models.protocols import PROTOCOLS
from tests.models.zoo import CASES, Case

UNNAMED = ("v1_objects", "v1_columns", "v2", "v2_matrix_columns", "v2_binary", "v2_grpc", "vertex", "mlflow_records", "kafka")
"""Protocols that name columns; a model that was trained without names has none to be asked by."""

WRONG = "**wrong**"

HEAD = """# Models and protocols

Each model is trained on a table, uploaded, deployed, and asked for the same rows through each protocol; the answers are compared with the
model's own `predict` on the same DataFrame. `python -m tests.models --table docs/models.md` writes this page.

*ok*: equal answers. *–*: the protocol names columns, and the model was trained without names. *refused*: a 400 that says why; a list for
each row holds the columns that the model uses, in the order of its metadata, or all columns of the training table in theirs; the keys of a
`DictVectorizer` have no order but that of the metadata.
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("--table", type=Path, help="file for the table")
    parser.add_argument("--broker", default="kafka", choices=("kafka", "embedded"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="millrace-models-") as folder:
        platform = RunningPlatform(Path(folder) / "home", options.broker, **PATIENT_GATEWAY)
        platform.up()
        try:
            verdicts = {case.name: ask(platform, case, f"m{number}", Path(folder)) for number, case in enumerate(make() for make in CASES)}
        finally:
            platform.down()
            platform.close()
    table = rendered(verdicts)
    sys.stdout.write(table)
    if options.table:
        options.table.write_text(f"{HEAD}\n{table}")
    return int(any(verdict == WRONG for row in verdicts.values() for verdict in row.values()))


def ask(platform: RunningPlatform, case: Case, name: str, folder: Path) -> dict[str, str]:
    """The verdict of each protocol on one model."""
    path = folder / f"{name}.joblib"
    joblib.dump(case.model, path)
    platform.cli("models", "upload", str(path), "--name", name, "--wait")
    platform.serve(name)
    verdicts = {protocol.__name__: verdict(platform, case, name, protocol) for protocol in PROTOCOLS}
    platform.cli("endpoints", "delete", name, "--force")
    return verdicts


def verdict(platform: RunningPlatform, case: Case, name: str, protocol: Any) -> str:
    """``ok``, ``–``, or the difference in one line."""
    if not hasattr(case.model, "feature_names_in_") and not case.as_dicts and protocol.__name__ in UNNAMED:
        return "–"
    try:
        got = protocol(platform, name, case.rows)
    except Exception as error:  # noqa: BLE001 (whatever a client raises is the verdict)
        sys.stderr.write(f"{case.name}, {protocol.__name__}: {error}\n")
        return "refused"
    if got == case.expected():
        return "ok"
    sys.stderr.write(f"{case.name}, {protocol.__name__}: {got}, expected {case.expected()}\n")
    return WRONG


def rendered(verdicts: dict[str, dict[str, str]]) -> str:
    """The table in Markdown."""
    names = [protocol.__name__ for protocol in PROTOCOLS]
    titles = [(protocol.__doc__ or "").rstrip(".") for protocol in PROTOCOLS]
    lines = [f"| model | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    lines += [f"| {model} | {' | '.join(row[name] for name in names)} |" for model, row in verdicts.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
