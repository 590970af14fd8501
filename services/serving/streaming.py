"""Streaming inference: records of an endpoint's requests topic in, one result per request on its results topic out.

At least once: a batch's results are acknowledged before its offsets are committed, and a result's id derives from its request's, so a
repeat is recognised. A record that cannot be answered becomes a failed result and a dead letter; nothing stops the partition but the
absence of a runner, and then the records wait on the topic.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from opentelemetry.trace import SpanKind

from libs import telemetry
from libs.errors import ConfigurationError, DeadlineExceededError, InvalidMessage, MillraceError, NotFoundError, NotReadyError
from libs.inference import v1, v2
from libs.inference.bodies import parse_object
from libs.inference.client import RunnerClient
from libs.inference.errors import InvalidInputError, RunnerGoneError
from libs.inference.requests import InferRequest
from libs.inference.routing import Route
from libs.inference.tokens import runner_token
from libs.messaging import cloudevents
from libs.messaging.broker import Broker, Offsets
from libs.messaging.cloudevents import Clock
from libs.messaging.consumer import POLL_S
from libs.messaging.dead_letter import dead_letter
from libs.messaging.errors import StoppingError
from libs.messaging.loop import Loop
from libs.messaging.records import Headers, Record
from libs.messaging.retry import Retry, keep_trying
from schemas.inference import Signature
from schemas.registry import Replica
from schemas.topics import Topic, inference_requests, inference_results
from services.serving.state import State

log = logging.getLogger(__name__)

SERVICE = "serving"
COMPLETED = "millrace.serving.inference.completed.v1"
FAILED = "millrace.serving.inference.failed.v1"
MOST_LOST_RUNNERS = 3
"""A record that was being answered when so many runners were lost is taken for the cause."""

CreateTopics = Callable[[Sequence[Topic]], Any]


@dataclass(frozen=True)
class StreamLimits:
    """How much is taken at once, and how long one record may take, in seconds."""

    batch_records: int
    timeout_s: float


class Runners:
    """Connections to the runners, one each."""

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file
        self._key = b""
        self._clients: dict[Replica, RunnerClient] = {}

    def open(self) -> None:
        """Read the platform's key; raises ``ConfigurationError`` when it cannot be read."""
        try:
            self._key = self._key_file.read_bytes().strip()
        except OSError as error:
            raise ConfigurationError(f"the runner key {self._key_file} cannot be read: {error.strerror}") from error

    def client(self, replica: Replica) -> RunnerClient:
        """The connection to one replica's runner."""
        if replica not in self._clients:
            self._clients[replica] = RunnerClient(replica.address, runner_token(self._key, replica.replica_id))
        return self._clients[replica]

    async def keep(self, live: set[Replica]) -> None:
        """Close the connections to all others."""
        for replica in self._clients.keys() - live:
            await self._clients.pop(replica).close()

    async def close(self) -> None:
        """Close all."""
        await self.keep(set())


