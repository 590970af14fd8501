"""``millrace events``: what happens on the platform, as it happens."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libs.cli import output
from libs.cli.session import open_session

if TYPE_CHECKING:
    from libs.cli.client import Json

app = typer.Typer(help="Watch what happens.", rich_markup_mode=None, no_args_is_help=True)

SUMMARY_LENGTH = 100


@app.callback()
def _events() -> None:
    """Watch what happens."""


@app.command()
def tail(
    event_type: Annotated[str | None, typer.Option("--type", help="Only events of this type.")] = None,
    entity: Annotated[str | None, typer.Option("--entity", help="Only events of this model or endpoint.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one CloudEvent as JSON per line.")] = False,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on until Ctrl-C.")] = True,
) -> None:
    """Print recent events, then each new one as it happens."""
    filters = {"type": event_type, "entity": entity}
    with open_session("events tail") as session:
        seen: set[str] = set()
        if not follow:
            for event in session.client.recent_events(**filters):
                _print(event, as_json, seen)
            return
        with session.client.follow_events(**filters) as events:
            for event in session.client.recent_events(**filters):
                _print(event, as_json, seen)
            for event in events:
                _print(event, as_json, seen)
        output.note("the gateway closed the event stream")


def _print(event: "Json", as_json: bool, seen: set[str]) -> None:
    if event["id"] in seen:
        return
    seen.add(event["id"])
    output.say(json.dumps(event, ensure_ascii=False) if as_json else line(event))


def line(event: "Json") -> str:
    """An event on one line: when, about what, what happened, and the plain fields of its data."""
    kind = str(event["type"]).removeprefix("millrace.")
    data: dict[str, Any] = event.get("data") or {}
    plain = {name: _plain(value) for name, value in data.items() if _is_plain(value) and value != event.get("subject")}
    summary = " ".join(f"{name}={value}" for name, value in plain.items())
    if len(summary) > SUMMARY_LENGTH:
        summary = summary[: SUMMARY_LENGTH - 1] + "…"
    return f"{output.local_time(event.get('time'))}  {event.get('subject') or '–'}  {kind}  {summary}".rstrip()


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float)) and value != ""


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
