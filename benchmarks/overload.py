"""More requests than a model can answer, at a constant rate: how many are answered, how fast, and what becomes of the others."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import Request
from benchmarks.results import Overload


def measured(request: Request, capacity_per_s: float, times: float, deadline_ms: int, seconds: float, scratch: Path) -> Overload:
    """Load at so many times the capacity; raises ``RuntimeError`` when the generator fails."""
    body = scratch / "overload-body"
    body.write_bytes(request.body)
    headers = [f"{name}: {value}" for name, value in request.headers.items()]
    if deadline_ms:
        headers.append(f"x-request-timeout-ms: {deadline_ms}")
    options = ["--rate", str(times * capacity_per_s), "--seconds", str(seconds), "--body", str(body)]
    command = [sys.executable, "-m", "benchmarks.generator", "open", *options, request.url, *headers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the generator failed: {done.stderr.strip()[-500:]}")
    return read_summary(json.loads(done.stdout.strip().splitlines()[-1]), times, deadline_ms, seconds)


def read_summary(said: Mapping[str, Any], times: float, deadline_ms: int, seconds: float) -> Overload:
    """What ``benchmarks.generator open`` prints."""
    statuses = {int(status): count for status, count in said["statuses"].items()}
    sent = sum(statuses.values()) + said["timeouts"]
    refused = statuses.get(429, 0) + statuses.get(503, 0)
    other = sent - refused - statuses.get(200, 0)
    return Overload(
        times_capacity=times,
        deadline_ms=deadline_ms,
        offered_per_s=sent / seconds,
        answered_per_s=said["goodput_per_s"],
        refused_percent=100 * refused / max(1, sent),
        other_percent=100 * other / max(1, sent),
        p50_ms=said["p50_us"] / 1_000,
        p99_ms=said["p99_us"] / 1_000,
    )
