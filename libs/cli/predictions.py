"""``millrace predictions``: the prediction log as it is written."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libs.cli import output
from libs.cli.session import open_session

if TYPE_CHECKING:
    from libs.messaging.records import Record
    from libs.predictions.records import PredictionBatch
    from libs.runner.wire import Arrays

app = typer.Typer(help="Read the prediction log.", rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def _predictions() -> None:
    """Read the prediction log."""


@app.command()
def tail(
    endpoint: Annotated[str, typer.Argument(help="The endpoint.")],
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="Begin so long ago: 15m, 1h, 7d or RFC 3339.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a request as JSON per line, with its inputs and outputs.")] = False,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on until Ctrl-C.")] = True,
    bootstrap_servers: Annotated[str | None, typer.Option("--bootstrap-servers", help="Kafka; else the platform's.")] = None,
) -> None:
    """Print the requests to an endpoint as they end."""
    from libs.cli.log_reader import log_of, moment

    began = None if since is None else moment(since, datetime.now(UTC))
    with open_session("predictions tail") as session:
        log = log_of(session.settings, bootstrap_servers)
    with log() as reader:
        if began is not None or not follow:
            _print(endpoint, reader.until_now(began), as_json)
        if follow:
            _print(endpoint, reader.from_now(), as_json)


def _print(endpoint: str, said: "Iterator[Record]", as_json: bool) -> None:
    from libs.errors import InvalidMessage
    from libs.predictions.records import PredictionBatch, read

    for record in said:
        if record.key != endpoint.encode():
            continue
        try:
            batch = read(record)
        except InvalidMessage as error:
            output.note(error.message)
            continue
        if isinstance(batch, PredictionBatch):
            for request in requests_of(batch) if as_json else ():
                output.say(json.dumps(request, ensure_ascii=False))
            for row in () if as_json else batch.rows():
                output.say(line(batch, row))


def line(batch: "PredictionBatch", row: dict[str, Any]) -> str:
    """A request on one line: when, which, how it ended, who answered, how long it took."""
    head = batch.head
    version = f"{head.model_name}@{head.model_version}" if head.model_name else "–"
    took = "" if row["latency_s"] != row["latency_s"] else f"  {output.duration(row['latency_s'])}"
    why = f" ({row['error']})" if row["error"] else ""
    return f"{output.local_time(_time(row))}  {row['request_id']}  {row['outcome']}{why}  {version}  {row['protocol']}{took}"


def requests_of(batch: "PredictionBatch") -> Iterator[dict[str, Any]]:
    """Each request as JSON values; ``inputs`` and ``outputs`` are there if they were logged in the same record."""
    head = batch.head
    tensors = {sequence: (inputs, outputs) for block in batch.blocks for sequence, inputs, outputs in block.requests()}
    for row in batch.rows():
        request = {name: None if value != value else value for name, value in row.items()}
        request |= {"time": _time(row), "endpoint": head.endpoint_name, "model_name": head.model_name, "model_version": head.model_version}
        if row["sequence"] in tensors:
            inputs, outputs = tensors[row["sequence"]]
            request |= {"inputs": _lists(inputs), "outputs": _lists(outputs)}
        yield request


def _lists(arrays: "Arrays") -> dict[str, Any]:
    return {name: _plain(array.tolist()) for name, array in arrays.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return None if isinstance(value, float) and value - value != 0 else value


def _time(row: dict[str, Any]) -> str:
    return datetime.fromtimestamp(row["accepted_at"], UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
