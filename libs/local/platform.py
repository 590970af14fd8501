"""The platform on this machine: which parts it has, and how it is brought up, looked at and taken down.

``up`` runs in the foreground until SIGINT or SIGTERM; ``up_detached`` starts the same in a session of its own
(``python -m libs.local.platform``) and returns when everything is ready.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import psutil

from libs import reports
from libs.errors import MillraceError, TransientError
from libs.local import embedded, jaeger, kafka, processes, ray_head
from libs.local.errors import AlreadyRunningError, KafkaUnavailableError, PartFailedError, PortTakenError
from libs.local.home import Home
from libs.local.settings import BrokerChoice, LocalSettings, inherited_environment
from libs.local.supervisor import Event, Listening, Part, Running, State, Supervisor
from libs.reports import EndpointReport, StreamReport
from libs.settings import KafkaSettings

SERVICES = ("registry", "validator", "builder", "serving", "streaming", "gateway")
_REPORTS = {"gateway": reports.ENDPOINTS_FILE, "streaming": reports.STREAMS_FILE}
_STOP_TIMEOUT_S = 60.0
_LOOK_S = 0.2
_EXIT_TIMEOUT_S = 10.0
"""How long a supervisor may take to exit that has given its lock up, or was killed."""


class BrokerKind(StrEnum):
    """What kind of broker carries the log."""

    KAFKA = "kafka"
    EMBEDDED = "embedded"
    EXTERNAL = "external"


@dataclass(frozen=True)
class Broker:
    """The broker that was chosen."""

    kind: BrokerKind
    bootstrap_servers: str


@dataclass(frozen=True)
class Notice:
    """Something to be told to whoever runs ``up``; ``is_loud`` when it must not be overlooked."""

    text: str
    is_loud: bool = False


Listener = Callable[[Event | Notice], None]
Plan = Callable[[LocalSettings, Home, Broker, jaeger.Jaeger | None], list[Part]]


@dataclass(frozen=True)
class PartStatus:
    """A part as it is now. Memory is the proportional set size of all its processes.

    ``last_error`` and ``failed_at`` (seconds since the epoch) tell of the last time that it ended unasked, also when it is back.
    """

    name: str
    state: str
    pid: int | None
    uptime_s: float | None
    restarts: int
    memory_bytes: int
    ports: tuple[int, ...]
    detail: str
    last_error: str = ""
    failed_at: float | None = None


@dataclass(frozen=True)
class PlatformStatus:
    """The platform of a home as it is now; ``leftovers`` counts processes of one whose supervisor is gone.

    ``is_ready``: every part is, and every endpoint answers that shall. One that cannot by itself (its deployment failed, or nothing is
    deployed) is shown among ``endpoints`` and keeps nothing from being ready.
    """

    home: str
    is_running: bool
    pid: int | None = None
    uptime_s: float | None = None
    is_ready: bool = False
    gateway: str = ""
    grpc: str = ""
    bootstrap_servers: str = ""
    broker: str = ""
    jaeger: str = ""
    memory_bytes: int = 0
    leftovers: int = 0
    parts: tuple[PartStatus, ...] = ()
    endpoints: tuple[EndpointReport, ...] = ()
    failing_streams: tuple[StreamReport, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class DownReport:
    """What ``down`` did."""

    was_running: bool
    leftovers_ended: int


def up(settings: LocalSettings, listener: Listener, on_ready: Callable[[PlatformStatus], None], plan: Plan | None = None) -> None:
    """Run the platform in this process until SIGINT or SIGTERM, then stop everything.

    Parameters
    ----------
    listener
        Is told of every change of a part and of everything the user should know; called in this thread.
    on_ready
        Called once, when every part is ready and the deployed endpoints answer, or have not for ``ready_timeout_s``.
    plan
        What the platform consists of; ``parts`` unless given.

    Raises
    ------
    AlreadyRunningError, PortTakenError, HomeUnusableError, KafkaUnavailableError, PartFailedError
        One sentence each; nothing is left running.
    """
    home = Home.at(settings.home)
    _refuse_if_running(home)
    home.create()
    with home.locked():
        recover(home, listener)
        try:
            broker = choose_broker(settings, listener)
            tracing = find_jaeger(settings, home, listener)
            listed = (plan or parts)(settings, home, broker, tracing)
            _warn_of_ephemeral_ports(listed, listener)
            asyncio.run(_supervise(settings, home, broker, tracing, listed, listener, on_ready))
        finally:
            processes.end(processes.members(home.instance), grace_s=2)
            home.state_file.unlink(missing_ok=True)


def up_detached(settings: LocalSettings, listener: Listener) -> PlatformStatus:
    """Start the platform in a session of its own; returns when it is ready.

    Raises
    ------
    MillraceError
        As for ``up``; also when the supervisor ends without a word.
    """
    home = Home.at(settings.home)
    _refuse_if_running(home)
    home.create()
    reading, writing = os.pipe()
    with home.log.open("ab") as log:
        subprocess.run(
            [sys.executable, "-m", "libs.local.platform", "--report", str(writing), "--settings", settings.model_dump_json()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(writing,),
            check=False,
        )
    os.close(writing)
    try:
        with os.fdopen(reading) as reports:
            for line in reports:
                if _relay(json.loads(line), listener):
                    return status(settings)
    except KeyboardInterrupt:
        down(settings)
        raise
    raise PartFailedError(f"the platform's supervisor ended unexpectedly; its log is {home.log}", processes.last_lines(home.log))


def down(settings: LocalSettings) -> DownReport:
    """Stop the platform of a home, and end what an earlier one left behind; nothing happens when there is neither."""
    home = Home.at(settings.home)
    holder = home.holder()
    if holder is not None:
        _stop_supervisor(home, holder)
    leftovers = processes.end(processes.members(home.instance), grace_s=10)
    home.state_file.unlink(missing_ok=True)
    return DownReport(holder is not None, leftovers)


def status(settings: LocalSettings) -> PlatformStatus:
    """Look at the platform of a home; never waits for it."""
    home = Home.at(settings.home)
    pid = home.holder()
    everything = processes.members(home.instance)
    state = home.read_state() if pid is not None else {}
    if pid is None or not state:
        return PlatformStatus(str(home.root), is_running=pid is not None, pid=pid, leftovers=0 if pid else len(everything))
    now = time.time()
    supervisor = [psutil.Process(pid)] if psutil.pid_exists(pid) else []
    rows = tuple(_part_status(row, processes.members_of_part(everything, row["name"]), now) for row in state["parts"])
    are_known, endpoints = _endpoints(home, state["parts"])
    return PlatformStatus(
        home=str(home.root),
        is_running=True,
        pid=pid,
        uptime_s=now - state["started_at"],
        is_ready=all(row.state == State.READY for row in rows) and are_known and not any(each.is_awaited for each in endpoints),
        gateway=state["gateway"],
        grpc=state.get("grpc", ""),
        bootstrap_servers=state["bootstrap_servers"],
        broker=state["broker"],
        jaeger=state["jaeger"],
        memory_bytes=processes.memory_bytes({*everything, *supervisor}),
        parts=rows,
        endpoints=endpoints,
        failing_streams=tuple(reports.read_streams(home.run / reports.STREAMS_FILE)),
    )


def _endpoints(home: Home, rows: Sequence[Mapping[str, Any]]) -> tuple[bool, tuple[EndpointReport, ...]]:
    """Whether it is known which endpoints answer, and which do; a platform without a gateway has none."""
    gateway = next((row for row in rows if row["name"] == "gateway"), None)
    if gateway is None:
        return True, ()
    if gateway["state"] != State.READY:
        return False, ()
    found = reports.read_endpoints(home.run / reports.ENDPOINTS_FILE)
    return found is not None, tuple(found or ())


async def _until_endpoints_answer(
    settings: LocalSettings, home: Home, rows: Callable[[], Sequence[Mapping[str, Any]]], tell: Listener
) -> None:
    """Return when every endpoint answers that shall, or when that has lasted too long; says which do not."""
    began = time.monotonic()
    is_told = False
    while True:
        are_known, endpoints = _endpoints(home, rows())
        silent = [each for each in endpoints if each.is_awaited]
        if are_known and not silent:
            break
        if time.monotonic() - began >= settings.ready_timeout_s:
            tell(Notice(_silent_sentence(silent, settings.ready_timeout_s)))
            break
        if silent and not is_told:
            tell(Notice(f"waiting for {_count(silent)} to answer: {', '.join(each.name for each in silent)}"))
            is_told = True
        await asyncio.sleep(_LOOK_S)
    for each in endpoints:
        if not each.is_ready and not each.is_awaited:
            tell(Notice(f"endpoint {each.name} does not answer: {each.reason}"))


def _silent_sentence(silent: Sequence[EndpointReport], waited_s: float) -> str:
    if not silent:
        return f"the gateway has not said within {waited_s:g} s which endpoints answer; its log tells why"
    which = "; ".join(f"{each.name}: {each.reason}" for each in silent)
    return f"{_count(silent)} did not answer within {waited_s:g} s and may later: {which}"


def _count(endpoints: Sequence[EndpointReport]) -> str:
    return "1 endpoint" if len(endpoints) == 1 else f"{len(endpoints)} endpoints"


def recover(home: Home, listener: Listener) -> None:
    """End what a platform left behind whose supervisor was killed."""
    leftovers = processes.end(processes.members(home.instance), grace_s=10)
    if leftovers or home.state_file.exists():
        home.state_file.unlink(missing_ok=True)
        listener(Notice(f"the platform was not stopped properly last time; {leftovers} leftover processes were ended"))


def choose_broker(settings: LocalSettings, listener: Listener) -> Broker:
    """The user's broker, else Kafka, else (if that cannot be had and ``auto`` was asked for) the embedded one.

    Raises
    ------
    KafkaUnavailableError
        When Kafka was asked for and cannot be had.
    """
    if settings.bootstrap_servers:
        return Broker(BrokerKind.EXTERNAL, settings.bootstrap_servers)
    address = f"{processes.LOOPBACK}:{settings.kafka_port}"
    if settings.broker is not BrokerChoice.EMBEDDED:
        try:
            kafka.install(settings.cache, lambda text: listener(Notice(text)))
            return Broker(BrokerKind.KAFKA, address)
        except KafkaUnavailableError as error:
            if settings.broker is BrokerChoice.KAFKA:
                raise
            hidden = "; what the Kafka of this home holds is not visible meanwhile" if (settings.home / "kafka" / "data").exists() else ""
            listener(Notice(f"Apache Kafka cannot be had: {error.message}{hidden}", is_loud=True))
    listener(Notice(embedded.NOTICE, is_loud=True))
    return Broker(BrokerKind.EMBEDDED, address)


def _warn_of_ephemeral_ports(plan: Sequence[Part], listener: Listener) -> None:
    for name, port in ((part.name, port) for part in plan for port in part.ports if processes.is_ephemeral(port)):
        text = (
            f"port {port} of {name} is one that the kernel gives to clients ({processes.port_range()}): it is kept while the platform runs "
            f"and can be lost to a client when not; take another, or run `sysctl -w net.ipv4.ip_local_reserved_ports={port}`"
        )
        listener(Notice(text))


def find_jaeger(settings: LocalSettings, home: Home, listener: Listener) -> jaeger.Jaeger | None:
    """The Jaeger to start: none when the user has a collector, when none is on PATH, or when its ports are taken."""
    found = None if settings.otlp_endpoint else jaeger.find(home.run / "jaeger.yaml")
    taken = [port for port in (jaeger.OTLP_PORT, jaeger.QUERY_PORT) if not processes.is_port_free(port)]
    if found is not None and taken:
        listener(Notice(f"Jaeger is not started: port {taken[0]} is taken: {processes.holder_of_port(taken[0])}; no traces are kept"))
        return None
    return found


def parts(settings: LocalSettings, home: Home, broker: Broker, tracing: jaeger.Jaeger | None) -> list[Part]:
    """What the platform consists of, each part after those it depends on."""
    base = _environment(settings, home, broker, tracing)
    listed = _broker_parts(settings, home, broker)
    if tracing is not None:
        listed.append(
            Part(
                "jaeger",
                tracing.argv,
                lambda: tracing.environment,
                ports=(jaeger.QUERY_PORT, jaeger.OTLP_PORT),
                is_ready=lambda: processes.accepts(jaeger.QUERY_PORT) and processes.accepts(jaeger.OTLP_PORT),
                stop_timeout_s=2,
                required=False,
            )
        )
    if not settings.ray_address:
        listed.append(_ray_part(home, base))
    after = ("topics",) if tracing is None else ("topics", "jaeger")
    return [*listed, *(_service_part(name, settings, home, base, after) for name in SERVICES)]


def _broker_parts(settings: LocalSettings, home: Home, broker: Broker) -> list[Part]:
    if broker.kind is BrokerKind.EXTERNAL:
        return [_topics_part(broker, after=())]
    port = settings.kafka_port
    if broker.kind is BrokerKind.KAFKA:
        argv = _python("libs.local.kafka", "--home", str(home.root), "--port", str(port), "--heap-mb", str(settings.kafka_heap_mb))
    else:
        argv = _python("libs.local.embedded", "--port", str(port), *_declared_topics())
    part = Part(
        "broker",
        argv,
        ports=(port,),
        is_ready=lambda: processes.accepts(port),
        stop_timeout_s=15,
        restarts_dependents=broker.kind is BrokerKind.EMBEDDED,
    )
    return [part, _topics_part(broker, after=("broker",))]


def _topics_part(broker: Broker, after: tuple[str, ...]) -> Part:
    return Part("topics", after=after, is_ready=lambda: _create_topics(broker), start_timeout_s=90)


def _declared_topics() -> list[str]:
    from schemas.topics import TOPICS

    return [argument for topic in TOPICS for argument in ("--topic", f"{topic.name}:{topic.partitions}")]


def _create_topics(broker: Broker) -> bool:
    from libs.messaging.admin import create_topics
    from schemas.topics import TOPICS

    settings = KafkaSettings(
        bootstrap_servers=broker.bootstrap_servers, embedded=broker.kind is BrokerKind.EMBEDDED, request_timeout_ms=10_000
    )
    try:
        asyncio.run(create_topics(settings, TOPICS))
    except TransientError:
        return False
    return True


def _ray_part(home: Home, base: Mapping[str, str]) -> Part:
    """Replicas inherit the head's environment; credentials of an S3 store reach them this way."""
    return Part(
        "ray",
        _python("libs.local.ray_head", "--home", str(home.root)),
        lambda: base,
        is_ready=lambda: _ray_port(home) is not None and processes.accepts(_ray_port(home) or 0),
        stale_files=(ray_head.address_path(home.root),),
        start_timeout_s=90,
        stop_timeout_s=20,
        restarts_dependents=True,
    )


