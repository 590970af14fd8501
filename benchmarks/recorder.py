"""``python -m benchmarks.recorder``: what recording costs per request, hook by hook, on one core.

Requests go through the hooks as the data plane calls them, in batches of one size; then everything is counted and cut into records, as it
is a few times a second. The broker is in memory and takes everything.
"""

import argparse
import asyncio
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

from libs.inference.requests import InferRequest
from libs.inference.routing import Route
from libs.messaging.memory import MemoryBroker
from libs.metrics import Metrics
from schemas.inference import Signature, TensorSpec
from schemas.registry import Replica
from services.gateway.batching import Batch, Pending
from services.gateway.catalog import Catalog
from services.gateway.predictions import Ask, Caller, Outcome, Protocol, Target
from services.gateway.recorder import Recorder, RecorderLimits

REPLICA = Replica(replica_id="r", address="unix:/r")
SIGNATURE = Signature(
    inputs=(TensorSpec(name="input", datatype="FP64", shape=(-1, 4)),), outputs=(TensorSpec(name="predict", datatype="INT64", shape=(-1,)),)
)
ROUTE = Route("iris", "iris.iris.1", "iris", 1, SIGNATURE, (REPLICA,))


def pendings(count: int) -> list[Pending]:
    """Requests as the data plane makes them."""
    ask = Ask(Target("iris"), Protocol.V2, lambda _: InferRequest({}), lambda _: None)  # type: ignore[arg-type, return-value]
    return [Pending(ask, Caller(uuid.uuid4().hex), lambda _: None, 1000.0 + 1e-4 * n, 1030.0) for n in range(count)]


def batches(members: list[Pending], size: int) -> list[Batch]:
    """Their batches."""
    made = []
    for begin in range(0, len(members), size):
        part = members[begin : begin + size]
        inputs, outputs = {"input": np.ones((len(part), 4))}, {"predict": np.ones(len(part), np.int64)}
        made.append(Batch(ROUTE, REPLICA, part, len(part), "idle", 1000.0, inputs, outputs, 1000.1, 5e-4))
        for pending in part:
            pending.route, pending.rows, pending.attempts = ROUTE, 1, 1
            pending.queued_s, pending.sent_s, pending.ended_s, pending.model_s = 1000.0, 1000.1, 1000.2, 5e-4
    return made


async def measure(requests: int, batch_size: int, sample_payload: bool) -> dict[str, float]:
    """Microseconds per request, by what was done."""
    limits = RecorderLimits(queue_bytes=2**31, payload_bytes_per_s=2**31 if sample_payload else 0)
    spent = dict.fromkeys(("accepted", "ended", "batch", "cut"), 0.0)
    with tempfile.TemporaryDirectory() as home:
        recorder = Recorder(Path(home), Catalog(), MemoryBroker(), Metrics(), limits)
        await recorder.start()
        clock = time.thread_time
        for _ in range(max(1, requests // 4096)):
            members = pendings(4096)
            taken = batches(members, batch_size)
            began = clock()
            for pending in members:
                recorder.accepted(pending)
            accepted = clock()
            for batch in taken:
                recorder.batch_sent(batch)
                recorder.batch_ended(batch, None)
            batched = clock()
            for pending in members:
                recorder.ended(pending, Outcome.COMPLETED, None)
            ended = clock()
            recorder.tick()
            cut = clock()
            for name, seconds in zip(spent, (accepted - began, ended - batched, batched - accepted, cut - ended), strict=True):
                spent[name] += seconds / 4096 * 1e6
            await asyncio.sleep(0)
        rounds = max(1, requests // 4096)
    return {name: total / rounds for name, total in spent.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recorder", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    options = parser.parse_args()
    print("microseconds per request    accepted   ended   batch    cut    all")
    for batch_size in (1, 8, 32):
        for payload in (True, False):
            figures = asyncio.run(measure(options.requests, batch_size, payload))
            name = f"batches of {batch_size}, {'with' if payload else 'without'} payload"
            print(f"{name:<28}" + "".join(f"{value:8.2f}" for value in figures.values()) + f"{sum(figures.values()):7.2f}")


if __name__ == "__main__":
    main()
