"""What is found on this machine, what it means for the platform, and what can be done about it."""

import ctypes
import importlib.util
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from libs.local import jaeger, kafka, processes
from libs.local.errors import KafkaUnavailableError
from libs.local.home import MINIMUM_FREE_BYTES, Home
from libs.local.settings import BrokerChoice, LocalSettings

_GIB = 2**30
_COMFORTABLE_MEMORY_BYTES = 4 * _GIB
_MINIMUM_MEMORY_BYTES = 2.5 * _GIB
_COMFORTABLE_DISK_BYTES = 10 * _GIB
_MINIMUM_OPEN_FILES = 1024
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_VERSION_FLAG = 1


class Level(StrEnum):
    """How much a finding matters: nothing, something is worse than it could be, the platform cannot run."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``remedy`` is empty when nothing needs to be done."""

    level: Level
    subject: str
    explanation: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """Explanation and remedy in one line."""
        return f"{self.explanation}; {self.remedy}" if self.remedy else self.explanation

    def as_dict(self) -> dict[str, str]:
        """For ``--json``."""
        return asdict(self)


def examine(settings: LocalSettings) -> list[Finding]:
    """Look at everything; takes a few seconds when Kafka's jars are not cached, because a Maven repository is asked."""
    home = Home.at(settings.home)
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _memory,
        lambda: _disk(home),
        lambda: _ports(settings, home),
        _uv,
        lambda: _broker(settings),
        lambda: _ray(settings),
        _cage,
        _limits,
        lambda: _jaeger(settings),
    )
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(Level.OK, "python", f"Python {version} on {sys.platform}, {psutil.cpu_count() or 1} cores")
    if sys.platform != "linux":
        yield Finding(
            Level.WARNING,
            "system",
            f"on {sys.platform} models run without a cage and nothing ends with its supervisor",
            "use Linux for models you did not make",
        )


def _memory() -> Iterator[Finding]:
    free = psutil.virtual_memory().available
    said = f"{free / _GIB:.1f} GiB of memory available"
    if free < _MINIMUM_MEMORY_BYTES:
        yield Finding(Level.PROBLEM, "memory", f"{said}, the platform at rest needs up to 2.5", "end other programs")
    elif free < _COMFORTABLE_MEMORY_BYTES:
        yield Finding(Level.WARNING, "memory", f"{said}, which leaves little for models", "end other programs")
    else:
        yield Finding(Level.OK, "memory", said)


