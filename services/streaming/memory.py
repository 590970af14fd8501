"""A stream's log in memory: the fake that tests run on."""

import asyncio
from collections.abc import Mapping, Sequence

from libs.errors import TransientError
from libs.messaging.memory import MemoryBroker
from libs.messaging.records import Record, TopicPartition
from schemas.topics import inference_requests
from services.streaming.errors import SessionLostError
from services.streaming.log import Chunk, Given, Taken


class MemoryStreamLog:
    """The only member of its group, on a broker in memory.

    Attributes
    ----------
    assignment
        Changed by a test to play a rebalance: what was taken before is somebody else's.
    stays
        How often the stream stayed without taking.
    """

    def __init__(self, broker: MemoryBroker, endpoint_name: str) -> None:
        self.assignment = 1
        self.stays = 0
        self._broker = broker
        self._topic = inference_requests(endpoint_name).name
        self._group = f"millrace-streaming-{endpoint_name}"
        self._positions: dict[str, int] = {}

    async def open(self) -> None:
        self._check()
        self._positions = {self._topic: self._broker.committed(self._group, self._topic)}

    async def close(self) -> None:
        return None

    async def take(self, max_records: int, max_bytes: int, timeout_s: float) -> Chunk:
        self._check()
        records = await self._broker.read(self._positions, max_records, timeout_s)
        fitting: list[Taken] = []
        size_bytes = 0
        for record in records:
            if fitting and size_bytes >= max_bytes:
                break
            size_bytes += len(record.value or b"")
            fitting.append(Taken(record.partition, record.offset, record.key, record.value, record.headers, record.timestamp_ms))
        self._positions[self._topic] -= len(records) - len(fitting)
        return Chunk(self.assignment, fitting)

    async def stay(self, timeout_s: float) -> None:
        self._check()
        self.stays += 1
        await asyncio.sleep(timeout_s)

    async def commit(self, assignment: int, results: Sequence[Given], offsets: Mapping[int, int]) -> bool:
        self._check()
        if assignment != self.assignment:
            return False
        records = [Record(given.topic, given.key, given.value, tuple(given.headers)) for given in results]
        places = {TopicPartition(self._topic, partition): offset for partition, offset in offsets.items()}
        await self._broker.append(records, [(self._group, places)])
        return True

    async def lags(self) -> dict[int, int]:
        return {0: len(self._broker.records(self._topic)) - self._broker.committed(self._group, self._topic)}

    def _check(self) -> None:
        try:
            self._broker.check_reachable()
        except TransientError as error:
            raise SessionLostError(error.message) from error
