"""Trying again what failed for a reason that passes."""

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from libs.errors import MillraceError
from libs.messaging.errors import StoppingError

log = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_FOR_BROKER_S = 2.0


@dataclass(frozen=True)
class Retry:
    """Back-off for transient errors: delays grow from ``first_s`` by ``factor`` to ``longest_s``, with up to half of it random.

    Retries go on until the cause is gone: a transient error is never a reason to lose a record.
    """

    first_s: float = 0.2
    factor: float = 2.0
    longest_s: float = 15.0

    @property
    def for_broker(self) -> "Retry":
        """The same for what needs nothing but the broker: it is asked every two seconds at least, so that all goes on when it is back."""
        return replace(self, longest_s=min(self.longest_s, _LONGEST_FOR_BROKER_S))

    def delay_s(self, attempt: int) -> float:
        """Wait before attempt ``attempt`` + 1, in seconds; attempts count from 1."""
        whole = min(self.longest_s, self.first_s * self.factor ** min(attempt - 1, 30))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


async def keep_trying(action: Callable[[], Awaitable[T]], retry: Retry, stopping: asyncio.Event) -> T:
    """Do ``action`` until it succeeds.

    Raises
    ------
    MillraceError
        The first one that is not retryable.
    StoppingError
        When ``stopping`` is set and the last attempt failed.
    """
    for attempt in itertools.count(1):
        try:
            return await action()
        except MillraceError as error:
            if not error.retryable:
                raise
            delay_s = retry.delay_s(attempt)
            log.warning("attempt %d failed, next in %.1f s: %s", attempt, delay_s, error)
            if await _stops_within(stopping, delay_s):
                raise StoppingError(f"stopping after {attempt} failed attempts: {error}") from error
    raise AssertionError("unreachable")


async def _stops_within(stopping: asyncio.Event, delay_s: float) -> bool:
    try:
        await asyncio.wait_for(stopping.wait(), delay_s)
    except TimeoutError:
        return False
    return True
