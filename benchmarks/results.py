"""What a run of ``benchmarks.serving`` found, as it is kept in a file; figures only, no judgement."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from benchmarks.figures import Load, median_load


@dataclass
class PeerResult:
    """A server's loads by point, one for each round; ``problem`` says why there are none, or not all."""

    title: str
    measured_at: str
    loads: dict[str, list[Load]] = field(default_factory=dict)
    problem: str = ""


@dataclass
class Cost:
    """Requests a second of the same gateway with the prediction log and tracing on and off, one value for each round."""

    point: str
    on: list[float]
    off: list[float]


@dataclass
class Memory:
    """Resident memory of the gateway's processes under load: seconds since its start, bytes."""

    samples: list[tuple[float, int]]


@dataclass
class Overload:
    """An open loop at a multiple of what the model can answer.

    Attributes
    ----------
    deadline_ms
        What the requests give as their own deadline; 0: the gateway's default.
    offered_per_s, answered_per_s
        Requests sent, and answered with success, a second.
    refused_percent, other_percent
        Share of 429 and 503, and of everything else that is no success.
    p50_ms, p99_ms
        Of those answered with success, from when they were due.
    """

    times_capacity: float
    deadline_ms: int
    offered_per_s: float
    answered_per_s: float
    refused_percent: float
    other_percent: float
    p50_ms: float
    p99_ms: float


@dataclass
class Growth:
    """Load by number of gateway workers and replicas."""

    point: str
    workers: int
    replicas: int
    loads: list[Load]


@dataclass
class Share:
    """Percent of one core that a part takes under a load."""

    point: str
    part: str
    percent: float


@dataclass
class Results:
    """Everything; each section is replaced when it is measured again."""

    machine: str = ""
    conditions: dict[str, str] = field(default_factory=dict)
    peers: dict[str, PeerResult] = field(default_factory=dict)
    cost: list[Cost] = field(default_factory=list)
    memory: Memory | None = None
    overload: list[Overload] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    measured_at: dict[str, str] = field(default_factory=dict)

    def load(self, peer: str, point: str) -> Load | None:
        """The median over the rounds, if it was measured."""
        result = self.peers.get(peer)
        return median_load(result.loads.get(point, ())) if result else None


_ADAPTER: TypeAdapter[Any] = TypeAdapter(Results)


def read(path: Path) -> Results:
    """What is kept; nothing when there is no file."""
    return _ADAPTER.validate_json(path.read_bytes()) if path.exists() else Results()


def write(path: Path, results: Results) -> None:
    """Keep it; whoever reads at the same time sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(_ADAPTER.dump_json(results, indent=1) + b"\n")
    partial.replace(path)
