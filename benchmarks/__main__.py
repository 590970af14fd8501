"""``python -m benchmarks [name …] [options]``: the tables that are named, or all of them; options go to a single one."""

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = ("registry_rebuild", "platform", "messaging", "artifact_store", "runner_hop", "streaming", "serving")
"""Each is a module here, with a ``main(arguments)``."""


def main(arguments: Sequence[str]) -> None:
    """Run what is named."""
    names = [word for word in arguments if word in BENCHMARKS]
    options = [word for word in arguments if word not in BENCHMARKS]
    if options and len(names) != 1:
        raise SystemExit(f"usage: python -m benchmarks [{' | '.join(BENCHMARKS)}] …; options need exactly one name before them")
    for name in names or BENCHMARKS:
        importlib.import_module(f"benchmarks.{name}").main(options)


if __name__ == "__main__":
    main(sys.argv[1:])
