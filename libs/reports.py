"""What services tell whoever looks after the platform on one machine: small files in the home's ``run`` folder.

A file is replaced as a whole and hears of no keys: it works before the first API key is made, and when the gateway takes no requests.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENDPOINTS_FILE = "endpoints.json"
"""Written by the gateway; see ``EndpointReport``."""

STREAMS_FILE = "streams.json"
"""Written by streaming; see ``StreamReport``."""

STALE_S = 30.0
"""A report that has not been written again for so long tells nothing of now."""


@dataclass(frozen=True)
class EndpointReport:
    """Whether requests to an endpoint are answered now.

    ``is_awaited``: it is not ready, and shall become so without anybody doing anything. One whose deployment failed, or that has none,
    is not.
    """

    name: str
    is_ready: bool
    is_awaited: bool = False
    reason: str = ""


@dataclass(frozen=True)
class StreamReport:
    """A stream that has failed and has not advanced since: where it stands, and why.

    ``partition`` and ``offset`` are those of the first record that it had in hand; None when it had none.
    """

    endpoint: str
    partition: int | None
    offset: int | None
    cause: str
    failures: int
    since: float


def write(path: Path, rows: Iterable[EndpointReport] | Iterable[StreamReport]) -> None:
    """Replace a report; raises ``OSError``."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # workers of one gateway write the same report
    partial.write_text(json.dumps({"pid": os.getpid(), "written_at": time.time(), "rows": [asdict(row) for row in rows]}))
    partial.replace(path)


def read_endpoints(path: Path) -> list[EndpointReport] | None:
    """What the gateway last said, by name; None when it has said nothing of late."""
    rows = _read(path)
    return None if rows is None else [EndpointReport(**row) for row in rows]


def read_streams(path: Path) -> list[StreamReport]:
    """The failing streams; none when streaming has said nothing of late."""
    return [StreamReport(**row) for row in _read(path) or ()]


def _read(path: Path) -> list[dict[str, Any]] | None:
    try:
        document = json.loads(path.read_text())
        fresh = time.time() - document["written_at"] < STALE_S
        rows: list[dict[str, Any]] = document["rows"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return rows if fresh else None
