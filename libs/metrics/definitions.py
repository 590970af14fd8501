"""Every metric of Millrace: name, kind, meaning, labels. Nobody else writes a metric's name.

Times are seconds and sizes are bytes, as the name says. No label takes values that callers choose freely: endpoints, models, versions and
deployments are those that exist.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a metric is: only ever growing, going up and down, or a distribution."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, eq=False)
class Metric:
    """A row of the table; ``buckets`` are the upper bounds of a histogram's buckets, in its unit, without the last (infinite) one."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""From what the fastest model takes to the longest deadline, each about twice the one before."""

POWERS = tuple(float(2**power) for power in range(0, 15, 2))
"""1, 4, 16 … 16 384: rows and records of a batch."""

_DEPLOYMENT = ("endpoint", "model_name", "model_version")


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, meaning, labels, buckets)


# Requests at the gateway

REQUESTS_ACCEPTED = _counter("millrace_requests_accepted_total", "Predict requests taken; each ends exactly once.", "endpoint", "protocol")
REQUESTS = _counter(
    "millrace_requests_total",
    "Predict requests that ended, by outcome: completed, failed or expired.",
    *_DEPLOYMENT,
    "protocol",
    "outcome",
)
REQUESTS_REFUSED = _counter(
    "millrace_requests_refused_total",
    "Predict requests not taken, by reason; the endpoint is empty where it does not exist.",
    "endpoint",
    "protocol",
    "reason",
)
REQUESTS_IN_FLIGHT = _gauge("millrace_requests_in_flight", "Predict requests taken that have not ended.", "endpoint")
REQUESTS_QUEUED = _gauge("millrace_requests_queued", "Predict requests that wait for a batch.", *_DEPLOYMENT)
REQUEST_ROWS = _counter("millrace_request_rows_total", "Rows of the predict requests that ended.", *_DEPLOYMENT)
REQUEST_RETRIES = _counter("millrace_request_retries_total", "Attempts beyond the first that predict requests took.", *_DEPLOYMENT)
REQUEST_SECONDS = _histogram("millrace_request_seconds", "From a predict request's acceptance to its end.", SECONDS, *_DEPLOYMENT)
QUEUE_SECONDS = _histogram("millrace_queue_seconds", "What predict requests waited for their batch to leave.", SECONDS, *_DEPLOYMENT)
BATCH_SECONDS = _histogram("millrace_batch_seconds", "From a batch's leaving to its answer.", SECONDS, *_DEPLOYMENT)
MODEL_SECONDS = _histogram("millrace_model_seconds", "What a batch took inside the model, as the runner says.", SECONDS, *_DEPLOYMENT)
BATCH_ROWS = _histogram("millrace_batch_rows", "Rows of a batch.", POWERS, *_DEPLOYMENT)
BATCHES = _counter(
    "millrace_batches_total",
    "Batches that left, by why: a replica was idle, an earlier one returned, it was full, its request has to be asked alone, or it is a "
    "piece of a large one.",
    *_DEPLOYMENT,
    "reason",
)
BATCHES_IN_FLIGHT = _gauge("millrace_batches_in_flight", "Batches that replicas are working on.", *_DEPLOYMENT)
BATCH_ERRORS = _counter("millrace_batch_errors_total", "Batches that came to nothing, by error.", *_DEPLOYMENT, "error")

# The gateway's HTTP and gRPC doors

REQUEST_BYTES = _counter("millrace_request_bytes_total", "Bytes of the bodies of predict requests that ended.", *_DEPLOYMENT)
RESPONSE_BYTES = _counter("millrace_response_bytes_total", "Bytes of the bodies of their answers.", *_DEPLOYMENT)
CONNECTIONS = _gauge("millrace_connections", "Open connections of clients, by transport: http or grpc.", "transport")
HTTP_REFUSED = _counter(
    "millrace_http_refused_total",
    "Requests and connections that the HTTP server itself refused, by status; those cut without a word for want of room are 503.",
    "status",
)

# The prediction log and the request ledger

