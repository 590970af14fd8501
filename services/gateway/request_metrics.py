"""What is counted of the requests and batches of one deployment."""

import time

import numpy as np
import numpy.typing as npt

from libs.errors import MillraceError
from libs.metrics import Counter, Histogram, Metrics
from libs.metrics import definitions as metric
from libs.predictions.records import OUTCOMES
from services.gateway.prediction_log import Rows
from services.gateway.predictions import Protocol
from services.gateway.statistics import Statistics

PROTOCOLS = tuple(Protocol)
"""The protocol that a code in a row stands for."""


class RequestMetrics:
    """The instruments of one deployment.

    Attributes
    ----------
    answered
        Batches that have been answered and not been counted: rows, seconds, seconds inside the model (0: it failed), and whether
        they came to something.
    statistics
        The same requests and batches in the words of Triton's statistics.
    """

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str]) -> None:
        self._metrics = metrics
        self._labels = labels
        self._ended: dict[int, Counter] = {}
        self._batches: dict[str, Counter] = {}
        self.answered: list[tuple[float, float, float, bool]] = []
        self.statistics = Statistics()
        self.rows = metrics.counter(metric.REQUEST_ROWS, *labels)
        self.request_bytes = metrics.counter(metric.REQUEST_BYTES, *labels)
        self.response_bytes = metrics.counter(metric.RESPONSE_BYTES, *labels)
        self.retries = metrics.counter(metric.REQUEST_RETRIES, *labels)
        self.request_s = metrics.histogram(metric.REQUEST_SECONDS, *labels)
        self.queue_s = metrics.histogram(metric.QUEUE_SECONDS, *labels)
        self.batch_s = metrics.histogram(metric.BATCH_SECONDS, *labels)
        self.model_s = metrics.histogram(metric.MODEL_SECONDS, *labels)
        self.batch_rows = metrics.histogram(metric.BATCH_ROWS, *labels)
        self.batches_in_flight = metrics.gauge(metric.BATCHES_IN_FLIGHT, *labels)

    def batch(self, reason: str) -> Counter:
        """Counter of the batches that left for a reason."""
        counter = self._batches.get(reason)
        if counter is None:
            counter = self._batches[reason] = self._metrics.counter(metric.BATCHES, *self._labels, reason)
        return counter

    def batch_error(self, error: MillraceError) -> None:
        """Count a batch that came to nothing."""
        self._metrics.counter(metric.BATCH_ERRORS, *self._labels, error_kind(type(error))).value += 1

    def count(self, rows: Rows) -> None:
        """Count requests that have ended."""
        for code, number in enumerate(np.bincount(rows["protocol"].astype(np.int64) * 3 + rows["outcome"]).tolist()):
            if number:
                self._outcome(code).value += number
        self.rows.value += int(rows["rows"].sum())
        self.request_bytes.value += int(rows["request_bytes"].sum())
        self.response_bytes.value += int(rows["response_bytes"].sum())
        self.retries.value += int(np.maximum(rows["attempts"], 1).sum()) - len(rows)
        _observe(self.request_s, rows["ended_s"] - rows["accepted_s"])
        sent = rows[rows["sent_s"] > 0]
        _observe(self.queue_s, sent["sent_s"] - sent["queued_s"])
        self.statistics.count_requests(rows, time.time() - time.monotonic())

    def count_batches(self) -> None:
        """Count the batches that have been answered."""
        if not self.answered:
            return
        rows, seconds, model_s, is_good = np.array(self.answered).T
        self.answered.clear()
        _observe(self.batch_rows, rows)
        _observe(self.batch_s, seconds)
        _observe(self.model_s, model_s[model_s > 0])
        self.statistics.count_executions(rows[is_good > 0], model_s[is_good > 0])

    def _outcome(self, code: int) -> Counter:
        counter = self._ended.get(code)
        if counter is None:
            protocol, outcome = PROTOCOLS[code // 3], OUTCOMES[code % 3]
            counter = self._ended[code] = self._metrics.counter(metric.REQUESTS, *self._labels, protocol.value, outcome)
        return counter


def error_kind(kind: type[MillraceError]) -> str:
    """An error's name in metrics and in the log.

    >>> from libs.errors import DeadlineExceededError
    >>> error_kind(DeadlineExceededError)
    'deadline_exceeded'
    """
    name = kind.__name__.removesuffix("Error")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _observe(histogram: Histogram, values: npt.NDArray[np.float64]) -> None:
    if len(values):
        buckets = np.searchsorted(histogram.bounds, values)
        histogram.add(np.bincount(buckets, minlength=len(histogram.counts)).tolist(), float(values.sum()))
