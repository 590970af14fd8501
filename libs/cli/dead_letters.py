"""``millrace dlq``: records that could not be handled."""

import base64
import binascii
from typing import TYPE_CHECKING, Annotated

import typer

from libs.cli import output
from libs.cli.session import open_session

if TYPE_CHECKING:
    from libs.cli.client import Json

app = typer.Typer(help="See and replay records that could not be handled.", rich_markup_mode=None, no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Identity = Annotated[str, typer.Argument(metavar="ID", help="Id of the dead letter.")]


@app.command("list")
def list_dead_letters(as_json: AsJson = False) -> None:
    """List dead letters, newest first."""
    with open_session("dlq list") as session:
        letters = session.client.dead_letters()
    if as_json:
        output.show_json({"dead_letters": letters})
        return
    rows = [
        (letter["id"], output.local_time(letter.get("time")), letter["consumer"], _origin(letter), letter["cause"]) for letter in letters
    ]
    output.table(("id", "time", "consumer", "origin", "cause"), rows)


@app.command()
def show(identity: Identity, as_json: AsJson = False) -> None:
    """Show a dead letter with the original record."""
    with open_session("dlq show") as session:
        letter = session.client.dead_letter(identity)
    if as_json:
        output.show_json(letter)
        return
    output.fields(
        {
            "id": letter["id"],
            "time": output.local_time(letter.get("time")),
            "consumer": letter["consumer"],
            "origin": _origin(letter),
            "cause": letter["cause"],
            "error": letter.get("error"),
            "event id": letter.get("event_id"),
            "key": _text(letter.get("key_base64")),
            **{f"header {name}": _text(value) for name, value in letter.get("headers_base64") or []},
        }
    )
    if letter.get("value_truncated"):
        output.say("\nThe value was too large to be kept here; it still stands at its origin.")
    elif letter.get("value_base64"):
        output.say("\n" + _text(letter["value_base64"]))


@app.command()
def replay(identity: Identity, as_json: AsJson = False) -> None:
    """Publish the original record again, on the topic it came from."""
    with open_session("dlq replay") as session:
        answer = session.client.replay_dead_letter(identity)
    if as_json:
        output.show_json(answer)
    else:
        output.say(f"dead letter {identity} was published again")


def _origin(letter: "Json") -> str:
    return f"{letter['origin_topic']}-{letter['origin_partition']}@{letter['origin_offset']}"


def _text(encoded: str | None) -> str:
    try:
        content = base64.b64decode(encoded or "", validate=True)
    except binascii.Error:
        return str(encoded)
    return content.decode(errors="backslashreplace")
