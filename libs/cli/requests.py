"""``millrace requests``: what became of the requests that gateways accepted."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libs.cli import output
from libs.cli.errors import CommandError, PlatformUnreachableError, RequestRefusedError
from libs.cli.session import open_session

if TYPE_CHECKING:
    from libs.cli.client import Client
    from libs.cli.log_reader import OpenLog
    from libs.predictions.audit import Audit, InstanceReport

app = typer.Typer(help="See what became of requests.", rich_markup_mode=None, no_args_is_help=True)

_ATTEMPTS = 10
_PAUSE_S = 1.5
"""A living gateway says at least once a second what it has counted, to the log and to the other workers; so long nothing agrees exactly."""


@app.callback()
def _requests() -> None:
    """See what became of requests."""


@dataclass(frozen=True)
class Counted:
    """What the gateway's ``/metrics`` says: its living instances, and requests by outcome and ``accepted``."""

    instances: tuple[str, ...]
    ended: Mapping[str, int]


@dataclass(frozen=True)
class Verdict:
    """What an audit came to."""

    reports: list["InstanceReport"]
    findings: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether everything adds up."""
        return not self.findings and all(report.is_sound for report in self.reports)


@app.command()
def audit(
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="15m, 1h, 7d or RFC 3339; else all that is kept.")] = None,
    bootstrap_servers: Annotated[str | None, typer.Option("--bootstrap-servers", help="Kafka; else the platform's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that every accepted request has exactly one recorded end; exit 1 when something does not add up."""
    from libs.cli.log_reader import log_of, moment

    began = None if since is None else moment(since, datetime.now(UTC))
    with open_session("requests audit") as session:
        verdict = examine(session.client, log_of(session.settings, bootstrap_servers), began)
    if as_json:
        output.show_json(_document(verdict))
    else:
        _show(verdict)
    if not verdict.is_sound:
        wrong = [*verdict.findings, *(f"{report.instance}: {finding}" for report in verdict.reports for finding in report.findings)]
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CommandError(f"the account of requests does not add up: {wrong[0]}{more}")


def examine(client: "Client", log: "OpenLog", since: datetime | None) -> Verdict:
    """Read the log and hold it against the gateway's metrics; again, while a living gateway has not said all that it counted."""
    verdict = _examine_once(client, log, since, 0.0)
    for _ in range(_ATTEMPTS - 1):
        if verdict.is_sound:
            break
        verdict = _examine_once(client, log, since, _PAUSE_S)
    return verdict


def _examine_once(client: "Client", log: "OpenLog", since: datetime | None, pause_s: float) -> Verdict:
    from libs.predictions.audit import Audit

    taken = Audit()
    before = counted(client)
    time.sleep(pause_s)
    with log() as reader:
        for record in reader.until_now(since):
            taken.add(record)
    time.sleep(pause_s if before and len(before.instances) > 1 else 0.0)
    after = counted(client)
    reports = taken.reports(after.instances if after else ())
    return Verdict(reports, [*taken.unreadable, *_against_metrics(taken, before, after, since)])


def _against_metrics(taken: "Audit", before: Counted | None, after: Counted | None, since: datetime | None) -> list[str]:
    """The log was read between two looks at the metrics, so what it says lies between them."""
    if before is None or after is None or before.instances != after.instances:
        return []
    unheard = [instance for instance in after.instances if not taken.knows(instance)]
    if unheard:
        return [] if since else [f"the log says nothing of gateway {instance}, which runs" for instance in unheard]
    said = taken.ended(after.instances)
    return [
        f"of the gateway that runs the log says {said.get(name, 0)} {name}, its metrics {_between(before.ended, after.ended, name)}"
        for name in ("accepted", "completed", "failed", "expired")
        if not before.ended.get(name, 0) <= said.get(name, 0) <= after.ended.get(name, 0)
    ]


def _between(before: Mapping[str, int], after: Mapping[str, int], name: str) -> str:
    low, high = before.get(name, 0), after.get(name, 0)
    return str(low) if low == high else f"{low} to {high}"


def counted(client: "Client") -> Counted | None:
    """What the gateway's metrics say; None when no gateway answers, or it has none."""
    try:
        text = client.metrics()
    except (PlatformUnreachableError, RequestRefusedError):
        return None
    return parse_metrics(text)


def parse_metrics(text: str) -> Counted:
    """The few metrics that an audit needs."""
    from prometheus_client.parser import text_string_to_metric_families

    from libs.metrics import definitions as metric

    instances: list[str] = []
    ended: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == metric.GATEWAY_INSTANCE.name:
                instances.append(sample.labels["instance"])
            elif sample.name == metric.REQUESTS_ACCEPTED.name:
                ended["accepted"] = ended.get("accepted", 0) + int(sample.value)
            elif sample.name == metric.REQUESTS.name:
                outcome = sample.labels["outcome"]
                ended[outcome] = ended.get(outcome, 0) + int(sample.value)
    return Counted(tuple(sorted(instances)), ended)


def _show(verdict: Verdict) -> None:
    columns = (
        "instance",
        "state",
        "accepted",
        "completed",
        "failed",
        "expired",
        "in flight",
        "in the log",
        "waiting",
        "lost",
        "off",
        "account",
    )
    rows = []
    for report in sorted(verdict.reports, key=lambda each: each.instance):
        counters = report.counters
        account = "adds up" if report.is_sound else "DOES NOT ADD UP"
        rows.append(
            (
                report.instance[:12],
                report.state,
                counters.accepted,
                counters.ended.completed,
                counters.ended.failed,
                counters.ended.expired,
                counters.in_flight,
                report.rows.total,
                counters.waiting,
                counters.lost.total,
                counters.off.total,
                account if report.is_whole else f"{account} (from a later record on)",
            )
        )
    output.table(columns, rows)
    for finding in verdict.findings:
        output.say(f"  {finding}")
    for report in verdict.reports:
        for finding in report.findings:
            output.say(f"  {report.instance}: {finding}")
    if verdict.is_sound:
        total = sum(report.counters.accepted for report in verdict.reports)
        output.note(f"every one of {total} accepted requests is accounted for")


def _document(verdict: Verdict) -> dict[str, Any]:
    return {
        "is_sound": verdict.is_sound,
        "findings": verdict.findings,
        "instances": [
            {
                "instance": report.instance,
                "state": report.state.value,
                "is_whole": report.is_whole,
                "is_sound": report.is_sound,
                **report.counters.model_dump(mode="json"),
                "in_flight": report.counters.in_flight,
                "waiting": report.counters.waiting,
                "rows": report.rows.model_dump(mode="json"),
                "findings": list(report.findings),
            }
            for report in verdict.reports
        ],
    }
