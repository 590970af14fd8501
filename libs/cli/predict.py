"""``millrace predict``: ask an endpoint."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from libs.cli import output
from libs.cli.errors import CommandError, UsageError
from libs.cli.session import open_session


def predict(
    endpoint: Annotated[str, typer.Argument(help="The endpoint.")],
    json_request: Annotated[str | None, typer.Option("--json-request", metavar="FILE", help="File with the request; - is stdin.")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="JSON", help="The request itself.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer with its version, request id and trace id as JSON.")] = False,
) -> None:
    """Ask an endpoint: a V1 request has "instances", a V2 request has "inputs"."""
    request = _request(json_request, data)
    with open_session("predict") as session:
        answer = session.client.predict(endpoint, request)
        if as_json:
            output.show_json(
                {
                    "answer": answer.body,
                    "model_version": answer.model_version,
                    "request_id": answer.request_id,
                    "trace_id": session.trace_id,
                }
            )
            return
        output.say(answer.text)
        output.note(f"answered by {answer.model_version or endpoint}, trace {session.trace_id}")


def _request(file: str | None, data: str | None) -> bytes:
    if (file is None) == (data is None):
        raise UsageError("give the request with either --json-request FILE or --data JSON")
    if data is not None:
        request = data.encode()
    elif file == "-":
        request = sys.stdin.buffer.read()
    else:
        try:
            request = Path(str(file)).read_bytes()
        except OSError as error:
            raise CommandError(f"{file} cannot be read: {error.strerror}") from error
    try:
        json.loads(request)
    except ValueError as error:
        raise CommandError(f"the request is not JSON: {error}") from error
    return request
