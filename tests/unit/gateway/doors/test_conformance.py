"""The conformance suite, tried out on the gateway."""

import asyncio

import pytest

from tests.conformance import v1_checks, v2_checks  # noqa: F401 (they register their checks)
from tests.conformance.checks import CHECKS, GRPC, Outcome, run_all
from tests.conformance.subject import Subject


@pytest.fixture
async def subject(world):
    await world.deployed(0.0)
    made = Subject(str(world.http.base_url), "cancer", "1")
    yield made
    made.close()


async def test_every_sentence_of_the_rest_specifications_is_kept(subject):
    checks = [check for check in CHECKS.values() if check.group != GRPC]
    results = await asyncio.to_thread(run_all, subject, checks)
    assert {result.check.id: result.reason for result in results if result.outcome is Outcome.FAILED} == {}
    assert sum(result.outcome is Outcome.PASSED for result in results) > 80


def test_every_check_says_what_it_checks_and_where_that_stands():
    for check in CHECKS.values():
        assert check.sentence.endswith("."), check.id
        assert check.section, check.id
