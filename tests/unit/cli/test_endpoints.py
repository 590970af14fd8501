import json
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.gateway import Answer, FakeGateway, Request

NOW = datetime(2999, 1, 1, tzinfo=UTC).isoformat()
CANCER = "/api/v1/endpoints/cancer"
DEPLOYMENT = "cancer.cancer.1"


def deployment(status: str, **more: Any) -> dict[str, Any]:
    return {
        "deployment_id": DEPLOYMENT,
        "generation": 2,
        "model_name": "cancer",
        "version": 1,
        "status": status,
        "min_replicas": 1,
        "replicas": [],
        "pending_traffic_percent": None,
        **more,
    }


def endpoint(*deployments: dict[str, Any], **traffic: int) -> dict[str, Any]:
    ids = [each["deployment_id"] for each in deployments]
    return {"endpoint_name": "cancer", "traffic": traffic, "deployment_ids": ids, "deployments": list(deployments), "updated_at": NOW}


def event(name: str, generation: int = 2) -> dict[str, Any]:
    return {"id": name, "type": name, "time": NOW, "data": {"deployment_id": DEPLOYMENT, "generation": generation}}


def deploys(gateway: FakeGateway, *events: dict[str, Any], views: list[dict[str, Any]]) -> None:
    """Deploying publishes some events; the state, asked after each, goes through some views and stays at the last."""
    left = iter(views[:-1])

    def deploy(_: Request) -> Answer:
        gateway.on("GET", CANCER, lambda _: (200, endpoint(next(left, views[-1]))))
        gateway.publish(*events)
        return 201, deployment("pending", pending_traffic_percent=100)

    gateway.on("POST", f"{CANCER}/deployments", deploy)


def test_create_sends_the_name(gateway: FakeGateway, run: Run) -> None:
    gateway.on("POST", "/api/v1/endpoints", endpoint(), status=201)
    assert run("endpoints", "create", "cancer").exit_code == 0
    assert gateway.sent("POST", "/api/v1/endpoints").json == {"name": "cancer"}


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (("cancer",), {"model": "cancer"}),
        (("cancer@2",), {"model": "cancer", "version": 2}),
        (("cancer:champion",), {"model": "cancer", "alias": "champion"}),
        (("cancer", "--traffic", "0"), {"model": "cancer", "traffic_percent": 0}),
        (("cancer", "--min-replicas", "3"), {"model": "cancer", "min_replicas": 3, "max_replicas": 3}),
        (("cancer", "--min-replicas", "1", "--max-replicas", "4"), {"model": "cancer", "min_replicas": 1, "max_replicas": 4}),
    ],
)
def test_deploy_sends_only_what_was_said(gateway: FakeGateway, run: Run, arguments: tuple[str, ...], body: dict[str, Any]) -> None:
    gateway.on("POST", f"{CANCER}/deployments", deployment("pending"), status=201)
    outcome = run("endpoints", "deploy", "cancer", "--model", *arguments)
    assert (outcome.exit_code, outcome.out) == (0, "cancer.cancer.1 is pending\n")
    assert gateway.sent("POST", f"{CANCER}/deployments").json == body


def test_waiting_deploy_ends_when_the_deployment_is_ready_and_has_its_traffic(gateway: FakeGateway, run: Run) -> None:
    waiting = deployment("ready", pending_traffic_percent=100)
    deploys(
        gateway,
        event("millrace.registry.deployment.requested.v1"),
        event("millrace.serving.deployment.ready.v1", generation=1),
        event("millrace.serving.deployment.ready.v1"),
        views=[deployment("pending"), deployment("pending"), waiting, waiting, deployment("ready")],
    )
    outcome = run("endpoints", "deploy", "cancer", "--model", "cancer", "--wait")
    assert (outcome.exit_code, outcome.out) == (0, "cancer.cancer.1 is ready\n")
    assert [line.split()[0] for line in outcome.err.splitlines()] == ["deployed", "ready", "trace"]


