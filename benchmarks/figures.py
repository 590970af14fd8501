"""Figures of loads: percentiles, medians over rounds, and which lines of the table are reached. Pure."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What one run of load came to.

    Attributes
    ----------
    requests_per_s
        Requests that were answered with success, a second.
    p50_ms, p99_ms
        Percentiles of the time from sending a request to its whole answer.
    requests, errors
        Answers, and those that were errors (also broken connections and timeouts).
    """

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    errors: int


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of the values do not exceed (nearest rank); NaN when there are none.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.0
    """
    if not ordered:
        return math.nan
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[min(max(rank, 1), len(ordered)) - 1]


def median_load(rounds: Iterable[Load]) -> Load | None:
    """The median of each figure over the rounds; requests and errors are summed. None when there was no round."""
    loads = list(rounds)
    if not loads:
        return None
    return Load(
        statistics.median(load.requests_per_s for load in loads),
        statistics.median(load.p50_ms for load in loads),
        statistics.median(load.p99_ms for load in loads),
        sum(load.requests for load in loads),
        sum(load.errors for load in loads),
    )


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The order of one round: each begins one further, so that nobody always goes first."""
    shift = by % len(names) if names else 0
    return [*names[shift:], *names[:shift]]
