"""A stream's log on Kafka, by confluent-kafka: its client puts the consumer's group metadata into a transaction's offsets (KIP-447), so the
broker refuses those of a process that has lost its partitions. aiokafka 0.14 does not; docs/adr/0007 has the test.

On the embedded broker, which has transactions and groups in name only, records are written and acknowledged first, offsets after them, and
the process takes all partitions: at least once.

References
----------
KIP-447, "Producer scalability for exactly once semantics"; KIP-345, static membership.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from libs.messaging.records import MAX_RECORD_BYTES
from libs.metrics import Metrics
from libs.metrics.definitions import STREAM_PAUSED, STREAM_PRODUCERS, STREAM_TRANSACTION_SECONDS, STREAM_TRANSACTIONS
from libs.settings import KafkaSettings
from schemas.topics import inference_requests
from services.streaming.errors import SessionLostError, SupersededError
from services.streaming.log import Chunk, Given, Taken
from services.streaming.threads import CallThread

log = logging.getLogger(__name__)

TRANSACTION_TIMEOUT_MS = 10_000
"""A transaction takes milliseconds. The broker aborts one that a dead process left open after so long; until then its results, and all that
are written behind them, are hidden from ``read_committed`` readers."""

COMMIT_TIMEOUT_S = 30.0
"""A transaction that has not ended by then is in doubt, and so are the clients in whose hands it is."""

AFTER_OUTAGE_S = 60.0
"""For so long after its broker was away a member that is fenced may have been fenced by its own past: a broker that was killed can know
another generation of the group than its members do. It comes back under its name; if another process has that by now, one of the two is
fenced again."""

_CALL_TIMEOUT_S = 20.0
_CLOSE_S = 5.0
_LAG_TIMEOUT_S = 5.0
_SLICE = 256
_PASSING = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TRANSPORT,
        KafkaError._TIMED_OUT,
        KafkaError._RESOLVE,
        KafkaError._MAX_POLL_EXCEEDED,
        KafkaError._AUTO_OFFSET_RESET,
    }
)
"""What a consumer says of itself while it recovers by itself."""

_AWAY = (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT)


class KafkaStreamLog:
    """One consumer and one producer, each with a thread of its own; their calls block, and release the interpreter meanwhile.

    Parameters
    ----------
    prefetch_bytes
        What the consumer fetches ahead at most.
    """

    def __init__(self, settings: KafkaSettings, endpoint_name: str, prefetch_bytes: int, metrics: Metrics) -> None:
        self._settings = settings
        self._topic = inference_requests(endpoint_name).name
        self._group = f"millrace-streaming-{endpoint_name}"
        self._prefetch_bytes = prefetch_bytes
        self._timeout_s = settings.request_timeout_ms / 1000
        self._reading = CallThread(f"reads {endpoint_name}")
        self._writing = CallThread(f"writes {endpoint_name}")
        self._consumer: Consumer | None = None
        self._producer: Producer | None = None
        self._committing = threading.Lock()
        self._is_closing = False
        self._assignment = 0
        self._member: Any = None
        self._is_paused = False
        self._held: list[Taken] = []
        self._taken_to: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._fatal: KafkaError | None = None
        self._away_s = -math.inf
        self._undelivered: KafkaError | None = None
        self._transactions = {
            outcome: metrics.counter(STREAM_TRANSACTIONS, endpoint_name, outcome) for outcome in ("committed", "aborted", "doubtful")
        }
        self._transaction_seconds = metrics.histogram(STREAM_TRANSACTION_SECONDS, endpoint_name)
        self._producers = metrics.counter(STREAM_PRODUCERS, endpoint_name)
        self._paused_partitions = metrics.gauge(STREAM_PAUSED, endpoint_name)

    async def open(self) -> None:
        await self._writing.call(self._open_producer)
        await self._reading.call(self._open_consumer)

    async def close(self) -> None:
        self._is_closing = True
        reading = asyncio.ensure_future(self._reading.call(self._close_consumer))
        writing = asyncio.ensure_future(self._writing.call(self._close_producer))
        await asyncio.wait({reading, writing}, timeout=_CLOSE_S)
        for closing in (reading, writing):
            closing.cancel()
        self._reading.end()
        self._writing.end()

    async def take(self, max_records: int, max_bytes: int, timeout_s: float) -> Chunk:
        return await self._reading.call(self._take, max_records, max_bytes, timeout_s)

    async def stay(self, timeout_s: float) -> None:
        await self._reading.call(self._stay, timeout_s)

    async def commit(self, assignment: int, results: Sequence[Given], offsets: Mapping[int, int]) -> bool:
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                return await self._writing.call(self._commit, assignment, results, offsets)
        except TimeoutError as error:
            self._transactions["doubtful"].value += 1
            raise SessionLostError(f"a transaction of {self._topic} did not end within {COMMIT_TIMEOUT_S:.0f} s") from error

    async def lags(self) -> dict[int, int]:
        return await self._reading.call(self._lags)

    @property
    def _reader(self) -> Consumer:
        if self._consumer is None:
            raise SessionLostError(f"the consumer of {self._topic} is closed")
        return self._consumer

    @property
    def _writer(self) -> Producer:
        if self._producer is None:
            raise SessionLostError(f"the producer of results of {self._topic} is closed")
        return self._producer

    # The producer's thread ---------------------------------------------------------------------------------------------------------

    def _open_producer(self) -> None:
        transactions = {} if self._settings.embedded else self._transactional()
        with _translated("connecting a producer"):
            self._producer = Producer(
                {
                    **self._common(),
                    **transactions,
                    "enable.idempotence": True,
                    "linger.ms": 50,
                    "message.max.bytes": 2 * MAX_RECORD_BYTES,
                    "partitioner": "murmur2_random",
                    "delivery.report.only.error": True,
                    "on_delivery": self._on_delivery,
                }
            )
            if transactions:
                self._producer.init_transactions(self._timeout_s)
        self._producers.value += 1

    def _transactional(self) -> dict[str, Any]:
        return {
            "transactional.id": f"{self._group}-{self._settings.group_instance}",
            "transaction.timeout.ms": TRANSACTION_TIMEOUT_MS,
        }

    def _close_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            # What is still queued belongs to a transaction that will not be committed.
            with suppress(KafkaException):
                producer.purge(in_queue=True, in_flight=True, blocking=False)

    def _commit(self, assignment: int, results: Sequence[Given], offsets: Mapping[int, int]) -> bool:
        with self._committing:
            if assignment != self._assignment or self._producer is None:
                return False
            began = time.monotonic()
            self._undelivered = None
            if self._settings.embedded:
                self._write_then_commit(results, offsets)
            else:
                self._transact(results, offsets)
            self._committed.update(offsets)
        self._transactions["committed"].value += 1
        self._transaction_seconds.observe(time.monotonic() - began)
        return True

    def _transact(self, results: Sequence[Given], offsets: Mapping[int, int]) -> None:
        try:
            self._writer.begin_transaction()
            self._produce(results)
            # While the broker is away, librdkafka 2.16 can wait for the offsets for ever; for records it waits as long as it is told.
            if self._writer.flush(_CALL_TIMEOUT_S):
                raise KafkaException(self._undelivered or KafkaError(KafkaError._TIMED_OUT))
            self._writer.send_offsets_to_transaction(self._places(offsets), self._member, _CALL_TIMEOUT_S)
            self._writer.commit_transaction(_CALL_TIMEOUT_S)
        except KafkaException as error:
            outcome = "aborted" if self._abort(error) else "doubtful"
            self._transactions[outcome].value += 1
            reason = error.args[0] if self._undelivered is None else self._undelivered
            raise _lost(f"a transaction of {self._topic} is {outcome}", reason) from error

    def _abort(self, error: KafkaException) -> bool:
        """Whether the transaction is certainly of no effect."""
        if not error.args[0].txn_requires_abort():
            return False
        try:
            self._writer.abort_transaction(_CALL_TIMEOUT_S)
        except KafkaException:
            return False
        return True

    def _write_then_commit(self, results: Sequence[Given], offsets: Mapping[int, int]) -> None:
        doing = f"writing results of {self._topic}"
        with _translated(doing):
            self._produce(results)
            if self._writer.flush(self._timeout_s) or self._undelivered is not None:
                raise _lost(doing, self._undelivered or KafkaError(KafkaError._TIMED_OUT))
            self._reader.commit(offsets=self._places(offsets), asynchronous=False)

    def _produce(self, results: Sequence[Given]) -> None:
        producer = self._writer
        for result in results:
            headers: list[tuple[str, str | bytes | None]] = [*result.headers]  # a tuple is refused
            while True:
                try:
                    producer.produce(result.topic, result.value, result.key, headers=headers)
                    break
                except BufferError:
                    producer.poll(0.05)

    def _on_delivery(self, error: KafkaError | None, _: Message) -> None:
        if error is not None and self._undelivered is None:
            self._undelivered = error

    def _places(self, offsets: Mapping[int, int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, partition, offset) for partition, offset in offsets.items()]

    # The consumer's thread ---------------------------------------------------------------------------------------------------------

    def _open_consumer(self) -> None:
        prefetch_kb = max(1, self._prefetch_bytes // 1024)
        membership = {} if self._settings.embedded else {"group.instance.id": f"{self._group}-{self._settings.group_instance}"}
        with _translated(f"reading {self._topic}"):
            self._consumer = Consumer(
                {
                    **self._common(),
                    **membership,
                    "group.id": self._group,
                    "session.timeout.ms": self._settings.session_timeout_ms,
                    "heartbeat.interval.ms": self._settings.session_timeout_ms // 3,
                    "partition.assignment.strategy": "range",
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "earliest",
                    "isolation.level": "read_committed",
                    "queued.max.messages.kbytes": prefetch_kb,
                    "fetch.max.bytes": max(self._prefetch_bytes, 2 * MAX_RECORD_BYTES),
                    "message.max.bytes": 2 * MAX_RECORD_BYTES,
                    # A second by default, in which a consumer that has caught up with its queue would stand still.
                    "fetch.queue.backoff.ms": 10,
                }
            )
            if self._settings.embedded:
                self._assign_everything()
            else:
                self._consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def _assign_everything(self) -> None:
        known = self._reader.list_topics(self._topic, timeout=self._timeout_s).topics[self._topic]
        if known.error is not None:
            raise _lost(f"reading {self._topic}", known.error)
        self._reader.assign([TopicPartition(self._topic, partition) for partition in known.partitions])
        self._assignment += 1

    def _close_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with suppress(KafkaException, RuntimeError):
                consumer.close()
        self._paused_partitions.value = 0

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.assign(partitions)
        if self._is_paused:
            consumer.pause(partitions)
        # Taken here, it names the generation in which what follows is read; asked for later, it could name one in which it is not ours.
        self._member = consumer.consumer_group_metadata()
        self._assignment += 1
        log.info("reads partitions %s of %s", sorted(place.partition for place in partitions), self._topic)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        log.warning("lost partitions %s of %s", sorted(place.partition for place in partitions), self._topic)
        self._on_revoke(consumer, partitions)

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Give partitions up, but not while a transaction is being committed.

        Also not when they are lost already: a static member can come back into the same generation, in which the broker would accept
        offsets of a transaction from before, when what they stand for is being read again.
        """
        is_over = self._is_closing or self._committing.acquire(timeout=COMMIT_TIMEOUT_S)
        self._assignment += 1
        self._held.clear()
        for place in partitions:
            self._taken_to.pop(place.partition, None)
            self._committed.pop(place.partition, None)
        if is_over and not self._is_closing:
            self._committing.release()

    def _take(self, max_records: int, max_bytes: int, timeout_s: float) -> Chunk:
        self._pause(False)
        records, self._held = self._held, []
        assignment, size = self._assignment, sum(len(record.value or b"") for record in records)
        wait_s = 0.0 if records else timeout_s
        while len(records) < max_records and size < max_bytes:
            messages = self._poll(wait_s) if wait_s else self._next(min(_SLICE, max_records - len(records)))
            wait_s = 0.0
            if assignment != self._assignment:
                records, assignment, size = [], self._assignment, 0
            if not messages:
                break
            for message in messages:
                if self._is_record(message):
                    size += len(message)
                    records.append(_taken(message))
        chunk = Chunk(assignment, records)
        self._taken_to.update(chunk.offsets())
        return chunk

    def _stay(self, timeout_s: float) -> None:
        self._pause(True)
        messages = self._poll(timeout_s)
        self._held += [_taken(message) for message in messages if self._is_record(message)]

    def _poll(self, timeout_s: float) -> list[Message]:
        with _translated(f"reading {self._topic}"):
            message = self._reader.poll(timeout_s)
        self._check()
        return [] if message is None else [message]

    def _next(self, count: int) -> list[Message]:
        with _translated(f"reading {self._topic}"):
            messages: list[Message] = self._reader.consume(count, 0)
        return messages

    def _pause(self, wanted: bool) -> None:
        if wanted is self._is_paused:
            return
        places = self._reader.assignment()
        with _translated(f"reading {self._topic}"):
            (self._reader.pause if wanted else self._reader.resume)(places)
        self._is_paused = wanted
        self._paused_partitions.value = len(places) if wanted else 0

    def _is_record(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = error
            self._check()
        if error.code() not in _PASSING:
            raise _lost(f"reading {self._topic}", error)
        return False

    def _check(self) -> None:
        """Raise when the client has said that it cannot go on."""
        if self._fatal is None:
            return
        if _is_superseded(self._fatal) and time.monotonic() - self._away_s > AFTER_OUTAGE_S:
            raise SupersededError(
                f"another process with KAFKA_GROUP_INSTANCE={self._settings.group_instance} has taken over {self._topic}; "
                "each process of a group needs a name of its own"
            )
        raise _lost(f"reading {self._topic}", self._fatal)

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in _AWAY:
            self._away_s = time.monotonic()
        if error.fatal() and self._fatal is None:
            self._fatal = error
        else:
            log.debug("the client of %s says: %s", self._topic, error)

    def _lags(self) -> dict[int, int]:
        with _translated(f"looking up what waits on {self._topic}"):
            places = self._reader.assignment()
            self._look_up_committed([place for place in places if place.partition not in self._committed])
            return {place.partition: self._lag(place) for place in places}

    def _look_up_committed(self, places: Sequence[TopicPartition]) -> None:
        if places:
            for place in self._reader.committed(list(places), timeout=_LAG_TIMEOUT_S):
                self._committed.setdefault(place.partition, place.offset)

    def _lag(self, place: TopicPartition) -> int:
        low, high = self._reader.get_watermark_offsets(place, timeout=_LAG_TIMEOUT_S, cached=not self._is_paused)
        if high < 0:
            low, high = self._reader.get_watermark_offsets(place, timeout=_LAG_TIMEOUT_S)
        return max(0, int(high) - max(int(low), self._done(place), 0))

    def _done(self, place: TopicPartition) -> int:
        """What nothing before waits: the committed offset, or, once nothing is in hand, where the client stands.

        That is behind what ends transactions, for which no record stands.
        """
        committed = self._committed.get(place.partition, -1)
        if self._held or committed < self._taken_to.get(place.partition, committed):
            return committed
        return max(committed, int(self._reader.position([place])[0].offset))

    def _common(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self._settings.bootstrap_servers,
            "client.id": self._group,
            "socket.timeout.ms": min(self._settings.request_timeout_ms, TRANSACTION_TIMEOUT_MS),
            "reconnect.backoff.max.ms": 1_000,
            # What matters is raised; the rest is repeated many times a second while the broker is away.
            "log_level": 0,
            "error_cb": self._on_error,
        }


class _translated:  # noqa: N801 - reads as a statement
    """Kafka's errors as ``SessionLostError``; a class, because a generator costs a microsecond more."""

    __slots__ = ("_doing",)

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KafkaException):
            raise _lost(self._doing, error.args[0]) from error


def _is_superseded(error: KafkaError) -> bool:
    """Whether another member has taken this one's name; what the consumer hands out says so in words only."""
    return error.code() == KafkaError.FENCED_INSTANCE_ID or (error.code() == KafkaError._FATAL and "group.instance.id" in error.str())


def _lost(doing: str, error: KafkaError) -> SessionLostError:
    return SessionLostError(f"{doing}: {error.str()} ({error.name()})", is_too_large=error.code() == KafkaError.MSG_SIZE_TOO_LARGE)


def _taken(message: Any) -> Taken:  # by its types a message may be none of a partition; what was polled is
    try:
        headers = message.headers() or ()
    except UnicodeDecodeError:
        # The name of one is not text. None of them can be had then, and the record is one without.
        headers = ()
    return Taken(message.partition(), message.offset(), message.key(), message.value(), headers, message.timestamp()[1])