def _ray_address(home: Home) -> str:
    try:
        address: str = json.loads(ray_head.address_path(home.root).read_text())["address"]
    except (OSError, json.JSONDecodeError, KeyError):
        return ""
    return address


def _ray_port(home: Home) -> int | None:
    _, _, port = _ray_address(home).rpartition(":")
    return int(port) if port else None


def _service_part(name: str, settings: LocalSettings, home: Home, base: Mapping[str, str], after: tuple[str, ...]) -> Part:
    uses_ray = name == "serving" and not settings.ray_address

    def environment() -> Mapping[str, str]:
        if uses_ray:
            return {**base, **ray_head.client_environment(home.root), "RAY_ADDRESS_FILE": str(ray_head.address_path(home.root))}
        return base

    return Part(
        name,
        _python(f"services.{name}"),
        environment,
        after=after,
        # Its imports take as long as Ray's start, and while Ray is away somebody has to say so.
        restarts_with=("ray",) if uses_ray else (),
        start_timeout_s=150 if uses_ray else 60,
        announces=True,
        ports=_gateway_ports(settings) if name == "gateway" else (),
        listens=_gateway_sockets(settings) if name == "gateway" else (),
        is_ready=(lambda: _is_healthy(settings)) if name == "gateway" else None,
        stale_files=(home.run / _REPORTS[name],) if name in _REPORTS else (),
        stop_timeout_s=15,
    )