def _disk(home: Home) -> Iterator[Finding]:
    existing = next(path for path in (home.root, *home.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    said = f"{free / _GIB:.1f} GiB free for {home.root}"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Finding(
            Level.PROBLEM, "home", f"{existing} cannot be written: {error.strerror}", "choose another home with --home or MILLRACE_HOME"
        )
        return
    if free < MINIMUM_FREE_BYTES:
        yield Finding(Level.PROBLEM, "home", said, "make room or choose another home with --home")
    elif free < _COMFORTABLE_DISK_BYTES:
        yield Finding(Level.WARNING, "home", f"{said}; an environment with scikit-learn takes about 0.3", "make room soon")
    else:
        yield Finding(Level.OK, "home", said)


def _ports(settings: LocalSettings, home: Home) -> Iterator[Finding]:
    if (pid := home.holder()) is not None:
        yield Finding(Level.OK, "ports", f"in use by the platform of this home (pid {pid})")
        return
    wanted = {settings.http_port: ("gateway", "set GATEWAY_HTTP_PORT")}
    if settings.grpc_enabled:
        wanted[settings.grpc_port] = ("gateway, gRPC", "set GATEWAY_GRPC_PORT")
    if not settings.bootstrap_servers:
        wanted[settings.kafka_port] = ("broker", "set MILLRACE_KAFKA_PORT")
    for port, (name, way_out) in wanted.items():
        if processes.is_port_free(port):
            if processes.is_ephemeral(port):
                yield Finding(
                    Level.WARNING,
                    "ports",
                    f"{port} ({name}) is free, but one that the kernel gives to clients ({processes.port_range()})",
                    f"{way_out} to another, or run `sysctl -w net.ipv4.ip_local_reserved_ports={port}`",
                )
            else:
                yield Finding(Level.OK, "ports", f"{port} ({name}) is free")
        else:
            yield Finding(
                Level.PROBLEM,
                "ports",
                f"{port} ({name}) is taken: {processes.holder_of_port(port)}",
                f"end it or {way_out} to a free port",
            )


def _uv() -> Iterator[Finding]:
    if importlib.util.find_spec("uv") is not None or shutil.which("uv"):
        yield Finding(Level.OK, "uv", "uv is there to build model environments")
    else:
        yield Finding(Level.PROBLEM, "uv", "there is no uv, so no model environment can be built", "run `make setup`")


def _broker(settings: LocalSettings) -> Iterator[Finding]:
    if settings.bootstrap_servers:
        yield Finding(Level.OK, "broker", f"`up` uses {settings.bootstrap_servers}, because KAFKA_BOOTSTRAP_SERVERS is set")
        return
    if settings.broker is BrokerChoice.EMBEDDED:
        yield Finding(
            Level.WARNING, "broker", "`up` uses the embedded broker as asked; it keeps nothing when it stops", "use --broker kafka"
        )
        return
    level = Level.PROBLEM if settings.broker is BrokerChoice.KAFKA else Level.WARNING
    otherwise = "" if settings.broker is BrokerChoice.KAFKA else " `up` would use the embedded broker, which keeps nothing when it stops;"
    try:
        java = kafka.find_java()
    except KafkaUnavailableError as error:
        yield Finding(level, "broker", f"Kafka cannot run:{otherwise} {error.message}")
        return
    said = f"`up` uses Apache Kafka {kafka.VERSION} on {java} (Java {kafka.java_version(java)})"
    if kafka.cached_classpath(settings.cache):
        yield Finding(Level.OK, "broker", f"{said}; its jars are in {settings.cache}")
    elif kafka.can_fetch():
        yield Finding(Level.OK, "broker", f"{said}; its jars (45 MB) are fetched at the first `up`")
    else:
        yield Finding(
            level,
            "broker",
            f"Kafka's jars are not in {settings.cache} and no Maven repository is reachable;{otherwise}".rstrip(";"),
            "connect once, or set KAFKA_BOOTSTRAP_SERVERS",
        )


def _ray(settings: LocalSettings) -> Iterator[Finding]:
    if settings.ray_address:
        yield Finding(Level.OK, "ray", f"replicas run on {settings.ray_address}, because RAY_ADDRESS is set")
    elif importlib.util.find_spec("ray") is None:
        yield Finding(Level.PROBLEM, "ray", "Ray is not installed", "run `make setup`")
    else:
        yield Finding(Level.OK, "ray", "`up` starts a Ray head on loopback")


def _cage() -> Iterator[Finding]:
    """The layers of ``libs/runner/cage.py`` that depend on the kernel."""
    if sys.platform != "linux":
        return
    actions = _read("/proc/sys/kernel/seccomp/actions_avail").split()
    if "errno" in actions:
        yield Finding(Level.OK, "cage", "seccomp filters are available")
    else:
        yield Finding(Level.PROBLEM, "cage", "this kernel has no seccomp filters, so a model could use the network", "use another kernel")
    version = _landlock_version()
    if version > 0:
        yield Finding(Level.OK, "cage", f"Landlock is available (ABI {version})")
    else:
        yield Finding(
            Level.WARNING,
            "cage",
            "Landlock is not active: A LOADED MODEL CAN READ AND WRITE EVERY FILE OF THIS USER, the platform's keys and log included",
            "boot a kernel ≥ 5.13 with `lsm=landlock,…`, or serve only models that you made yourself",
        )
    namespaces = int(_read("/proc/sys/user/max_user_namespaces") or 0)
    restricted = _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1"
    there = "available" if namespaces and not restricted else "not available"
    yield Finding(Level.OK, "cage", f"user namespaces are {there}; the cage does not need them")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MINIMUM_OPEN_FILES:
        yield Finding(
            Level.WARNING, "limits", f"{soft} open files allowed, Kafka and Ray want {_MINIMUM_OPEN_FILES}", f"run `ulimit -n {hard}`"
        )
    else:
        yield Finding(Level.OK, "limits", f"{soft} open files allowed")
    count, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if 0 <= count < _MINIMUM_OPEN_FILES:
        yield Finding(
            Level.WARNING, "limits", f"{count} processes and threads allowed, the platform runs several hundred", "raise `ulimit -u`"
        )


def _jaeger(settings: LocalSettings) -> Iterator[Finding]:
    if settings.otlp_endpoint:
        yield Finding(Level.OK, "traces", f"sent to {settings.otlp_endpoint}, because OTEL_EXPORTER_OTLP_ENDPOINT is set")
    elif binary := shutil.which("jaeger") or shutil.which("jaeger-all-in-one"):
        yield Finding(Level.OK, "traces", f"`up` starts {binary}; its page is http://{processes.LOOPBACK}:{jaeger.QUERY_PORT}")
    else:
        yield Finding(
            Level.WARNING, "traces", "no `jaeger` on PATH, so traces are not kept", "put one there or set OTEL_EXPORTER_OTLP_ENDPOINT"
        )


def _landlock_version() -> int:
    call = ctypes.CDLL(None, use_errno=True).syscall
    version: int = call(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION_FLAG))
    return version


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
