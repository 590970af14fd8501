"""``millrace endpoints``: stable names that predictions are asked of, and the versions behind them."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libs.cli import output, references
from libs.cli.errors import UsageError
from libs.cli.session import Session, open_session

if TYPE_CHECKING:
    from libs.cli.client import Json
    from libs.cli.stages import Report

app = typer.Typer(help="Create endpoints and deploy versions to them.", rich_markup_mode=None, no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
EndpointName = Annotated[str, typer.Argument(help="The endpoint.")]


@app.command()
def create(name: EndpointName, as_json: AsJson = False) -> None:
    """Create an endpoint."""
    with open_session("endpoints create") as session:
        answer = session.client.create_endpoint(name)
    if as_json:
        output.show_json(answer)
    else:
        output.say(f"endpoint {name} exists; deploy a version to it with: millrace endpoints deploy {name} --model MODEL")


@app.command("list")
def list_endpoints(as_json: AsJson = False) -> None:
    """List all endpoints."""
    with open_session("endpoints list") as session:
        endpoints = session.client.endpoints()
    if as_json:
        output.show_json({"endpoints": endpoints})
        return
    rows = [
        (endpoint["endpoint_name"], _split(endpoint), len(endpoint.get("deployment_ids") or []), output.local_time(endpoint["updated_at"]))
        for endpoint in endpoints
    ]
    output.table(("endpoint", "traffic", "deployments", "updated"), rows)


@app.command()
def show(name: EndpointName, as_json: AsJson = False) -> None:
    """Show an endpoint with its deployments."""
    with open_session("endpoints show") as session:
        endpoint = session.client.endpoint(name)
    if as_json:
        output.show_json(endpoint)
        return
    output.fields({"endpoint": name, "description": endpoint.get("description"), "labels": endpoint.get("labels")})
    output.say()
    rows = [
        (
            deployment["deployment_id"],
            f"{deployment['model_name']}@{deployment['version']}",
            deployment["status"],
            f"{endpoint.get('traffic', {}).get(deployment['deployment_id'], 0)} %",
            f"{len(deployment.get('replicas') or [])}/{deployment['min_replicas']}",
            deployment.get("reason"),
        )
        for deployment in endpoint["deployments"]
    ]
    output.table(("deployment", "version", "status", "traffic", "replicas", "reason"), rows)


@app.command()
def delete(
    name: EndpointName,
    force: Annotated[bool, typer.Option("--force", help="Even while it takes traffic.")] = False,
    keep_topics: Annotated[bool, typer.Option("--keep-topics", help="Its inference topics stay; else they go a little later.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete an endpoint; refused while it takes traffic, unless --force."""
    with open_session("endpoints delete") as session:
        answer = session.client.delete_endpoint(name, force=force, keep_topics=keep_topics)
    if as_json:
        output.show_json(answer)
    else:
        output.say(f"endpoint {name} is deleted")


