"""The prediction log and the request ledger: what became of every request that a gateway accepted."""

from enum import StrEnum
from typing import ClassVar

from pydantic import Field

from schemas.base import Contract, Fact, Payload
from schemas.inference import Datatype


class PredictionLogMode(StrEnum):
    """While the log cannot be written, requests go on and the loss is counted, or they are refused; or there is no log."""

    BEST_EFFORT = "best_effort"
    REQUIRED = "required"
    OFF = "off"


class PredictionLogSettings(Contract):
    """How an endpoint's requests are logged.

    Every accepted request has its row (unless ``off``); inputs and outputs are kept for a sample of them, which depends on nothing but the
    request ids. A request is sampled as a whole.
    """

    mode: PredictionLogMode = PredictionLogMode.BEST_EFFORT
    sample_percent: float = Field(default=100.0, ge=0, le=100, description="Percent of the requests whose inputs and outputs are kept.")
    max_rows_per_s: int = Field(
        default=10_000,
        ge=0,
        description="Most rows of inputs and outputs kept per second by one gateway process; beyond it they are left out.",
    )


class OutcomeCounts(Contract):
    """A number of requests by how they ended."""

    completed: int = Field(default=0, ge=0)
    failed: int = Field(default=0, ge=0)
    expired: int = Field(default=0, ge=0)

    @property
    def total(self) -> int:
        """All of them."""
        return self.completed + self.failed + self.expired


class RequestCounters(Contract):
    """What one gateway process (an *instance*) has counted since it started.

    ``accepted`` = ``ended`` + in flight; ``ended`` = ``logged`` + ``lost`` + ``off`` + those whose row waits to be written. When everything
    is said, nothing is in flight and nothing waits.
    """

    accepted: int = Field(ge=0, description="Requests accepted; they are numbered 1, 2, 3 … (`sequence`).")
    ended: OutcomeCounts = Field(default_factory=OutcomeCounts)
    logged: OutcomeCounts = Field(default_factory=OutcomeCounts, description="Rows in the records of the log up to this one.")
    lost: OutcomeCounts = Field(default_factory=OutcomeCounts, description="Rows that were given up because the log could not take them.")
    off: OutcomeCounts = Field(default_factory=OutcomeCounts, description="Requests of endpoints whose log is off.")

    @property
    def in_flight(self) -> int:
        """Requests accepted that have not ended."""
        return self.accepted - self.ended.total

    @property
    def waiting(self) -> int:
        """Rows that wait to be written."""
        return self.ended.total - self.logged.total - self.lost.total - self.off.total


class BinaryData(Contract):
    """Where a tensor's bytes are: the next so many of what follows the head."""

    binary_data_size: int = Field(ge=0)


class LoggedTensor(Contract):
    """A tensor as the Open Inference Protocol's binary extension describes it."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    parameters: BinaryData


class PayloadBlock(Contract):
    """Inputs and outputs of some requests, row after row, in the order of ``requests``.

    ``requests`` has the ``sequence`` of each request and how many ``rows`` are its own. ``outputs`` is empty when the model failed.
    """

    requests: tuple[LoggedTensor, ...]
    inputs: tuple[LoggedTensor, ...]
    outputs: tuple[LoggedTensor, ...] = ()


class PredictionsLogged(Payload):
    """Requests to one deployment that have ended: one row each, in columns, and inputs and outputs of those that were sampled.

    This is the head; the record's value is its JSON, ``inference-header-content-length`` bytes long, and then the bytes of all its tensors
    in the order in which the head names them: ``columns``, then of each block ``requests``, ``inputs``, ``outputs``.

    Columns: ``sequence``, ``outcome``, ``error``, ``protocol``, ``principal`` (places in ``outcomes``, ``errors``, ``protocols`` and
    ``principals``), ``status`` (HTTP status), ``accepted_at`` (seconds since 1970), ``latency_s``, ``queue_s``, ``model_s`` (NaN where the
    request did not come so far), ``rows``, ``request_bytes``, ``response_bytes``, ``attempts``.

    ``deployment_id``, ``model_name`` and ``model_version`` are empty where a request ended before a version was chosen. ``recovered`` rows
    were written for a gateway that did not live to do it: their times are NaN, and a row that was written after all comes twice.
    """

    event_type = "millrace.gateway.predictions.logged.v1"
    topic = "millrace.predictions"
    content_type: ClassVar[str] = "application/octet-stream"
    instance: str = Field(description="The gateway process that accepted the requests; its own (`instance`, `sequence`) names a request.")
    record: int = Field(ge=1, description="1, 2, 3 … within an instance, over all endpoints.")
    endpoint_name: str
    deployment_id: str = ""
    model_name: str = ""
    model_version: str = ""
    recovered: bool = False
    request_ids: tuple[str, ...] = ()
    columns: tuple[LoggedTensor, ...] = ()
    outcomes: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    principals: tuple[str, ...] = ()
    payload: tuple[PayloadBlock, ...] = ()
    counters: RequestCounters

    @property
    def entity(self) -> str:
        return self.endpoint_name


class InstanceState(StrEnum):
    """Whether a gateway process lives, has stopped in good order, or was settled by another one because it was gone."""

    LIVE = "live"
    STOPPED = "stopped"
    LOST = "lost"


class RequestsCounted(Payload):
    """What a gateway process has counted up to now: said when it starts, while it has nothing else to log, and at its end."""

    event_type = "millrace.gateway.requests.counted.v1"
    topic = "millrace.predictions"
    instance: str
    state: InstanceState
    records: int = Field(ge=0, description="Records of the log that the instance has written before this one.")
    counters: RequestCounters
    in_doubt: int = Field(
        default=0, ge=0, description="Lost rows of which nobody knows whether the log has them: their gateway ended before it was told."
    )

    @property
    def entity(self) -> str:
        return self.instance


class PredictionLogLost(Fact):
    """Rows of the prediction log were given up because the broker did not take them; said once it does again."""

    event_type = "millrace.gateway.log.lost.v1"
    instance: str
    rows: OutcomeCounts
    reason: str

    @property
    def entity(self) -> str:
        return self.instance
