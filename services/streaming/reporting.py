"""Writes down which streams fail, for ``millrace status``."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from libs import reports
from libs.reports import STALE_S, StreamReport

log = logging.getLogger(__name__)

LOOK_S = 1.0


class Reporting:
    """Keeps the file of failing streams as they are; a component.

    Parameters
    ----------
    failing
        The streams that have failed and have not advanced since.
    """

    def __init__(self, path: Path, failing: Callable[[], Sequence[StreamReport]]) -> None:
        self._path = path
        self._failing = failing
        self._written: tuple[StreamReport, ...] | None = None
        self._written_at = 0.0

    async def start(self) -> None:
        self._write()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._write()

    async def stop(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        """Write when something has changed, and before what was written is too old to be believed."""
        failing = tuple(self._failing())
        if failing == self._written and time.monotonic() - self._written_at < STALE_S / 3:
            return
        try:
            reports.write(self._path, failing)
        except OSError as error:
            if failing != self._written:
                log.warning("which streams fail cannot be written to %s: %s", self._path, error.strerror)
        self._written, self._written_at = failing, time.monotonic()
