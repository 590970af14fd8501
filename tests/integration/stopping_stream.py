"""``python -m tests.integration.stopping_stream SERVERS ENDPOINT INSTANCE POINT``: a stream that copies, and stops itself once at a point.

It is the product's own log, with what it commits made of what it took. POINT is ``before-offsets`` or ``before-commit`` (SIGSTOP to itself
there, within an open transaction, the first time it comes by) or ``nowhere``. Each commit is told in a line on standard output.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from confluent_kafka import Producer

from libs.errors import TransientError
from libs.metrics import Metrics
from libs.settings import KafkaSettings
from schemas.topics import inference_results
from services.streaming import adapters
from services.streaming.adapters import KafkaStreamLog
from services.streaming.log import Given


def say(line: str) -> None:
    print(line, flush=True)


class StoppingProducer(Producer):
    """Stops the process the first time it comes to a point."""

    point = "nowhere"

    def send_offsets_to_transaction(self, *arguments: Any) -> None:
        self._pass("before-offsets")
        super().send_offsets_to_transaction(*arguments)
        self._pass("before-commit")

    def _pass(self, point: str) -> None:
        if StoppingProducer.point == point:
            StoppingProducer.point = "nowhere"
            self.flush(10)
            say("stopping")
            os.kill(os.getpid(), signal.SIGSTOP)
            say("continued")


async def copy(settings: KafkaSettings, endpoint_name: str) -> None:
    results = inference_results(endpoint_name).name
    while True:
        stream = KafkaStreamLog(settings, endpoint_name, 2**20, Metrics())
        try:
            await stream.open()
            while True:
                chunk = await stream.take(50, 2**20, 0.2)
                if chunk.records:
                    given = [Given(results, record.key, record.value, []) for record in chunk.records]
                    if await stream.commit(chunk.assignment, given, chunk.offsets()):
                        say(f"committed {len(given)}")
                    else:
                        say("left")
        except TransientError as error:
            say(f"lost: {error}")
        finally:
            await stream.close()


def main() -> None:
    servers, endpoint_name, instance, point = sys.argv[1:]
    adapters.Producer = StoppingProducer
    StoppingProducer.point = point
    settings = KafkaSettings(bootstrap_servers=servers, group_instance=instance, session_timeout_ms=6_000, request_timeout_ms=20_000)
    asyncio.run(copy(settings, endpoint_name))


if __name__ == "__main__":
    main()
