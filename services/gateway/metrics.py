"""``GET /metrics``: the numbers of this process, and of the other workers that share its port."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from libs.metrics import PROCESS, Metrics
from libs.metrics.exposition import Exposition
from libs.metrics.instruments import Sample, as_document, from_document
from services.gateway.exchange import Incoming, Outgoing
from services.gateway.predictions import Handler
from services.gateway.statistics import Document

log = logging.getLogger(__name__)

WRITE_S = 1.0
STALE_S = 10.0
"""A worker that has not written for so long is gone, and its numbers with it."""


class MetricsDoor:
    """Answers ``GET /metrics``, in the form that ``Accept`` asks for."""

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = exposition

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """Handler by method and route template."""
        return {("GET", "/metrics"): self.metrics}

    async def metrics(self, incoming: Incoming) -> Outgoing:
        """All metrics, as Prometheus reads them."""
        body, content_type = self._exposition.render(incoming.header(b"accept"))
        return Outgoing(body, media_type=content_type.encode())


class SharedMetrics:
    """Lets gateway workers show each other's numbers beside their own: each writes its own to a file once a second; a component.

    Whichever worker a scrape happens to reach, the numbers are those of all, up to a second old. ``process_*`` are the answering worker's.
    A worker that is started again writes to the file of the one whose place it takes.

    Parameters
    ----------
    statistics
        What is told of deployments beside the metrics.
    """

    def __init__(self, directory: Path, instance: str, metrics: Metrics, statistics: Callable[[], Mapping[str, Document]] = dict) -> None:
        self._directory = directory
        self._path = directory / f"metrics-{PROCESS.worker or instance}.json"
        self._metrics = metrics
        self._statistics = statistics

    async def start(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.write()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            self.write()

    async def stop(self) -> None:
        self._path.unlink(missing_ok=True)

    def write(self) -> None:
        """Show the others what was counted up to now."""
        partial = self._path.with_suffix(".partial")
        try:
            samples = as_document([*self._metrics.samples(), *PROCESS.samples()])
            partial.write_bytes(orjson.dumps({"samples": samples, "statistics": self._statistics()}))
            partial.replace(self._path)
        except OSError as error:
            log.warning("the other workers do not see this one's metrics: %s", error)

    def others(self) -> Iterable[Sample]:
        """What the other workers have counted."""
        for path, document in self._written():
            yield from from_document(document["samples"], path.stem.removeprefix("metrics-"))

    def others_statistics(self) -> Iterable[Mapping[str, Document]]:
        """The statistics of the other workers, each for itself."""
        for _, document in self._written():
            yield document["statistics"]

    def _written(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """What the other workers have written. This one writes too: what it has just shown, no other may show less of a moment later."""
        if PROCESS.worker:
            self.write()
        oldest = time.time() - STALE_S
        for path in self._directory.glob("metrics-*.json"):
            if path == self._path:
                continue
            with suppress(OSError, json.JSONDecodeError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
                else:
                    document = orjson.loads(path.read_bytes())
                    if isinstance(document, dict):  # an earlier release wrote a list
                        yield path, document
