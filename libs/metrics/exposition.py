"""Samples as Prometheus and OpenMetrics read them.

References
----------
Prometheus text format 0.0.4; OpenMetrics 1.0. The client library chooses between them by ``Accept`` and writes both.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from libs.metrics.definitions import Kind, Metric
from libs.metrics.instruments import PROCESS, Metrics, Sample, by_metric, summed

WORKER = "worker"
"""The label that tells processes of one service apart."""

Read = Callable[[], Iterable[Sample]]


class Exposition(Collector):
    """Writes what some sources say, and what the kernel says of this process (``process_*``).

    Where a service has several processes, each has series of its own, with the label ``worker``: added up they would seem to begin again
    whenever one of them is restarted.

    Parameters
    ----------
    sources
        Called at each reading; equal samples of several sources are added.
    """

    def __init__(self, *sources: Read) -> None:
        self._sources = sources
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Family]:
        """All families; what the client library calls."""
        for metric, samples in by_metric(summed(read() for read in self._sources)).items():
            yield _family(metric, samples)
        for family in self._process.collect():
            if PROCESS.worker:
                family.samples = [each._replace(labels={**each.labels, WORKER: PROCESS.worker}) for each in family.samples]
            yield family

    def render(self, accept: str | None) -> tuple[bytes, str]:
        """The text and its content type: OpenMetrics to whoever accepts it, the older text format to everybody else."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self), content_type


def of(*metrics: Metrics) -> Exposition:
    """An exposition of some instruments."""
    return Exposition(*(each.samples for each in metrics))


def _family(metric: Metric, samples: list[Sample]) -> Family:
    names = (*metric.labels, WORKER) if PROCESS.worker or any(sample.worker for sample in samples) else metric.labels
    if metric.kind is Kind.HISTOGRAM:
        histograms = HistogramMetricFamily(metric.name, metric.meaning, labels=names)
        bounds = (*map(floatToGoString, metric.buckets), "+Inf")
        for sample in samples:
            histograms.add_metric(_labels(sample, names), list(zip(bounds, _running(sample.counts), strict=True)), sample.value)
        return histograms
    family = (CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily)(metric.name, metric.meaning, labels=names)
    for sample in samples:
        family.add_metric(_labels(sample, names), sample.value)
    return family


def _labels(sample: Sample, names: Sequence[str]) -> Sequence[str]:
    return (*sample.labels, sample.worker or PROCESS.worker)[: len(names)]


def _running(counts: Iterable[int]) -> Iterator[int]:
    total = 0
    for count in counts:
        total += count
        yield total
