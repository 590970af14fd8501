"""``millrace up``, ``down``, ``status``, ``doctor`` and ``demo``: the platform on this machine."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from libs.cli import output
from libs.cli.progress import Progress

if TYPE_CHECKING:
    from libs.local.platform import PlatformStatus
    from libs.local.settings import LocalSettings

BrokerName = Literal["auto", "kafka", "embedded"]
HomeOption = Annotated[Path | None, typer.Option("--home", help="Directory of the platform's state; default ./.millrace or MILLRACE_HOME.")]
BrokerOption = Annotated[
    BrokerName | None, typer.Option("--broker", help="auto: Apache Kafka, or the embedded broker where Kafka cannot be had.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def up(
    detach: Annotated[bool, typer.Option("--detach", help="Return when everything is ready; `millrace down` stops it.")] = False,
    broker: BrokerOption = None,
    home: HomeOption = None,
    wait: Annotated[
        float | None,
        typer.Option("--wait", min=0, help="Longest wait for deployed endpoints to answer, in seconds; default 120."),
    ] = None,
) -> None:
    """Start the platform on this machine; ready is when every part is and every deployed endpoint answers."""
    from libs.local import platform

    settings = local_settings(home, broker, wait)
    progress = Progress()
    if detach:
        progress.all_ready(platform.up_detached(settings, progress), "`millrace down` stops it")
    else:
        platform.up(settings, progress, lambda status: progress.all_ready(status, "Ctrl-C stops it"))
        output.say("stopped")


def down(home: HomeOption = None) -> None:
    """Stop the platform on this machine."""
    from libs.local import platform

    report = platform.down(local_settings(home))
    if report.leftovers_ended:
        output.say(f"{report.leftovers_ended} leftover processes were ended")
    output.say("stopped" if report.was_running else "the platform was not running")


def status(as_json: AsJson = False, home: HomeOption = None) -> None:
    """Show the parts and endpoints of the platform on this machine; exit 1 unless all parts are ready and all deployed endpoints answer."""
    from libs.local import platform

    found = platform.status(local_settings(home))
    if as_json:
        output.show_json(found.as_dict())
    elif not found.is_running:
        left = f" ({found.leftovers} leftover processes; `millrace down` ends them)" if found.leftovers else ""
        output.say(f"the platform in {found.home} is not running{left}; start it with: millrace up")
    else:
        _show_status(found)
    if not found.is_ready:
        raise typer.Exit(1)


def doctor(as_json: AsJson = False, home: HomeOption = None) -> None:
    """Check this machine and say what was found; exit 1 when the platform cannot run here."""
    from libs.local import doctor as checks

    findings = checks.examine(local_settings(home))
    if as_json:
        output.show_json({"findings": [finding.as_dict() for finding in findings]})
    else:
        for finding in findings:
            output.say(f"{finding.level:<8} {finding.subject:<14} {finding.text}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the platform running at the end.")] = False,
    home: HomeOption = None,
    broker: BrokerOption = None,
) -> None:
    """The whole story on real data: a model from a file to live predictions."""
    from libs.cli.demo import run

    run(local_settings(home, broker), keep=keep)


def local_settings(home: Path | None, broker: BrokerName | None = None, ready_timeout_s: float | None = None) -> "LocalSettings":
    """The environment's settings, overridden by what the command line says."""
    from libs.cli.settings import CliSettings
    from libs.local.settings import LocalSettings
    from libs.process import read_settings

    given: dict[str, Any] = {"home": home or CliSettings().home, "broker": broker, "ready_timeout_s": ready_timeout_s}
    return read_settings(lambda: LocalSettings(**{name: value for name, value in given.items() if value is not None}))


def _show_status(found: "PlatformStatus") -> None:
    output.fields(
        {
            "home": found.home,
            "state": "ready" if found.is_ready else "not ready",
            "pid": found.pid,
            "up": output.duration(found.uptime_s) if found.uptime_s is not None else "starting",
            "gateway": found.gateway,
            "gRPC": found.grpc or None,
            "broker": f"{found.broker} at {found.bootstrap_servers}" if found.broker else None,
            "traces": found.jaeger or "not kept (no Jaeger)",
            "memory": output.size(found.memory_bytes),
        }
    )
    output.say()
    rows = [
        (
            part.name,
            part.state,
            part.pid,
            output.duration(part.uptime_s) if part.uptime_s is not None else None,
            part.restarts,
            output.size(part.memory_bytes),
            list(part.ports),
            part.detail,
        )
        for part in found.parts
    ]
    output.table(("part", "state", "pid", "up", "restarts", "memory", "ports", "detail"), rows)
    for part in found.parts:
        if part.last_error:
            ago = f"{output.duration(max(0.0, time.time() - part.failed_at))} ago" if part.failed_at is not None else "once"
            output.say(f"\n{part.name}: {part.restarts} restarts; last error, {ago}: {part.last_error}")
    for stream in found.failing_streams:
        where = "nothing in hand" if stream.partition is None else f"partition {stream.partition} offset {stream.offset}"
        output.say(f"\nthe stream of {stream.endpoint} fails at {where} ({stream.failures} times): {stream.cause}")
    if found.endpoints:
        output.say()
        output.table(
            ("endpoint", "state", "why"),
            [
                (each.name, "ready" if each.is_ready else "waiting" if each.is_awaited else "not ready", each.reason)
                for each in found.endpoints
            ],
        )
