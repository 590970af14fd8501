"""The console script ``millrace``: which commands there are, and how a failure reads."""

import sys

import typer
from typer.exceptions import TyperException

from libs.cli import dead_letters, endpoints, events, local, models, output, predict, predictions, requests, traces
from libs.cli.errors import CommandError
from libs.errors import MillraceError
from libs.local.errors import PartFailedError

INTERRUPTED = 130
"""128 + SIGINT, as shells say it."""

app = typer.Typer(
    name="millrace",
    help="Upload a trained model; the rest is events.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
app.command()(local.up)
app.command()(local.down)
app.command()(local.status)
app.command()(local.doctor)
app.command()(local.demo)
app.add_typer(models.app, name="models")
app.add_typer(endpoints.app, name="endpoints")
app.command()(predict.predict)
app.add_typer(requests.app, name="requests")
app.add_typer(predictions.app, name="predictions")
app.add_typer(events.app, name="events")
app.add_typer(dead_letters.app, name="dlq")
app.command()(traces.trace)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; what the shell shall see as its exit status."""
    try:
        return int(app(args=arguments, prog_name="millrace", standalone_mode=False) or 0)
    except TyperException as error:
        return _misused(error)
    except MillraceError as error:
        for line in error.log_lines if isinstance(error, PartFailedError) else ():
            output.note(f"  {line}")
        output.note(f"millrace: {' '.join(error.message.split())}")
        return error.exit_code if isinstance(error, CommandError) else 1
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _misused(error: TyperException) -> int:
    message = error.format_message()
    if message.startswith("Usage:"):
        output.note(message)
    else:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "millrace"
        output.note(f"millrace: {' '.join(message.split()).rstrip('.')}; see: {where} --help")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
