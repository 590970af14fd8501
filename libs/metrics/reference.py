"""``python -m libs.metrics.reference``: rewrite the table of ``docs/metrics.md``.

``--check`` only says whether that would change anything.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from libs.metrics.definitions import METRICS, Metric

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
BEGIN, END = "<!-- metrics -->", "<!-- /metrics -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when all is well, 1 when the page is stale."""
    parser = argparse.ArgumentParser(prog="python -m libs.metrics.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is stale")
    options = parser.parse_args(arguments)
    text = PAGE.read_text()
    wanted = with_table(text)
    if wanted != text:
        sys.stdout.write(f"docs/metrics.md {'is stale; run `make schemas`' if options.check else 'written'}\n")
        if not options.check:
            PAGE.write_text(wanted)
    return int(options.check and wanted != text)


def with_table(text: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """One line per metric."""
    return "\n".join(["| name | kind | labels | meaning |", "|---|---|---|---|", *map(_row, METRICS)])


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.meaning} |"


if __name__ == "__main__":
    sys.exit(main())
