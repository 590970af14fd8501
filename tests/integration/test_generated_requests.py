"""Requests generated from the OpenAPI document, good ones and bad ones, against a real gateway with real runners."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.specs.openapi import checks

from services.gateway.openapi import OPERATIONS
from tests.integration.real_gateway import RealGateway, real_gateway

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

BUDGET_S = 35.0
"""One round is always made; further ones begin in this time."""

EXAMPLES = 4
REAL = [
    {"model": model, "endpoint": model, "version": version, "alias": "best", "project": "p", "location": "l"}
    for model, version in (("iris", "1"), ("mixed", "1"), ("iris", "2"))
]
"""Values of path parameters that lead to something, and to a version that is not deployed."""

CHECKS: list[Any] = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
PROFILE = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False)


@pytest.fixture(scope="module")
def gateway() -> Iterator[RealGateway]:
    with tempfile.TemporaryDirectory(prefix="mr-") as folder, real_gateway(Path(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def operations(gateway: RealGateway) -> list[APIOperation]:
    schema = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def places(operation: APIOperation) -> list[dict[str, str] | None]:
    """Values of path parameters: generated ones, and for what cannot do harm those of things that exist."""
    if (operation.method.upper(), operation.path) not in OPERATIONS:
        return [None]
    wanted = {each.name for each in operation.path_parameters}
    found = [{name: value for name, value in real.items() if name in wanted} for real in REAL]
    return [None, *(real for index, real in enumerate(found) if real and real not in found[:index])]


def ask(case: Case, session: requests.Session) -> None:
    """Send a request and look at what came back."""
    case.query.pop("follow", None)  # an endless answer
    response = case.call(session=session, timeout=30)
    said = response.content[:500]
    assert response.status_code < 500 or response.status_code in (503, 504), said
    assert response.status_code != 503 or response.headers.get("retry-after") or b'"ready"' in said, said
    assert b'"detail"' not in said
    assert response.headers["x-request-id"]
    case.validate_response(response, checks=CHECKS)


def asked(operation: APIOperation, mode: GenerationMode, place: dict[str, str] | None, session: requests.Session) -> None:
    """Send a few requests to one operation."""
    waits = operation.path.startswith("/api/v1/predictions")  # a second for each operation that is not known

    @settings(PROFILE, max_examples=1 if waits else EXAMPLES)
    @given(operation.as_strategy(generation_mode=mode, path_parameters=place))
    def check(case: Case) -> None:
        ask(case, session)

    with suppress(Unsatisfiable):  # nothing bad can be made of a request without parameters
        check()


def test_generated_requests_are_answered_as_the_document_says(gateway, operations):
    began = time.monotonic()
    with requests.Session() as session:
        session.trust_env = False
        for _ in itertools.takewhile(lambda number: number == 0 or time.monotonic() - began < BUDGET_S, itertools.count()):
            for operation in operations:
                for mode, place in itertools.product(GenerationMode, places(operation)):
                    asked(operation, mode, place, session)
    log = gateway.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3_000]
    gateway.until("millrace_requests_in_flight", 0)
    accepted = gateway.metric("millrace_requests_accepted_total")
    assert accepted == gateway.metric("millrace_requests_total") > 20
    assert requests.post(f"{gateway.url}/v1/models/iris:predict", json={"instances": [[5.1, 3.5, 1.4, 0.2]]}).json() == {"predictions": [0]}


def test_the_examples_of_the_document_are_taken_or_do_not_fit_the_model(gateway, operations):
    with requests.Session() as session:
        session.trust_env = False
        for operation in operations:
            body = operation.definition.raw.get("requestBody", {}).get("content", {}).get("application/json", {})
            if (operation.method.upper(), operation.path) not in OPERATIONS:
                continue
            for example in body.get("examples", {}).values():
                for place in places(operation)[1:] or [{}]:
                    case = operation.Case(path_parameters=place, body=example["value"], media_type="application/json")
                    ask(case, session)
