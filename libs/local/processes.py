"""The processes of one platform: how they are marked, tied to their supervisor, found again and ended."""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

INSTANCE_VARIABLE = "MILLRACE_INSTANCE"
PART_VARIABLE = "MILLRACE_PART"
LOOPBACK = "127.0.0.1"

_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED_PORTS = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_ENDED = (psutil.CONN_TIME_WAIT, psutil.CONN_FIN_WAIT2)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def child_setup() -> Callable[[], None]:
    """What a child does between fork and exec: ask for SIGTERM when the supervisor's main thread dies.

    Built before the fork, so that the child only makes two system calls.
    """
    control = _control()
    supervisor = os.getpid()

    def tie_to_supervisor() -> None:
        control(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:
            os.kill(os.getpid(), signal.SIGTERM)

    return tie_to_supervisor


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    _control()(_PR_SET_CHILD_SUBREAPER, 1)


def reap_adopted(own: Iterable[int]) -> None:
    """Collect adopted children that have ended; ``own`` are the process ids that somebody else waits for."""
    mine = set(own)
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in mine and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def members(instance: str) -> list[psutil.Process]:
    """Own processes that carry the mark of a platform in their environment, and their descendants; never this process."""
    found: dict[int, psutil.Process] = {}
    for process in _marked(INSTANCE_VARIABLE, instance):
        found[process.pid] = process
        with suppress(psutil.Error):
            found.update((child.pid, child) for child in process.children(recursive=True))
    found.pop(os.getpid(), None)
    return list(found.values())


def members_of_part(processes: Iterable[psutil.Process], name: str) -> list[psutil.Process]:
    """Those of ``processes`` that belong to a part: marked with its name, or descended from one that is."""
    found: dict[int, psutil.Process] = {}
    for process in processes:
        with suppress(psutil.Error):
            if process.environ().get(PART_VARIABLE) == name:
                found[process.pid] = process
                found.update((child.pid, child) for child in process.children(recursive=True))
    return list(found.values())


def end(processes: Iterable[psutil.Process], grace_s: float) -> int:
    """SIGTERM, wait, SIGKILL; returns how many processes there were."""
    alive = list(processes)
    _signal(alive, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(alive, timeout=grace_s)
    _signal(stubborn, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=5)
    return len(alive)


def memory_bytes(processes: Iterable[psutil.Process]) -> int:
    """Proportional set size of the processes together: pages that several share are divided among them."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    return total


def listening_ports(processes: Iterable[psutil.Process]) -> list[int]:
    """TCP ports that the processes listen on, sorted."""
    ports = set()
    for process in processes:
        with suppress(psutil.Error):
            ports |= {getattr(each.laddr, "port", 0) for each in process.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN}
    return sorted(ports)


def is_port_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether this process could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def accepts(port: int, host: str = LOOPBACK) -> bool:
    """Whether somebody accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def reserve(port: int, host: str = LOOPBACK) -> socket.socket:
    """Keep a port from being lost while nobody listens on it, until the socket is closed; who sets ``SO_REUSEADDR`` can listen there.

    The kernel gives a client that connects any port of its ephemeral range that is not bound, even the very port it wants to reach: then
    the client is connected to itself, for ever, and nobody can listen there. A port that is bound is never given.

    Raises
    ------
    OSError
        When it is taken.
    """
    keeper = socket.socket()
    try:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((host, port))
    except OSError:
        keeper.close()
        raise
    return keeper


def is_ephemeral(port: int) -> bool:
    """Whether the kernel may give this port to any client that connects somewhere."""
    try:
        first, last = map(int, _PORT_RANGE.read_text().split())
        kept = _RESERVED_PORTS.read_text().strip()
    except (OSError, ValueError):
        return False
    spans = [span.partition("-") for span in kept.split(",") if span]
    return first <= port <= last and not any(int(low) <= port <= int(high or low) for low, _, high in spans)


def port_range() -> str:
    """The kernel's ephemeral range, in words."""
    return "–".join(_PORT_RANGE.read_text().split())


def holder_of_port(port: int, host: str = LOOPBACK) -> str:
    """Who keeps us from listening on a port, as a clause that goes on after its name; only as much as this user may know."""
    with suppress(psutil.Error):
        found: list[Any] = [each for each in psutil.net_connections(kind="tcp") if getattr(each.laddr, "port", 0) == port]
        listening = [each for each in found if each.status == psutil.CONN_LISTEN and _conflicts(each.laddr.ip, host)]
        to_itself = [each for each in found if each.raddr == each.laddr and each.status not in _ENDED]
        connected = [each for each in found if each.raddr and each.status not in _ENDED and _conflicts(each.laddr.ip, host)]
        if listening:
            return f"{_process(listening)} listens there"
        if to_itself:
            return (
                f"{_process(to_itself)} is connected to itself there: it tried to reach the port while nobody listened, "
                "and the kernel gave it that port as its own"
            )
        if connected:
            there = connected[0].raddr
            return f"a connection of {_process(connected[:1])} to {there.ip}:{there.port} uses it"
        if any(each.status in _ENDED for each in found):
            return "a connection that has just ended keeps it for at most a minute"
    return "another process has it"


def _process(connections: Sequence[Any]) -> str:
    for each in connections:
        if each.pid:
            with suppress(psutil.Error):
                return f"process {each.pid} ({_short(psutil.Process(each.pid).cmdline())})"
    return "a process of another user"


def _conflicts(address: str, host: str) -> bool:
    everywhere = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    return host in everywhere or address in (host, f"::ffff:{host}", *everywhere)


def last_lines(log: Path, offset: int = 0, count: int = 20, size_bytes: int = 16_384) -> list[str]:
    """The end of a log file, nothing before ``offset``, oldest line first; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(offset, log.stat().st_size - size_bytes))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def _marked(variable: str, value: str) -> Iterator[psutil.Process]:
    user = os.getuid()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().real == user and process.environ().get(variable) == value:
                yield process


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _control() -> Callable[[int, int], object]:
    if sys.platform != "linux":
        return lambda *_: None
    control = ctypes.CDLL(None, use_errno=True).prctl
    control.argtypes = [ctypes.c_int, ctypes.c_ulong]
    return lambda option, value: control(option, value)


def _short(command: list[str]) -> str:
    text = " ".join(command)
    return text if len(text) <= 80 else text[:79] + "…"