@app.command()
def deploy(
    name: EndpointName,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL[@VERSION|:ALIAS]", help="What to deploy; else the newest validated version.")
    ],
    traffic: Annotated[int | None, typer.Option("--traffic", min=0, max=100, help="Percent of the traffic it gets when ready.")] = None,
    min_replicas: Annotated[int | None, typer.Option("--min-replicas", min=1, help="Replicas to start with.")] = None,
    max_replicas: Annotated[int | None, typer.Option("--max-replicas", min=1, help="Replicas at most.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is ready, showing each stage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Deploy a version to an endpoint."""
    wanted = references.model_reference(model)
    body: dict[str, Any] = {
        "model": wanted.name,
        "version": wanted.version,
        "alias": wanted.alias,
        "traffic_percent": traffic,
        "min_replicas": min_replicas,
        "max_replicas": min_replicas if max_replicas is None else max_replicas,
    }
    with open_session("endpoints deploy") as session:
        view = deploy_version(session, name, {key: value for key, value in body.items() if value is not None}, wait=wait)
        if as_json:
            output.show_json({**view, "trace_id": session.trace_id})
            return
        output.say(f"{view['deployment_id']} is {view.get('status', 'requested')}")
        if wait:
            output.note(f"trace {session.trace_id}")


def deploy_version(session: Session, endpoint: str, body: "Json", *, wait: bool, report: "Report" = output.stage) -> "Json":
    """Deploy, and if asked wait until the deployment is ready and has its traffic; the deployment's view."""
    from libs.cli.stages import DEPLOYMENT_TIMEOUT_S, DeploymentStory, EventFeed, follow
    from schemas.registry import DeploymentStatus

    if not wait:
        return session.client.deploy(endpoint, body)
    with EventFeed(session.client, endpoint) as feed:
        since = datetime.now(UTC)
        view = session.client.deploy(endpoint, body)
        story = DeploymentStory(session.client, endpoint, view["deployment_id"], int(view.get("generation") or 1))
        is_new = view.get("status", DeploymentStatus.PENDING) == DeploymentStatus.PENDING
        return follow(story, feed, report, view, is_new=is_new, since=since, timeout_s=DEPLOYMENT_TIMEOUT_S)


@app.command()
def undeploy(
    name: EndpointName,
    version: Annotated[str, typer.Argument(help="Version number or deployment id.")],
    force: Annotated[bool, typer.Option("--force", help="Even while it takes traffic.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a deployed version from an endpoint; refused while it takes traffic, unless --force."""
    with open_session("endpoints undeploy") as session:
        deployment_id = _deployment_id(session.client.endpoint(name), version)
        answer = session.client.undeploy(name, deployment_id, force=force)
    if as_json:
        output.show_json(answer)
    else:
        output.say(f"{deployment_id} is being removed")


@app.command()
def traffic(
    name: EndpointName,
    split: Annotated[list[str], typer.Argument(metavar="VERSION=PERCENT…", help="The whole split, for example 1=90 2=10.")],
    as_json: AsJson = False,
) -> None:
    """Set how an endpoint's traffic is split over its versions."""
    percents = references.traffic_split(split)
    with open_session("endpoints traffic") as session:
        answer = session.client.set_traffic(name, percents)
    if as_json:
        output.show_json(answer)
    else:
        output.say(f"traffic of {name}: " + ", ".join(f"{version} {percent} %" for version, percent in percents.items()))


@app.command()
def log(
    name: EndpointName,
    mode: Annotated[str | None, typer.Option("--mode", help="best_effort, required (refuse what cannot be logged) or off.")] = None,
    sample: Annotated[
        float | None, typer.Option("--sample", min=0, max=100, help="Percent of the requests whose inputs and outputs are kept.")
    ] = None,
    max_rows_per_s: Annotated[int | None, typer.Option("--max-rows-per-s", min=0, help="Most rows of inputs and outputs kept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how an endpoint's requests are logged, or set it; what is not named stays as it is."""
    wanted = {"mode": mode, "sample_percent": sample, "max_rows_per_s": max_rows_per_s}
    changes = {key: value for key, value in wanted.items() if value is not None}
    with open_session("endpoints log") as session:
        endpoint = session.client.endpoint(name)
        if changes:
            endpoint = session.client.set_prediction_log(name, {**endpoint["prediction_log"], **changes})
    if as_json:
        output.show_json(endpoint["prediction_log"])
        return
    output.fields(
        {
            "endpoint": name,
            "mode": endpoint["prediction_log"]["mode"],
            "sample": f"{endpoint['prediction_log']['sample_percent']:g} %",
            "rows per second": endpoint["prediction_log"]["max_rows_per_s"],
        }
    )


def _deployment_id(endpoint: "Json", version: str) -> str:
    deployments = endpoint["deployments"]
    named = [
        str(deployment["deployment_id"])
        for deployment in deployments
        if version in (deployment["deployment_id"], str(deployment["version"]), f"{deployment['model_name']}@{deployment['version']}")
    ]
    if len(named) == 1:
        return named[0]
    if named:
        raise UsageError(f"version {version} is deployed to {endpoint['endpoint_name']} more than once; name one of {', '.join(named)}")
    known = ", ".join(str(deployment["deployment_id"]) for deployment in deployments) or "nothing"
    raise UsageError(f"version {version!r} is not deployed to {endpoint['endpoint_name']}; deployed: {known}")


def _split(endpoint: "Json") -> str:
    return ", ".join(f"{deployment} {percent} %" for deployment, percent in (endpoint.get("traffic") or {}).items())
