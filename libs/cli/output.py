"""What commands write: results to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import typer


def say(text: str = "") -> None:
    """A line of the result."""
    typer.echo(text)


def note(text: str) -> None:
    """A line for the person who watches, not for the program that reads."""
    typer.echo(text, err=True)


def stage(name: str, seconds: float) -> None:
    """A stage that was reached, and the seconds it took."""
    note(f"  {name:<24} {duration(seconds):>8}")


def show_json(value: Any) -> None:
    """A result as JSON."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A result as aligned columns."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[index]) for line in [list(columns), *cells]) for index in range(len(columns))]
    for line in [[column.upper() for column in columns], *cells]:
        say("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def fields(pairs: Mapping[str, object]) -> None:
    """A result as ``name  value`` lines; what is empty is left out."""
    shown = {name: _cell(value) for name, value in pairs.items() if value not in (None, "", [], {}, ())}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        say(f"{name.ljust(width)}  {value}")


def duration(seconds: float) -> str:
    """A time span as a person reads it.

    >>> duration(0.0004), duration(0.0421), duration(3.2), duration(75)
    ('0.4 ms', '42 ms', '3.2 s', '1 min 15 s')
    """
    if seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def size(count: float) -> str:
    """A number of bytes as a person reads it.

    >>> size(512), size(1536), size(3 * 2**30)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def local_time(text: object) -> str:
    """An RFC 3339 time on the clock of the one who reads it; anything else as it is."""
    try:
        return datetime.fromisoformat(str(text)).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return str(text)


@contextmanager
def upload_progress(name: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar that moves with each piece sent, where stderr is a terminal; silent elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("  uploading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total_bytes)
        yield lambda count: progress.advance(task, count)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "–"
    return str(value)
