"""When the topics of a deleted endpoint go, and when they stay."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest

from libs.errors import ConfigurationError
from libs.messaging import cloudevents
from libs.messaging.memory import MemoryBroker
from schemas.base import Payload
from schemas.registry import EndpointCreated, EndpointDeleted
from schemas.topics import EVENTS
from services.streaming import retirement
from services.streaming.retirement import GROUP, Retirement
from tests.unit.streaming.conftest import NOW, REQUESTS, RESULTS, SOON, running

KEPT_S = 30.0


@dataclass
class Shop:
    """The service's part that deletes, and what is around it."""

    broker: MemoryBroker = field(default_factory=MemoryBroker)
    deleted: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    now: datetime = NOW
    refuses: bool = False

    def service(self) -> Retirement:
        async def delete(topics) -> None:
            self.broker.check_reachable()
            if self.refuses:
                raise ConfigurationError("no")
            self.deleted += [topic.name for topic in topics]

        return Retirement(self.broker, delete, self.used.__contains__, KEPT_S, lambda: self.now, SOON)

    async def say(self, *facts: Payload) -> None:
        events = [cloudevents.new_event(fact, "/millrace/registry", now=self.now) for fact in facts]
        await self.broker.append([cloudevents.write(event) for event in events])

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def committed(self) -> int:
        return self.broker.committed(GROUP, EVENTS.name)


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setattr(retirement, "POLL_S", 0.005)
    return Shop()


DELETED = EndpointDeleted(endpoint_name="shop")
CREATED = EndpointCreated(endpoint_name="shop")


async def step(service: Retirement, times: int = 3) -> None:
    for _ in range(times):
        await service._step()


async def test_topics_go_after_their_time(shop):
    service = shop.service()
    await service.start()
    await shop.say(CREATED, DELETED)
    await step(service)
    shop.pass_s(KEPT_S - 1)
    await step(service)
    assert shop.deleted == []
    shop.pass_s(1)
    await step(service)
    assert shop.deleted == [REQUESTS, RESULTS]


async def test_topics_stay_when_that_was_asked_for_also_after_an_earlier_deletion(shop):
    service = shop.service()
    await service.start()
    await shop.say(DELETED, CREATED, EndpointDeleted(endpoint_name="shop", keep_topics=True))
    shop.pass_s(10 * KEPT_S)
    await step(service)
    assert shop.deleted == []
    assert shop.committed() == 3


async def test_topics_of_an_endpoint_that_is_created_again_stay(shop):
    service = shop.service()
    await service.start()
    await shop.say(DELETED)
    await step(service)
    await shop.say(CREATED)
    shop.pass_s(2 * KEPT_S)
    await step(service)
    assert shop.deleted == []
    assert shop.committed() == 2


async def test_topics_of_an_endpoint_that_is_used_stay_also_when_its_event_has_not_come(shop):
    service = shop.service()
    await service.start()
    await shop.say(DELETED)
    shop.pass_s(2 * KEPT_S)
    shop.used.add("shop")
    await step(service)
    assert shop.deleted == []
    shop.used.clear()  # its stream has ended
    await step(service)
    assert shop.deleted == [REQUESTS, RESULTS]


async def test_a_restart_does_not_forget_what_is_to_be_deleted(shop):
    await shop.say(EndpointCreated(endpoint_name="other"), DELETED, EndpointCreated(endpoint_name="further"))
    async with running([service := shop.service()]):
        await step(service)
    assert shop.committed() == 1
    shop.pass_s(KEPT_S)
    again = shop.service()
    await again.start()
    await step(again)
    assert shop.deleted == [REQUESTS, RESULTS]
    assert shop.committed() == 3


async def test_a_broker_that_is_away_puts_it_off(shop):
    service = shop.service()
    await service.start()
    await shop.say(DELETED)
    await step(service)
    shop.pass_s(KEPT_S)
    shop.broker.is_away = True
    await service._delete(["shop"])
    await service._commit()
    assert shop.committed() == 0
    shop.broker.is_away = False
    await step(service)
    assert shop.deleted == [REQUESTS, RESULTS]
    assert shop.committed() == 1


async def test_a_broker_that_refuses_is_not_asked_for_ever(shop, caplog):
    service = shop.service()
    await service.start()
    shop.refuses = True
    await shop.say(DELETED)
    shop.pass_s(KEPT_S)
    await step(service)
    assert shop.committed() == 1
    assert "the topics of the deleted endpoint shop stay" in caplog.text
