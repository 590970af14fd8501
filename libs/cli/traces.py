"""``millrace trace``: one story as a tree of spans, from Jaeger."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libs.cli import output
from libs.cli.errors import CommandError
from libs.cli.session import Session, open_session
from libs.errors import MillraceError

if TYPE_CHECKING:
    from libs.cli.client import Json

TRACE_ID = re.compile(r"[0-9a-f]{32}")
JAEGER_TIMEOUT_S = 10.0
ID_TAGS = ("millrace.request_id", "messaging.message.id", "messaging.message.conversation_id")
"""Span attributes that may hold an id that is not a trace id."""


@dataclass(frozen=True)
class Span:
    """One span: who did what, when (seconds since the epoch), for how long (seconds), and which spans it is linked to."""

    span_id: str
    parent_id: str | None
    service: str
    operation: str
    start_s: float
    duration_s: float
    error: str | None
    links: tuple[str, ...] = ()


def trace(
    identity: Annotated[str, typer.Argument(metavar="ID", help="Trace id, operation id, correlation id or request id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a trace as a tree (needs Jaeger)."""
    with open_session("trace") as session:
        jaeger = Jaeger(session.settings.jaeger_url)
        trace_id, spans = find_trace(session, jaeger, identity)
    if as_json:
        output.show_json({"trace_id": trace_id, "spans": [vars(span) for span in spans]})
        return
    output.say(f"trace {trace_id}")
    for line in tree(spans):
        output.say(line)


class Jaeger:
    """Jaeger's query API.

    Raises
    ------
    CommandError
        From every method, when no Jaeger answers.

    References
    ----------
    jaegertracing/documentation, "APIs", the JSON that its UI reads: ``/api/traces/{id}``, ``/api/traces?service=…&tags=…``.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def spans(self, trace_id: str) -> list[Span]:
        """The spans of a trace."""
        found = self.spans_so_far(trace_id)
        if not found:
            raise CommandError(f"Jaeger at {self._url} has no trace {trace_id}; spans take a few seconds to arrive")
        return found

    def spans_so_far(self, trace_id: str) -> list[Span]:
        """The spans of a trace that have arrived; none is an answer too."""
        found = self._get(f"/api/traces/{trace_id}")
        return [_span(span, found[0]["processes"]) for span in found[0]["spans"]] if found else []

    def search(self, tag: str, value: str) -> str | None:
        """A trace of which a span of any service carries an attribute; None when there is none."""
        for service in self._get("/api/services"):
            found = self._get("/api/traces", service=str(service), tags=json.dumps({tag: value}), limit="1", lookback="2d")
            if found:
                return str(found[0]["traceID"])
        return None

    def _get(self, path: str, **parameters: str) -> list[Any]:
        import httpx

        try:
            response = httpx.get(self._url + path, params=parameters, timeout=JAEGER_TIMEOUT_S, trust_env=False)
            if response.status_code == httpx.codes.NOT_FOUND:
                return []
            response.raise_for_status()
            return list(response.json().get("data") or [])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise CommandError(
                f"no Jaeger answers at {self._url}; put `jaeger` on PATH before `millrace up`, or set MILLRACE_JAEGER_URL"
            ) from error


def find_trace(session: Session, jaeger: Jaeger, identity: str) -> tuple[str, list[Span]]:
    """The trace that an id belongs to: as its own id, through the events it led to, or through a span that carries it."""
    if TRACE_ID.fullmatch(identity.lower()):
        spans = jaeger.spans_so_far(identity.lower())
        if spans:
            return identity.lower(), spans
    known = _trace_of_events(session, identity)
    if known:
        return known, jaeger.spans(known)
    for tag in ID_TAGS:
        found = jaeger.search(tag, identity)
        if found:
            return found, jaeger.spans(found)
    raise CommandError(f"nothing is known of {identity!r}, neither as a trace nor as an id in one; spans take a few seconds to arrive")


def _trace_of_events(session: Session, correlation_id: str) -> str | None:
    try:
        events = session.client.recent_events(correlation_id=correlation_id)
    except MillraceError:
        return None  # Jaeger may know the trace of a platform that is down
    for event in events:
        parts = str(event.get("traceparent") or "").split("-")
        if len(parts) == 4 and TRACE_ID.fullmatch(parts[1]):
            return parts[1]
    return None


def tree(spans: list[Span]) -> Iterator[str]:
    """Spans as lines: children below their parent, in order of time, each with its start (relative) and duration."""
    known = {span.span_id for span in spans}
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start_s):
        children[span.parent_id if span.parent_id in known else None].append(span)
    began_s = min((span.start_s for span in spans), default=0.0)

    def below(parent_id: str | None, indent: str) -> Iterator[str]:
        for index, span in enumerate(children[parent_id]):
            last = index == len(children[parent_id]) - 1
            branch = "" if parent_id is None else ("└─ " if last else "├─ ")
            yield f"{indent}{branch}{_line(span, began_s)}"
            yield from below(span.span_id, indent if parent_id is None else indent + ("   " if last else "│  "))

    yield from below(None, "  ")


def _line(span: Span, began_s: float) -> str:
    error = f"  ERROR {span.error}" if span.error else ""
    links = f"  linked to {', '.join(span.links)}" if span.links else ""
    return (
        f"{span.service}: {span.operation}  [+{output.duration(span.start_s - began_s)}, {output.duration(span.duration_s)}]{links}{error}"
    )


def _span(span: "Json", processes: "Json") -> Span:
    own = str(span["traceID"])
    references = span.get("references") or []
    parents = [str(reference["spanID"]) for reference in references if reference["refType"] == "CHILD_OF" and reference["traceID"] == own]
    linked = [f"trace {reference['traceID']}" for reference in references if reference["traceID"] != own]
    tags = {tag["key"]: tag["value"] for tag in span.get("tags") or []}
    failed = tags.get("error") in (True, "true") or tags.get("otel.status_code") == "ERROR"
    return Span(
        span_id=str(span["spanID"]),
        parent_id=parents[0] if parents else None,
        service=str(processes[span["processID"]]["serviceName"]),
        operation=str(span["operationName"]),
        start_s=span["startTime"] / 1e6,
        duration_s=span["duration"] / 1e6,
        error=str(tags.get("otel.status_description") or "failed") if failed else None,
        links=tuple(dict.fromkeys(linked)),
    )