def test_waiting_deploy_that_fails_says_why(gateway: FakeGateway, run: Run) -> None:
    deploys(gateway, event("millrace.serving.deployment.failed.v1"), views=[deployment("failed", reason="no memory")])
    outcome = run("endpoints", "deploy", "cancer", "--model", "cancer", "--wait")
    assert outcome.exit_code == 1
    assert outcome.err.splitlines()[-1] == "millrace: deployment cancer.cancer.1 failed: no memory"


@pytest.mark.usefixtures("impatient")
def test_a_deployment_that_was_removed_meanwhile_is_not_waited_for(gateway: FakeGateway, run: Run) -> None:
    deploys(gateway, views=[deployment("removing")])
    outcome = run("endpoints", "deploy", "cancer", "--model", "cancer", "--wait")
    assert outcome.err.splitlines()[-1] == "millrace: deployment cancer.cancer.1 was removed before it was ready"


def test_show_lists_deployments_with_their_traffic(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", CANCER, endpoint(deployment("ready"), **{DEPLOYMENT: 100}))
    row = run("endpoints", "show", "cancer").out.splitlines()[-1]
    assert row.split() == ["cancer.cancer.1", "cancer@1", "ready", "100", "%", "0/1", "–"]


def test_list_shows_the_split(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", "/api/v1/endpoints", {"endpoints": [endpoint(deployment("ready"), **{DEPLOYMENT: 100})]})
    assert "cancer.cancer.1 100 %" in run("endpoints", "list").out


@pytest.mark.parametrize("version", ["1", "cancer@1", DEPLOYMENT])
def test_undeploy_finds_the_deployment_of_a_version(gateway: FakeGateway, run: Run, version: str) -> None:
    gateway.on("GET", CANCER, endpoint(deployment("ready")))
    gateway.on("DELETE", f"{CANCER}/deployments/{DEPLOYMENT}", {})
    assert run("endpoints", "undeploy", "cancer", version, "--force").exit_code == 0
    assert gateway.sent("DELETE", f"{CANCER}/deployments/{DEPLOYMENT}").query == {"force": "true"}


def test_undeploy_of_a_version_that_is_not_there_names_those_that_are(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", CANCER, endpoint(deployment("ready")))
    outcome = run("endpoints", "undeploy", "cancer", "7")
    assert outcome.err == "millrace: version '7' is not deployed to cancer; deployed: cancer.cancer.1\n"


def test_traffic_sends_the_whole_split(gateway: FakeGateway, run: Run) -> None:
    gateway.on("PUT", f"{CANCER}/traffic", {})
    assert run("endpoints", "traffic", "cancer", "1=90", "2=10").out == "traffic of cancer: 1 90 %, 2 10 %\n"
    assert gateway.sent("PUT", f"{CANCER}/traffic").json == {"traffic": {"1": 90, "2": 10}}


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        (("1=90", "2=20"), "the percentages sum to 110, not to 100"),
        (("1",), "'1' is not VERSION=PERCENT, for example 2=10"),
        (("1=-5",), "'1=-5' is not VERSION=PERCENT, for example 2=10"),
        (("1=50", "1=50"), "version 1 is named twice"),
    ],
)
def test_an_impossible_split_is_refused_before_anything_is_sent(
    gateway: FakeGateway, run: Run, split: tuple[str, ...], sentence: str
) -> None:
    outcome = run("endpoints", "traffic", "cancer", *split)
    assert (outcome.exit_code, outcome.err) == (2, f"millrace: {sentence}\n")
    assert gateway.requests == []


def test_delete_that_is_refused_gives_the_gateways_reason(gateway: FakeGateway, run: Run) -> None:
    gateway.on("DELETE", CANCER, {"error": "endpoint 'cancer' takes traffic; force to delete it"}, status=409)
    outcome = run("endpoints", "delete", "cancer")
    assert (outcome.exit_code, outcome.out, outcome.err) == (1, "", "millrace: endpoint 'cancer' takes traffic; force to delete it\n")
    assert gateway.sent("DELETE", CANCER).query == {}


def test_json_is_what_the_gateway_said(gateway: FakeGateway, run: Run) -> None:
    gateway.on("GET", CANCER, endpoint())
    assert json.loads(run("endpoints", "show", "cancer", "--json").out) == endpoint()
