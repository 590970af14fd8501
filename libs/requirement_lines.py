"""The lines of a requirements file, as text; what they mean, and which are taken, is told by ``libs.requirements``."""

import re
from collections.abc import Iterable

_MLFLOW = re.compile(r"mlflow(-skinny|-tracing)?\s*($|[\[=<>!~;@ ])", re.IGNORECASE)


def lines_of(text: str) -> list[str]:
    """The requirements in a text, without comments and empty lines.

    Examples
    --------
    >>> lines_of("# trained with\\nnumpy>=2  # or so\\n")
    ['numpy>=2']
    """
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def without_mlflow(lines: Iterable[str]) -> list[str]:
    """Requirements without MLflow itself, which saves models and is not needed to serve them."""
    return [line for line in lines if not _MLFLOW.match(line)]
