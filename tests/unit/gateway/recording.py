"""Requests and batches as the data plane makes them, and a recorder whose log is in memory."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from libs.errors import MillraceError
from libs.inference.requests import InferRequest
from libs.inference.routing import Route
from libs.messaging.memory import MemoryBroker
from libs.metrics import Metrics
from libs.predictions import records
from libs.predictions.audit import Audit, InstanceReport
from libs.predictions.records import PredictionBatch
from schemas.inference import Signature, TensorSpec
from schemas.predictions import PredictionLogSettings, RequestsCounted
from schemas.registry import EndpointSnapshot, Replica
from schemas.topics import PREDICTIONS
from services.gateway.batching import Batch, Pending
from services.gateway.catalog import Catalog
from services.gateway.exchange import Outgoing
from services.gateway.predictions import Ask, Caller, Outcome, Protocol, Target
from services.gateway.recorder import Recorder, RecorderLimits

NOW = datetime(2026, 1, 1, tzinfo=UTC)
REPLICA = Replica(replica_id="r", address="unix:/r")
SIGNATURE = Signature(
    inputs=(TensorSpec(name="input", datatype="FP64", shape=(-1, 2)),), outputs=(TensorSpec(name="predict", datatype="FP64", shape=(-1,)),)
)


def route(endpoint: str = "e", version: int = 1) -> Route:
    return Route(endpoint, f"{endpoint}.m.{version}", "m", version, SIGNATURE, (REPLICA,))


def request(request_id: str, *, endpoint: str = "e", rows: int = 1, protocol: Protocol = Protocol.V1, principal: str = "local") -> Pending:
    """A request as it is accepted."""
    ask = Ask(Target(endpoint), protocol, lambda _: InferRequest({}), lambda _: Outgoing(b""))
    return Pending(ask, Caller(request_id, principal), lambda _: None, accepted_s=100.0, deadline_s=130.0, rows=rows)


class Recording:
    """A recorder at work, and what it has said."""

    def __init__(self, recorder: Recorder, broker: MemoryBroker, metrics: Metrics, catalog: Catalog) -> None:
        self.recorder = recorder
        self.broker = broker
        self.metrics = metrics
        self.catalog = catalog

    def endpoint(self, name: str, **settings: Any) -> None:
        """Let an endpoint exist, or log in another way."""
        self.catalog.endpoints[name] = EndpointSnapshot(
            endpoint_name=name, prediction_log=PredictionLogSettings(**settings), created_at=NOW, updated_at=NOW
        )

    def accept(self, *request_ids: str, **details: Any) -> list[Pending]:
        accepted = [request(request_id, **details) for request_id in request_ids]
        for pending in accepted:
            self.recorder.accepted(pending)
        return accepted

    def end(self, members: Sequence[Pending], outcome: Outcome = Outcome.COMPLETED, error: MillraceError | None = None) -> None:
        for pending in members:
            pending.ended_s = 100.5
            self.recorder.ended(pending, outcome, error)

    def batch(self, members: Sequence[Pending], version: int = 1) -> Batch:
        """Have requests answered together; each row of the inputs is its request's sequence number."""
        total = sum(pending.rows for pending in members)
        values = np.repeat([float(pending.sequence) for pending in members], [pending.rows for pending in members])
        where = route(members[0].ask.target.endpoint_name, version)
        batch = Batch(where, REPLICA, list(members), total, "idle", 100.2, {"input": np.stack([values, values], axis=1)})
        for pending in members:
            pending.route, pending.attempts, pending.queued_s, pending.sent_s, pending.model_s = where, 1, 100.1, 100.2, 0.25
        self.recorder.batch_sent(batch)
        batch.answered_s, batch.model_s, batch.outputs = 100.4, 0.25, {"predict": values * 10}
        return batch

    def answer(self, *request_ids: str, **details: Any) -> list[Pending]:
        """Accept requests and complete them in one batch."""
        members = self.accept(*request_ids, **details)
        batch = self.batch(members)
        self.end(members)
        self.recorder.batch_ended(batch, None)
        return members

    async def written(self) -> None:
        """Cut what is due and wait until the log has it."""
        self.recorder.tick()
        assert await self.recorder._writer.drain()

    def batches(self) -> list[PredictionBatch]:
        return [said for said in self.said() if isinstance(said, PredictionBatch)]

    def said(self) -> list[PredictionBatch | RequestsCounted]:
        return [said for record in self.broker.records(PREDICTIONS.name) if (said := records.read(record)) is not None]

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every row in the log by request id."""
        return {row["request_id"]: row for batch in self.batches() for row in batch.rows()}

    def payload(self) -> dict[int, tuple[Any, Any]]:
        """Inputs and outputs in the log by sequence number."""
        return {
            sequence: (inputs["input"].tolist(), outputs["predict"].tolist() if outputs else None)
            for batch in self.batches()
            for block in batch.blocks
            for sequence, inputs, outputs in block.requests()
        }

    def value(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        return sum(
            sample.value
            for sample in self.metrics.samples()
            if sample.metric.name == name and labels.items() <= dict(zip(sample.metric.labels, sample.labels, strict=True)).items()
        )


def audited(broker: MemoryBroker, live: Sequence[str] = ()) -> list[InstanceReport]:
    """What an audit of everything in the log says."""
    audit = Audit()
    for record in broker.records(PREDICTIONS.name):
        audit.add(record)
    assert audit.unreadable == []
    return audit.reports(live)


@asynccontextmanager
async def recording(directory: Path, broker: MemoryBroker | None = None, *, stop: bool = True, **limits: Any) -> AsyncIterator[Recording]:
    """A recorder at work; with ``stop=False`` it ends as a process that is killed does."""
    broker, metrics, catalog = broker or MemoryBroker(), Metrics(), Catalog()
    recorder = Recorder(directory, catalog, broker, metrics, RecorderLimits(**{"flush_s": 3600.0, **limits}), clock=lambda: NOW)
    await recorder.start()
    running = asyncio.create_task(recorder.run())
    try:
        yield Recording(recorder, broker, metrics, catalog)
    finally:
        if stop:
            await recorder.stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        if not stop:
            recorder._ledger.close(remove=False)