def _gateway_ports(settings: LocalSettings) -> tuple[int, ...]:
    return (settings.http_port, settings.grpc_port) if settings.grpc_enabled else (settings.http_port,)


def _gateway_sockets(settings: LocalSettings) -> tuple[Listening, ...]:
    http = Listening("GATEWAY_HTTP_SOCKETS", settings.http_host, settings.http_port, settings.gateway_workers)
    grpc = Listening("GATEWAY_GRPC_SOCKETS", settings.http_host, settings.grpc_port, settings.gateway_workers)
    return (http, grpc) if settings.grpc_enabled else (http,)


def _is_healthy(settings: LocalSettings) -> bool:
    host = processes.LOOPBACK if settings.http_host in ("0.0.0.0", "::", "") else settings.http_host  # noqa: S104 - compared, not bound
    try:
        with urllib.request.urlopen(f"http://{host}:{settings.http_port}/healthz", timeout=2) as answer:
            healthy: bool = answer.status == 200
            return healthy
    except OSError:
        return False


def _environment(settings: LocalSettings, home: Home, broker: Broker, tracing: jaeger.Jaeger | None) -> dict[str, str]:
    """Variables of every service; those that the user has set are left to the user, the home excepted."""
    ours = {
        "KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "KAFKA_EMBEDDED": "true" if broker.kind is BrokerKind.EMBEDDED else "false",
        "ARTIFACTS_URL": (home.root / "artifacts").as_uri(),
        "ENVIRONMENTS_DIR": str(home.root / "environments"),
        "RUNNER_KEY_FILE": str(home.runner_key),
        "GATEWAY_HTTP_PORT": str(settings.http_port),
        "GATEWAY_GRPC_PORT": str(settings.grpc_port),
    }
    if collector := settings.otlp_endpoint if tracing is None else f"http://{processes.LOOPBACK}:{jaeger.OTLP_PORT}":
        ours["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector
    users = inherited_environment()
    return {**{name: users.get(name) or value for name, value in ours.items()}, "MILLRACE_HOME": str(home.root)}


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


async def _supervise(
    settings: LocalSettings,
    home: Home,
    broker: Broker,
    tracing: jaeger.Jaeger | None,
    plan: Sequence[Part],
    listener: Listener,
    on_ready: Callable[[PlatformStatus], None],
) -> None:
    began = time.time()

    def write_state() -> None:
        home.write_state(
            {
                "pid": os.getpid(),
                "started_at": began,
                "gateway": f"http://{settings.http_host}:{settings.http_port}",
                "grpc": f"{settings.http_host}:{settings.grpc_port}" if settings.grpc_enabled else "",
                "bootstrap_servers": broker.bootstrap_servers,
                "broker": broker.kind.value,
                "jaeger": f"http://{processes.LOOPBACK}:{jaeger.QUERY_PORT}" if tracing else settings.otlp_endpoint,
                "parts": [_row(running) for running in supervisor.parts.values()],
            }
        )

    def on_event(event: Event) -> None:
        write_state()
        listener(event)

    async def on_parts_ready() -> None:
        await _until_endpoints_answer(settings, home, lambda: [_row(running) for running in supervisor.parts.values()], listener)
        on_ready(await asyncio.to_thread(status, settings))

    supervisor = Supervisor(
        plan,
        instance=home.instance,
        logs_directory=home.logs,
        run_directory=home.run,
        environment=inherited_environment(),
        on_event=on_event,
    )
    await supervisor.run(on_parts_ready)


def _row(running: Running) -> dict[str, Any]:
    return {
        "name": running.part.name,
        "state": running.state.value,
        "pid": running.pid,
        "started_at": running.started_at,
        "restarts": running.restarts,
        "detail": running.detail,
        "last_error": running.last_error,
        "failed_at": running.failed_at,
    }


def _part_status(row: Mapping[str, Any], members: Sequence[psutil.Process], now: float) -> PartStatus:
    return PartStatus(
        name=row["name"],
        state=row["state"],
        pid=row["pid"],
        uptime_s=now - row["started_at"] if row["state"] == State.READY else None,
        restarts=row["restarts"],
        memory_bytes=processes.memory_bytes(members),
        ports=tuple(processes.listening_ports(members)),
        detail=row["detail"],
        last_error=row.get("last_error", ""),
        failed_at=row.get("failed_at"),
    )


def _refuse_if_running(home: Home) -> None:
    if home.holder() is not None:
        with home.locked():
            pass


def _stop_supervisor(home: Home, pid: int) -> None:
    """Return when the supervisor has ended; its lock is free a moment before."""
    try:
        supervisor = psutil.Process(pid)
        supervisor.terminate()
    except psutil.NoSuchProcess:
        supervisor = None
    _until(lambda: home.holder() != pid, _STOP_TIMEOUT_S)
    if supervisor is None or (home.holder() != pid and _until(lambda: _has_ended(supervisor), _EXIT_TIMEOUT_S)):
        return
    with suppress(psutil.NoSuchProcess):
        supervisor.kill()
    _until(lambda: _has_ended(supervisor), _EXIT_TIMEOUT_S)


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for something; False when it has not happened in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or only not yet collected by its parent."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


_FAILURES: dict[str, type[MillraceError]] = {kind.__name__: kind for kind in (AlreadyRunningError, PortTakenError, KafkaUnavailableError)}


def _relay(report: Mapping[str, Any], listener: Listener) -> bool:
    """Hand on one report of a detached supervisor; True when it says that everything is ready."""
    match report["kind"]:
        case "event":
            listener(Event(report["part"], State(report["state"]), report["elapsed_s"], report["detail"]))
        case "notice":
            listener(Notice(report["text"], report["is_loud"]))
        case "error":
            if report["type"] in _FAILURES:
                raise _FAILURES[report["type"]](report["message"])
            raise PartFailedError(report["message"], report["log_lines"])
    return bool(report["kind"] == "ready")


class _Reporter:
    """The other end of ``_relay``: one JSON object per line until everything is ready or has failed."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "w", buffering=1)

    def listen(self, said: Event | Notice) -> None:
        self._report("event" if isinstance(said, Event) else "notice", asdict(said))
        sys.stdout.write(json.dumps(asdict(said)) + "\n")
        sys.stdout.flush()

    def ready(self, _: PlatformStatus) -> None:
        self._report("ready", {})
        self._close()

    def failed(self, error: MillraceError) -> None:
        lines = error.log_lines if isinstance(error, PartFailedError) else ()
        self._report("error", {"type": type(error).__name__, "message": error.message, "log_lines": lines})
        self._close()

    def _report(self, kind: str, content: Mapping[str, Any]) -> None:
        if not self._file.closed:
            try:
                self._file.write(json.dumps({"kind": kind, **content}) + "\n")
            except BrokenPipeError:
                self._close()

    def _close(self) -> None:
        with suppress(BrokenPipeError):
            self._file.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """What ``up_detached`` starts: returns at once, and goes on as an orphan that nobody has to wait for."""
    parser = argparse.ArgumentParser(prog="python -m libs.local.platform", description=__doc__)
    parser.add_argument("--settings", required=True, help="LocalSettings as JSON")
    parser.add_argument("--report", type=int, required=True, help="file descriptor to report to until ready")
    options = parser.parse_args(arguments)
    if os.fork():
        return
    reporter = _Reporter(options.report)
    try:
        up(LocalSettings.model_validate_json(options.settings), reporter.listen, reporter.ready)
    except MillraceError as error:
        reporter.failed(error)
        sys.exit(error.message)


if __name__ == "__main__":
    main()
