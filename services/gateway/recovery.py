"""What is said for a gateway that did not live to say it: the ends of its requests, read from the ledger that it left."""

import asyncio
import logging
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from libs.messaging.broker import Broker
from libs.messaging.cloudevents import Clock
from libs.messaging.records import Record
from libs.messaging.retry import Retry, keep_trying
from libs.metrics import Metrics
from libs.metrics import definitions as metric
from libs.predictions import records
from libs.predictions.records import OUTCOMES, PredictionBatch
from schemas.predictions import InstanceState, RequestsCounted
from schemas.topics import PREDICTIONS
from services.gateway.ledger import COMPLETED, Orphan, Remains, Unfinished, orphans

log = logging.getLogger(__name__)

_MOST_ROWS = 4_000
"""Rows of one record."""

_CLOCKS_DIFFER = timedelta(seconds=5)
"""The log is read from so long before the first request that ended: the wall clock may have been set meanwhile."""

_READ_RECORDS, _READ_S = 500, 0.2

GATEWAY_LOST = "gateway_lost"
"""Error of a request that was in flight when its gateway ended."""


class Recovery:
    """Settles the ledgers of a home whose gateways are gone.

    Parameters
    ----------
    send
        Writes records to the log; returns when the broker has them.
    stopping
        Set when this gateway stops; what cannot be read then is left for later.
    """

    def __init__(
        self,
        directory: Path,
        broker: Broker,
        send: Callable[[Sequence[Record]], Awaitable[None]],
        metrics: Metrics,
        clock: Clock,
        stopping: asyncio.Event,
    ) -> None:
        self._directory = directory
        self._broker = broker
        self._send = send
        self._stopping = stopping
        self._metrics = metrics
        self._clock = clock

    async def settle(self) -> None:
        """Say what became of the requests of each, and remove its ledger; one that cannot be said now is left for later."""
        for orphan in orphans(self._directory):
            await self._settle(orphan)

    async def _settle(self, orphan: Orphan) -> None:
        try:
            remains = orphan.read()
            if remains is not None:
                remains = await self._without_logged(remains)
                await self._send([*recovered(remains, self._clock()), _final(remains, self._clock())])
        except BaseException:
            orphan.release()
            raise
        orphan.remove()
        if remains is not None:
            self._tell(remains)

    async def _without_logged(self, remains: Remains) -> Remains:
        """Without the rows that the log has, though the gateway did not live to see the acknowledgement."""
        ended_at = [each.accepted_at for each in remains.unfinished if not each.was_in_flight]
        if not ended_at:
            return remains
        since = datetime.fromtimestamp(min(ended_at), UTC) - _CLOCKS_DIFFER
        logged = await keep_trying(lambda: self._logged(remains.instance, since), Retry(longest_s=5.0), self._stopping)
        return replace(remains, unfinished=[each for each in remains.unfinished if each.sequence not in logged])

    async def _logged(self, instance: str, since: datetime) -> set[int]:
        """Sequences of an instance that the log has rows of, as far as they were written after ``since``."""
        reader = self._broker.reader([PREDICTIONS.name], since=since)
        sequences: set[int] = set()
        try:
            await reader.start()
            ends = await reader.end_offsets()
            while not await reader.is_at(ends):
                for record in await reader.get_many(_READ_RECORDS, _READ_S):
                    if records.is_of(record, instance) and isinstance(said := records.read(record), PredictionBatch):
                        sequences.update(said.columns["sequence"].tolist())
        finally:
            await reader.stop()
        return sequences

    def _tell(self, remains: Remains) -> None:
        for outcome, number in Tally(OUTCOMES[each.state - COMPLETED] for each in remains.unfinished).items():
            self._metrics.counter(metric.LEDGER_RECOVERED, outcome).value += number
        log.warning(
            "settled gateway %s, which is gone: %d requests were in flight and have failed, the rows of %d more were not in the log",
            remains.instance,
            sum(each.was_in_flight for each in remains.unfinished),
            sum(not each.was_in_flight for each in remains.unfinished),
        )


def recovered(remains: Remains, now: datetime) -> Iterator[Record]:
    """The rows that a gateway which is gone did not write."""
    by_endpoint: defaultdict[str, list[Unfinished]] = defaultdict(list)
    for each in remains.unfinished:
        by_endpoint[each.endpoint_name].append(each)
    number = remains.records
    for endpoint_name, left in sorted(by_endpoint.items()):
        for begin in range(0, len(left), _MOST_ROWS):
            number += 1
            yield _recovered(remains, number, endpoint_name, left[begin : begin + _MOST_ROWS], now)


def _recovered(remains: Remains, number: int, endpoint_name: str, left: list[Unfinished], now: datetime) -> Record:
    protocols = sorted({each.protocol for each in left})
    values: dict[str, object] = {
        "sequence": [each.sequence for each in left],
        "outcome": [each.state - COMPLETED for each in left],
        "error": [int(each.was_in_flight) for each in left],
        "status": [503 if each.was_in_flight else 0 for each in left],
        "protocol": [protocols.index(each.protocol) for each in left],
        "accepted_at": [each.accepted_at for each in left],
    }
    columns = {
        name: np.array(values.get(name, np.full(len(left), np.nan if dtype.kind == "f" else 0)), dtype)
        for name, dtype in records.COLUMNS.items()
    }
    head = {
        "instance": remains.instance,
        "record": number,
        "endpoint_name": endpoint_name,
        "recovered": True,
        "request_ids": [each.request_id for each in left],
        "outcomes": OUTCOMES,
        "errors": ["", GATEWAY_LOST],
        "protocols": protocols,
        "principals": [""],
        "counters": remains.counters.model_dump(),
    }
    return records.write(head, columns, (), now)


def _final(remains: Remains, now: datetime) -> Record:
    counted = RequestsCounted(
        instance=remains.instance,
        state=InstanceState.LOST,
        records=remains.records,
        counters=remains.counters,
        in_doubt=remains.in_doubt,
    )
    return records.write_count(counted, 0, now)