class Streams:
    """One stream per endpoint, as a component: streams begin and end with their endpoints."""

    def __init__(
        self,
        state: State,
        broker: Broker,
        runners: Runners,
        create_topics: CreateTopics,
        limits: StreamLimits,
        clock: Clock = cloudevents.utc_now,
    ) -> None:
        self._state = state
        self._broker = broker
        self._runners = runners
        self._create_topics = create_topics
        self._limits = limits
        self._clock = clock
        self._streams: dict[str, tuple[Stream, asyncio.Task[None]]] = {}
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        self._runners.open()

    async def run(self) -> None:
        while not self._stopping.is_set():
            self._state.endpoints_changed.clear()
            await self._adjust(set(self._state.routing.endpoint_names()))
            await self._next_change()

    async def stop(self) -> None:
        self._stopping.set()
        await self._adjust(set())
        await self._runners.close()

    async def _adjust(self, wanted: set[str]) -> None:
        for name in self._streams.keys() - wanted:
            stream, task = self._streams.pop(name)
            await stream.stop()
            await asyncio.gather(task, return_exceptions=True)
        for name in sorted(wanted - self._streams.keys()):
            topics = (inference_requests(name), inference_results(name))
            await keep_trying(lambda topics=topics: self._create_topics(topics), Retry(), self._stopping)  # type: ignore[misc]
            stream = Stream(name, self._state, self._broker, self._runners, self._limits, self._clock)
            self._streams[name] = (stream, asyncio.create_task(stream.run(), name=f"stream {name}"))

    async def _next_change(self) -> None:
        """Return when endpoints changed; raise when a stream ended by itself."""
        changed = asyncio.create_task(self._state.endpoints_changed.wait())
        stopped = asyncio.create_task(self._stopping.wait())
        tasks = [task for _, task in self._streams.values()]
        done, _ = await asyncio.wait({changed, stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        changed.cancel()
        stopped.cancel()
        for task in done & set(tasks):
            task.result()
        live = {replica for wanted in self._state.deployments.values() for replica in wanted.snapshot.replicas}
        await self._runners.keep(live)


class Stream:
    """The records of one endpoint, taken in batches and answered concurrently; results go out in the order of the requests."""

    def __init__(self, endpoint: str, state: State, broker: Broker, runners: Runners, limits: StreamLimits, clock: Clock) -> None:
        self._endpoint = endpoint
        self._requests = inference_requests(endpoint).name
        self._results = inference_results(endpoint).name
        self._state = state
        self._runners = runners
        self._limits = limits
        self._clock = clock
        self._consumer = broker.consumer([self._requests], f"millrace-{SERVICE}-{endpoint}")
        self._producer = broker.producer()
        self._stopping = asyncio.Event()
        self._retry = Retry(first_s=0.1, longest_s=2.0)
        self._loop = Loop(f"stream {endpoint}", self._step, self._stopping)

    async def run(self) -> None:
        """Answer records until stopped; the records of a batch that was not finished are read again by whoever comes next."""
        try:
            await keep_trying(self._producer.start, self._retry, self._stopping)
            await keep_trying(self._consumer.start, self._retry, self._stopping)
            log.info("streaming %s", self._requests)
            await self._loop.run()
        except StoppingError:
            log.info("stream %s stops before it began", self._endpoint)
        finally:
            await self._consumer.stop()
            await self._producer.stop()

    async def stop(self) -> None:
        """Finish the batch."""
        self._stopping.set()
        await self._loop.stop()

    async def _step(self) -> None:
        records = await keep_trying(lambda: self._consumer.get_many(self._limits.batch_records, POLL_S), self._retry, self._stopping)
        if not records:
            return
        answers = await asyncio.gather(*(self._answer(record) for record in records))
        outgoing = [record for answer in answers for record in answer]
        await keep_trying(lambda: self._producer.send(outgoing), self._retry, self._stopping)
        offsets: Offsets = {record.place: record.offset + 1 for record in records}
        await keep_trying(lambda: self._consumer.commit(offsets), self._retry, self._stopping)

    async def _answer(self, record: Record) -> list[Record]:
        """What goes out for a record: its result, and the dead letter of a failed one."""
        context = telemetry.extract(record.header("traceparent"))
        with telemetry.tracer().start_as_current_span(f"process {self._requests}", context, SpanKind.CONSUMER):
            try:
                result = await self._predict(record)
            except StoppingError:
                raise
            except MillraceError as error:
                letter = dead_letter(record, error, SERVICE, self._clock())
                return [self._result(record, {"status": "failed", "error": error.message}), letter]
            return [self._result(record, {"status": "completed", **result})]

    async def _predict(self, record: Record) -> Mapping[str, Any]:
        document = request_document(record)
        lost = 0
        while True:
            route = await keep_trying(self._route, self._retry, self._stopping)
            request = parse(document, route.signature)
            try:
                client = self._runners.client(route.replicas[0])
                response = await client.infer(request.inputs, outputs=request.outputs, timeout_s=self._limits.timeout_s)
            except DeadlineExceededError as error:
                raise DeadlineExceededError(f"the model did not answer within {self._limits.timeout_s:g} s") from error
            except RunnerGoneError as error:
                lost += 1
                if lost >= MOST_LOST_RUNNERS:
                    raise InvalidMessage(f"{lost} runners were lost while they answered this record: {error}") from error
                await self._until_back()
                continue
            return {"model_name": route.model_name, "model_version": route.version, "predictions": v1.predictions(response)}

    async def _route(self) -> Route:
        try:
            return self._state.routing.pick(self._endpoint, random=random.random())  # noqa: S311 - a traffic split
        except NotFoundError as error:
            # The endpoint was deleted while its records were read: the stream is about to stop, and they stay on the topic.
            raise NotReadyError(error.message) from error

    async def _until_back(self) -> None:
        """Wait until a runner answers again, this one or another."""

        async def ping() -> None:
            current = await self._route()
            await self._runners.client(current.replicas[0]).ping(timeout_s=1.0)

        await keep_trying(ping, self._retry, self._stopping)

    def _result(self, record: Record, outcome: Mapping[str, Any]) -> Record:
        request_id = request_id_of(record)
        body = orjson.dumps(
            {"request_id": request_id, "endpoint_name": self._endpoint, **outcome},
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
        return Record(self._results, record.key or request_id.encode(), body, self._headers(request_id, outcome["status"]))

    def _headers(self, request_id: str, status: str) -> Headers:
        event_type = COMPLETED if status == "completed" else FAILED
        attributes = {
            "content-type": "application/json",
            "ce_specversion": "1.0",
            "ce_id": cloudevents.derived_id(request_id, f"{self._results} result"),
            "ce_type": event_type,
            "ce_source": f"/millrace/{SERVICE}",
            "ce_time": self._clock().isoformat().replace("+00:00", "Z"),
            "ce_subject": self._endpoint,
            "ce_correlationid": request_id,
            "traceparent": telemetry.current_traceparent(),
        }
        return tuple((name, value.encode()) for name, value in attributes.items() if value)


def request_id_of(record: Record) -> str:
    """The request id: ``ce_id``, else the id of a structured event, else the key, else the place in the log."""
    event_id = record.header("ce_id") or _structured(record).get("id")
    if isinstance(event_id, str) and event_id:
        return event_id
    if record.key:
        return record.key.decode("utf-8", "replace")
    return f"{record.topic}-{record.partition}-{record.offset}"


def request_document(record: Record) -> dict[str, Any]:
    """The request body: the record's value, or the data of a structured CloudEvent.

    Raises
    ------
    InvalidMessage
        When there is no JSON object to be found.
    """
    if not record.value:
        raise InvalidMessage("the record has no value")
    data = _structured(record).get("data")
    if data is not None:
        if not isinstance(data, dict):
            raise InvalidMessage("the CloudEvent's data must be a JSON object")
        return data
    try:
        return parse_object(record.value)
    except InvalidInputError as error:
        raise InvalidMessage(error.message.replace("the request body", "the record's value")) from error


def _structured(record: Record) -> dict[str, Any]:
    """The envelope of a structured CloudEvent; empty for any other record."""
    if not record.value or record.header("ce_specversion") is not None or b"specversion" not in record.value:
        return {}
    try:
        envelope = orjson.loads(record.value)
    except orjson.JSONDecodeError:
        return {}
    return envelope if isinstance(envelope, dict) and "specversion" in envelope else {}


def parse(document: Mapping[str, Any], signature: Signature) -> InferRequest:
    """Read a V1 or V2 body; raises ``InvalidInputError``."""
    inputs = document.get("inputs")
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) and "datatype" in inputs[0]:
        return v2.from_document(document, signature)
    return v1.from_document(document, signature)
