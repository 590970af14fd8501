"""Counters, gauges and histograms as plain objects: what they do while requests are answered is one addition.

Nothing here is locked: an instrument belongs to one thread, or is only ever added to under the interpreter's own lock by threads that can
bear to lose a count.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from libs.metrics.definitions import METRICS, Kind, Metric

Child = TypeVar("Child")

Labels = tuple[str, ...]
"""Values of a metric's labels, in the order of its definition."""


class Counter:
    """Only ever grows: ``counter.value += 1``."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Gauge:
    """Goes up and down: ``gauge.value = 3``."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Histogram:
    """A distribution: how many values fell under each bound, and their sum.

    Examples
    --------
    >>> histogram = Histogram((1.0, 2.0))
    >>> histogram.observe(2.0)
    >>> histogram.observe(9.0)
    >>> histogram.counts, histogram.total
    ([0, 1, 1], 11.0)
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value; one that equals a bound falls under it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, counts: Sequence[int], total: float) -> None:
        """Count many values that have been sorted into the buckets already."""
        self.counts = [mine + more for mine, more in zip(self.counts, counts, strict=True)]
        self.total += total


@dataclass(frozen=True, slots=True)
class Sample:
    """What one instrument has come to; of a histogram ``counts`` and the sum, of others the value.

    ``worker``: whose instrument it is, where a service has several processes and this is another's.
    """

    metric: Metric
    labels: Labels
    value: float
    counts: tuple[int, ...] = ()
    worker: str = ""


_KNOWN = {metric.name: metric for metric in METRICS}


class Metrics:
    """All instruments of one process, or of one part of it.

    Whoever counts often asks for its instruments once and keeps them.

    Attributes
    ----------
    worker
        Of the whole process's: which of several it is, where a service has several.
    """

    def __init__(self) -> None:
        self.worker = ""
        self._counters: dict[tuple[Metric, Labels], Counter] = {}
        self._gauges: dict[tuple[Metric, Labels], Gauge] = {}
        self._histograms: dict[tuple[Metric, Labels], Histogram] = {}
        self._watched: dict[Metric, Callable[[], Iterable[tuple[Labels, float]]]] = {}
        self._before: list[Callable[[], None]] = []

    def counter(self, metric: Metric, *labels: str) -> Counter:
        """The counter of a metric with these label values."""
        return self._child(self._counters, Kind.COUNTER, metric, labels, Counter)

    def gauge(self, metric: Metric, *labels: str) -> Gauge:
        """The gauge of a metric with these label values."""
        return self._child(self._gauges, Kind.GAUGE, metric, labels, Gauge)

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        """The histogram of a metric with these label values."""
        return self._child(self._histograms, Kind.HISTOGRAM, metric, labels, lambda: Histogram(metric.buckets))

    def forget(self, metric: Metric, *labels: str) -> None:
        """Let go of an instrument whose subject is no more; only gauges should be forgotten while somebody looks."""
        self._counters.pop((metric, labels), None)
        self._gauges.pop((metric, labels), None)
        self._histograms.pop((metric, labels), None)

    def watch(self, metric: Metric, read: Callable[[], Iterable[tuple[Labels, float]]]) -> None:
        """Have a gauge read when somebody looks, instead of kept up to date: all its label values with their values."""
        self._check(metric, Kind.GAUGE)
        self._watched[metric] = read

    def before_reading(self, settle: Callable[[], None]) -> None:
        """Have something done each time before the instruments are read: what was put off gets counted."""
        self._before.append(settle)

    def samples(self) -> list[Sample]:
        """Everything as it is now."""
        for settle in self._before:
            settle()
        return list(self._read())

    def _read(self) -> Iterator[Sample]:
        for (metric, labels), counter in list(self._counters.items()):
            yield Sample(metric, labels, counter.value)
        for (metric, labels), gauge in list(self._gauges.items()):
            yield Sample(metric, labels, gauge.value)
        for (metric, labels), histogram in list(self._histograms.items()):
            yield Sample(metric, labels, histogram.total, tuple(histogram.counts))
        for metric, read in self._watched.items():
            for labels, value in read():
                yield Sample(metric, labels, value)

    def _child(
        self, held: dict[tuple[Metric, Labels], Child], kind: Kind, metric: Metric, labels: Labels, make: Callable[[], Child]
    ) -> Child:
        child = held.get((metric, labels))
        if child is None:
            self._check(metric, kind)
            if len(labels) != len(metric.labels):
                raise TypeError(f"{metric.name} has the labels {metric.labels}, not {labels}")
            child = held[metric, labels] = make()
        return child

    @staticmethod
    def _check(metric: Metric, kind: Kind) -> None:
        if metric.kind is not kind:
            raise TypeError(f"{metric.name} is a {metric.kind}, not a {kind}")


def summed(groups: Iterable[Iterable[Sample]]) -> list[Sample]:
    """The samples of several parts of a process as those of one: equal ones are added."""
    together: dict[tuple[Metric, Labels, str], Sample] = {}
    for sample in (sample for samples in groups for sample in samples):
        key = (sample.metric, sample.labels, sample.worker)
        other = together.get(key)
        together[key] = sample if other is None else _sum(other, sample)
    return list(together.values())


def _sum(one: Sample, other: Sample) -> Sample:
    counts = tuple(mine + more for mine, more in zip(one.counts, other.counts, strict=True))
    return replace(one, value=one.value + other.value, counts=counts)


def as_document(samples: Iterable[Sample]) -> list[list[Any]]:
    """Samples as JSON values, for another process; ``from_document`` reads them."""
    return [[sample.metric.name, sample.labels, sample.value, sample.counts] for sample in samples]


def from_document(document: Iterable[Sequence[Any]], worker: str) -> list[Sample]:
    """Samples of another process; metrics that are not known here, or differ, are left out."""
    samples = []
    for name, labels, value, counts in document:
        metric = _KNOWN.get(name)
        if metric is not None and len(labels) == len(metric.labels) and len(counts) == _bucket_count(metric):
            samples.append(Sample(metric, tuple(labels), value, tuple(counts), worker))
    return samples


def _bucket_count(metric: Metric) -> int:
    return len(metric.buckets) + 1 if metric.kind is Kind.HISTOGRAM else 0


def by_metric(samples: Iterable[Sample]) -> Mapping[Metric, list[Sample]]:
    """Samples of each metric together, in the order of the definitions."""
    groups: dict[Metric, list[Sample]] = {metric: [] for metric in METRICS}
    for sample in samples:
        groups[sample.metric].append(sample)
    return {metric: group for metric, group in groups.items() if group}


PROCESS = Metrics()
"""What libraries count for the whole process: events handled, errors of the broker."""