LOG_ROWS = _counter("millrace_log_rows_total", "Ended requests whose row the broker has acknowledged, by outcome.", "outcome")
LOG_LOST = _counter("millrace_log_lost_total", "Ended requests whose row was given up, by outcome.", "outcome")
LOG_OFF = _counter("millrace_log_off_total", "Ended requests of endpoints that keep no log, by outcome.", "outcome")
LOG_PAYLOAD_REQUESTS = _counter(
    "millrace_log_payload_requests_total", "Requests whose inputs and outputs were put into the log.", "endpoint"
)
LOG_PAYLOAD_LEFT_OUT = _counter(
    "millrace_log_payload_left_out_total",
    "Requests that were sampled and whose inputs and outputs were left out of the log: over a rate, oversized, or no room.",
    "endpoint",
    "reason",
)
LOG_RECORDS = _counter("millrace_log_records_total", "Records of the log that the broker has acknowledged.")
LOG_BYTES = _counter("millrace_log_bytes_total", "Bytes of these records.")
LOG_FAILURES = _counter("millrace_log_failures_total", "Attempts at writing to the log that failed.")
LOG_QUEUE_BYTES = _gauge("millrace_log_queue_bytes", "Bytes of the log that wait for the broker.")
LOG_AVAILABLE = _gauge("millrace_log_available", "1 while the log takes records, 0 while it does not.")
LEDGER_RECOVERED = _counter(
    "millrace_ledger_recovered_total", "Requests whose end was settled for a gateway that did not live to do it, by outcome.", "outcome"
)
GATEWAY_INSTANCE = _gauge("millrace_gateway_instance_info", "1 for each living gateway process, by the id it has in the log.", "instance")

# Events and the broker, in every service

EVENTS_HANDLED = _counter(
    "millrace_events_handled_total", "Events handled, by outcome: ok or dead_lettered.", "service", "event_type", "outcome"
)
EVENT_SECONDS = _histogram("millrace_event_seconds", "What handling an event took, with its retries.", SECONDS, "service", "event_type")
DEAD_LETTERS = _counter("millrace_dead_letters_total", "Records that went to the dead-letter topic, by topic.", "service", "topic")
DAMAGED_COPIES = _counter(
    "millrace_damaged_copies_total",
    "Copies on this machine, of artifacts and of environments, that were not what they should be, and were replaced before they were used; "
    "serving counts for its replicas.",
    "service",
    "kind",
)
BROKER_ERRORS = _counter("millrace_broker_errors_total", "Calls of the broker that failed, by error.", "error")

# Streaming inference

STREAM_RECORDS = _counter(
    "millrace_stream_records_total",
    "Inference records that ended, by outcome: completed, failed, expired or dead_lettered.",
    "endpoint",
    "outcome",
)
STREAM_LAG = _gauge("millrace_stream_lag_records", "Inference records that wait on a partition.", "endpoint", "partition")
STREAM_IN_FLIGHT = _gauge("millrace_stream_in_flight", "Inference records read and not yet committed.", "endpoint")
STREAM_PAUSED = _gauge("millrace_stream_paused_partitions", "Partitions not read at the moment because enough is in flight.", "endpoint")
STREAM_BATCH_RECORDS = _histogram("millrace_stream_batch_records", "Inference records that a runner was asked at once.", POWERS, "endpoint")
STREAM_RECORD_SECONDS = _histogram(
    "millrace_stream_record_seconds", "From an inference record's reading to the commit of its result.", SECONDS, "endpoint"
)
STREAM_TRANSACTIONS = _counter(
    "millrace_stream_transactions_total",
    "Transactions of results and offsets, by outcome: committed, aborted or doubtful.",
    "endpoint",
    "outcome",
)
STREAM_TRANSACTION_SECONDS = _histogram("millrace_stream_transaction_seconds", "What committing a transaction took.", SECONDS, "endpoint")
STREAM_PRODUCERS = _counter(
    "millrace_stream_producers_total", "Transactional producers made, the first and those after an error.", "endpoint"
)
STREAM_FAILURES = _counter(
    "millrace_stream_failures_total",
    "Times a stream failed and began anew, while the others went on.",
    "endpoint",
)
STREAM_FAILING = _gauge("millrace_stream_failing", "1 while a stream has failed and has not advanced since.", "endpoint")

# Serving

DEPLOYMENTS = _gauge("millrace_deployments", "Deployments, by status.", "status")
REPLICAS = _gauge("millrace_replicas", "Replicas of a deployment that answer.", "endpoint", "deployment")
REPLICAS_WANTED = _gauge("millrace_replicas_wanted", "Replicas that a deployment should have.", "endpoint", "deployment")
RUNNER_RESTARTS = _counter(
    "millrace_runner_restarts_total",
    "Replicas that joined a deployment while it ran: a runner or its replica was started again.",
    "endpoint",
    "deployment",
)
RECONCILE_FAILURES = _counter("millrace_reconcile_failures_total", "Attempts at making Ray Serve equal the desired state that failed.")


METRICS: tuple[Metric, ...] = tuple(value for value in list(vars().values()) if isinstance(value, Metric))
"""All of them, in the order above."""
