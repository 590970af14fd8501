"""The fallback broker: librdkafka's mock cluster in a process of its own, for machines where Apache Kafka cannot be had.

``python -m libs.local.embedded --port 9092 --topic millrace.commands:1 …`` speaks the real protocol on loopback (produce, fetch,
consumer groups, transactions) until SIGTERM. What it does not do is in ``NOTICE``. Topics that nobody declared come into
being when they are first used, with ``DEFAULT_PARTITIONS`` partitions; there is no topic administration.

References
----------
confluentinc/librdkafka ``src/rdkafka_mock.h`` and ``src/rdkafka_mock.c``
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from libs.errors import ConfigurationError

LOOPBACK = "127.0.0.1"

DEFAULT_PARTITIONS = 4
"""Partitions of a topic that nobody declared (``defaults.partition_cnt`` in ``rdkafka_mock.c``)."""

NOTICE = (
    "EMBEDDED BROKER: this platform runs on librdkafka's in-memory broker, not on Apache Kafka. "
    "Everything is lost when it stops (models and endpoints too), a partition keeps only its newest 5 MB or 100 000 batches, "
    "older records are dropped silently, topics are never compacted, and group members do not survive its restart. "
    "Good for a first look; for anything else let `millrace up` reach a Maven repository once, or set KAFKA_BOOTSTRAP_SERVERS."
)

_PRODUCER = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m libs.local.embedded", description=__doc__)
    parser.add_argument("--port", type=int, default=9092, help="port on loopback")
    parser.add_argument("--topic", action="append", default=[], metavar="NAME:PARTITIONS", help="topic to create; repeatable")
    parser.add_argument("--ready-file", type=Path, help="file to write the process id to once clients can connect")
    options = parser.parse_args(arguments)
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        cluster = MockCluster(options.port, dict(_topic(text) for text in options.topic))
    except ConfigurationError as error:
        sys.exit(error.message)
    sys.stdout.write(f"{NOTICE}\n")
    sys.stdout.flush()
    if options.ready_file is not None:
        options.ready_file.write_text(str(os.getpid()))
    signal.sigwait(signals)
    cluster.close()


class MockCluster:
    """One mock broker listening on a chosen loopback port.

    Parameters
    ----------
    port
        Where clients connect. librdkafka itself picks a port at random; the listening socket is exchanged for ours.
    topics
        Name → number of partitions of the topics to create.

    Raises
    ------
    ConfigurationError
        When the port is taken or librdkafka cannot be loaded.
    """

    def __init__(self, port: int, topics: Mapping[str, int]) -> None:
        listener = _listen(port)
        self._library = _load()
        reason = ctypes.create_string_buffer(512)
        self._handle = self._library.rd_kafka_new(_PRODUCER, None, reason, len(reason))
        if not self._handle:
            raise ConfigurationError(f"librdkafka does not start: {reason.value.decode()}")
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._handle, 1)
        if not self._cluster:
            raise ConfigurationError("librdkafka does not start its embedded broker")
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        self._exchange_listener(listener)
        for name, partitions in topics.items():
            self.create_topic(name, partitions)

    def close(self) -> None:
        """End the broker; everything it held is gone."""
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._handle)

    def create_topic(self, name: str, partitions: int) -> None:
        code = self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1)
        if code:
            raise ConfigurationError(f"the embedded broker does not create the topic {name!r} with {partitions} partitions (error {code})")

    def _exchange_listener(self, listener: socket.socket) -> None:
        bootstraps = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        random_port = int(bootstraps.rpartition(":")[2])
        (descriptor,) = (
            each.fd
            for each in psutil.Process().net_connections(kind="tcp4")
            if each.status == psutil.CONN_LISTEN and each.laddr.port == random_port
        )
        port = listener.getsockname()[1]
        os.dup2(listener.fileno(), descriptor)
        listener.close()
        self._library.rd_kafka_mock_broker_set_host_port(self._cluster, 1, LOOPBACK.encode(), port)


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"the embedded broker cannot listen on {LOOPBACK}:{port}: {error.strerror}") from error
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_path()))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("rd_kafka_new", pointer, [number, pointer, text, ctypes.c_size_t]),
        ("rd_kafka_destroy", None, [pointer]),
        ("rd_kafka_mock_cluster_new", pointer, [pointer, number]),
        ("rd_kafka_mock_cluster_destroy", None, [pointer]),
        ("rd_kafka_mock_cluster_bootstraps", text, [pointer]),
        ("rd_kafka_mock_topic_create", number, [pointer, text, number, number]),
        ("rd_kafka_mock_group_initial_rebalance_delay_ms", None, [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_host_port", None, [pointer, ctypes.c_int32, text, number]),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def _library_path() -> Path:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("confluent-kafka") or ():
            if file.name.startswith("librdkafka"):
                return Path(str(file.locate()))
    raise ConfigurationError("the embedded broker needs the package confluent-kafka with its bundled librdkafka; run `make setup`")


def _topic(text: str) -> tuple[str, int]:
    name, _, partitions = text.rpartition(":")
    return name, int(partitions)


if __name__ == "__main__":
    main()
