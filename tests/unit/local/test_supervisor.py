import asyncio
import os
import random
import re
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from libs.errors import ConfigurationError
from libs.local import processes
from libs.local.errors import PartFailedError, PortTakenError
from libs.local.home import Home
from libs.local.supervisor import Backoff, Event, Listening, Part, State
from tests.conftest import free_port
from tests.unit.local.conftest import ANNOUNCING, STUBBORN, make_supervisor, program, supervised


async def test_a_part_starts_after_those_it_depends_on(home: Home) -> None:
    parts = [program("log"), program("ray"), program("gateway", after=("log", "ray")), program("late", after=("gateway",))]
    async with supervised(home, parts) as run:
        assert set(run.order(State.READY)[:2]) == {"log", "ray"}
        assert run.order(State.READY)[2:] == ["gateway", "late"]


async def test_independent_parts_start_together(home: Home) -> None:
    async with supervised(home, [program("one"), program("two")]) as run:
        assert [(event.part, event.state) for event in run.events[:2]] == [("one", State.STARTING), ("two", State.STARTING)]


async def test_stopping_ends_dependents_first(home: Home) -> None:
    async with supervised(home, [program("log"), program("service", after=("log",)), program("door", after=("service",))]) as run:
        pass
    assert run.order(State.STOPPED) == ["door", "service", "log"]


async def test_a_part_killed_by_kill_9_is_restarted(home: Home) -> None:
    async with supervised(home, [program("service")]) as run:
        first = run.pid("service")
        os.kill(first, signal.SIGKILL)
        await run.until_said("service", State.READY, 2)
        assert run.pid("service") != first
        assert run.supervisor.parts["service"].restarts == 1
        assert "SIGKILL" in (await run.until_said("service", State.EXITED)).detail


async def test_the_last_error_of_a_part_is_kept_when_it_is_back(home: Home) -> None:
    once = (
        f"import os\nif not os.path.exists('done'):\n    open('done', 'w').close()\n    raise ValueError('the disk is full')\n{ANNOUNCING}"
    )
    moved = f"import os; os.chdir(os.path.dirname(os.environ['MILLRACE_READY_FILE']))\n{once}"
    async with supervised(home, [program("service", moved)]) as run:
        row = run.supervisor.parts["service"]
        assert (row.state, row.restarts) == (State.READY, 1)
        assert row.last_error == "it ended with exit code 1: ValueError: the disk is full"
        assert row.failed_at is not None
        assert (await run.until_said("service", State.EXITED)).detail.startswith(
            "it ended with exit code 1: ValueError: the disk is full; rest"
        )
        os.kill(run.pid("service"), signal.SIGKILL)
        await run.until_said("service", State.READY, 2)
        assert row.last_error == "it was ended by SIGKILL"


async def test_what_depends_on_a_volatile_part_is_restarted_with_it(home: Home) -> None:
    parts = [
        program("broker", restarts_dependents=True),
        Part("topics", is_ready=lambda: True, after=("broker",)),
        program("service", after=("topics",)),
        program("bystander"),
    ]
    async with supervised(home, parts) as run:
        before = {name: run.pid(name) for name in ("broker", "service", "bystander")}
        os.kill(before["broker"], signal.SIGKILL)
        await run.until_said("service", State.READY, 2)
        assert run.pid("service") != before["service"]
        assert run.pid("bystander") == before["bystander"]
        assert run.order(State.READY)[-3:] == ["broker", "topics", "service"]


async def test_what_restarts_with_a_part_does_not_wait_for_it_and_ends_before_it(home: Home) -> None:
    asked = 0

    def is_ready() -> bool:
        nonlocal asked
        asked += 1
        return asked != 2  # when it comes back it takes a while

    parts = [program("ray", restarts_dependents=True, is_ready=is_ready), program("serving", restarts_with=("ray",))]
    async with supervised(home, parts) as run:
        before = run.pid("serving")
        os.kill(run.pid("ray"), signal.SIGKILL)
        await run.until_said("serving", State.READY, 2)
        assert run.pid("serving") != before
        await run.until_said("ray", State.READY, 2)
    assert run.order(State.STOPPED) == ["serving", "ray"]


async def test_a_part_that_ignores_sigterm_is_killed(home: Home) -> None:
    async with supervised(home, [program("stubborn", STUBBORN, stop_timeout_s=0.1)]) as run:
        pid = run.pid("stubborn")
    assert not psutil.pid_exists(pid)


async def test_no_child_of_a_part_survives_it(home: Home) -> None:
    forking = f"import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)\n{ANNOUNCING}"
    async with supervised(home, [program("forking", forking)]) as run:
        (child,) = psutil.Process(run.pid("forking")).children()
    processes.end(processes.members(home.instance), grace_s=2)
    assert not child.is_running()


async def test_a_part_that_never_comes_up_fails_with_its_last_log_lines(home: Home) -> None:
    broken = program("broken", "import sys; print('cannot find the thing'); sys.exit(3)")
    with pytest.raises(PartFailedError, match=r"broken does not start: it ended with exit code 3; its log is .*broken\.log") as caught:
        async with supervised(home, [program("healthy"), broken]):
            pass
    assert caught.value.log_lines[-1] == "cannot find the thing"
    assert processes.members(home.instance) == []


async def test_a_part_that_is_not_required_may_be_missing(home: Home) -> None:
    parts = [Part("jaeger", ("/does/not/exist",), required=False), program("gateway")]
    async with supervised(home, parts) as run:
        assert "cannot be run" in (await run.until_said("jaeger", State.EXITED, 3)).detail


async def test_a_part_that_takes_too_long_fails(home: Home) -> None:
    slow = program("slow", "import time; time.sleep(60)", start_timeout_s=0.1)
    with pytest.raises(PartFailedError, match=r"slow does not start: not ready after 0\.1 s"):
        async with supervised(home, [slow]):
            pass


async def test_a_condition_that_can_never_hold_ends_everything_with_its_own_sentence(home: Home) -> None:
    def refuse() -> bool:
        raise ConfigurationError("the topic has 3 partitions")

    with pytest.raises(ConfigurationError, match="the topic has 3 partitions"):
        async with supervised(home, [program("log"), Part("topics", is_ready=refuse, after=("log",))]):
            pass
    assert processes.members(home.instance) == []


async def test_a_ready_file_of_an_earlier_process_does_not_count(home: Home) -> None:
    (home.run / "silent.ready").write_text("1")
    silent = program("silent", "import time; time.sleep(60)", start_timeout_s=0.2)
    with pytest.raises(PartFailedError, match="not ready"):
        async with supervised(home, [silent]):
            pass


async def test_a_taken_port_is_named_with_its_holder_before_anything_starts(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind((processes.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        events: list[Event] = []
        supervisor = make_supervisor(home, [program("log"), program("gateway", ports=(port,))], events.append)
        with pytest.raises(PortTakenError, match=rf"gateway cannot listen on 127\.0\.0\.1:{port}: process {os.getpid()} "):
            await supervisor.run(asyncio.Event().wait)
    assert events == []


async def test_two_parts_that_want_one_port_are_named_before_anything_starts(home: Home) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    parts = [program("broker", ports=(port,)), program("gateway", ports=(port,))]
    with pytest.raises(PortTakenError, match=f"gateway and broker cannot both listen on 127.0.0.1:{port}"):
        await make_supervisor(home, parts, lambda _: None).run(lambda: None)


async def test_a_second_stop_kills_at_once(home: Home) -> None:
    async with supervised(home, [program("stubborn", STUBBORN, stop_timeout_s=60)]) as run:
        run.supervisor.stop()
        await run.until_said("stubborn", State.STOPPING)
        run.supervisor.stop()
        async with asyncio.timeout(5):
            await run.until_said("stubborn", State.STOPPED)


def test_pauses_between_restarts_double_up_to_a_limit() -> None:
    backoff = Backoff(first_s=0.5, longest_s=30)
    assert [backoff.delay_s(failures) for failures in (1, 2, 3, 7, 10_000)] == [0.5, 1.0, 2.0, 30.0, 30.0]


ANSWERING = """
import json, os, pathlib, socket
taken = [socket.socket(fileno=descriptor) for descriptor in json.loads(os.environ["SOCKETS"])]
pathlib.Path(os.environ["MILLRACE_READY_FILE"]).write_text(str(os.getpid()))
while True:
    taken[0].accept()[0].sendall(b"%d" % os.getpid())
"""


async def test_a_connection_that_comes_while_a_part_restarts_is_answered_by_the_next_process(home: Home) -> None:
    port = free_port()

    async def asked() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        pid = int(await reader.read())
        writer.close()
        return pid

    async with supervised(home, [program("door", ANSWERING, listens=(Listening("SOCKETS", "127.0.0.1", port),))]) as run:
        first = run.pid("door")
        assert await asked() == first
        os.kill(first, signal.SIGKILL)
        await run.until_said("door", State.EXITED)
        async with asyncio.timeout(30):
            assert [await asked() for _ in range(3)] == [run.pid("door")] * 3
        assert run.pid("door") != first
    with pytest.raises(ConnectionRefusedError):
        await asked()


async def test_a_part_whose_address_cannot_be_listened_on_does_not_start(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        supervisor = make_supervisor(home, [program("door", listens=(Listening("SOCKETS", "127.0.0.1", port),))], lambda _: None)
        with pytest.raises(PortTakenError, match=f"door cannot listen on 127.0.0.1:{port}"):
            await supervisor.run(lambda: None)


def connected_to_itself(port: int) -> socket.socket | None:
    """What becomes of a client that tries and tries while nobody listens; None when it was always refused."""
    for _ in range(80_000):
        client = socket.socket()
        try:
            client.connect((processes.LOOPBACK, port))
        except ConnectionRefusedError:
            client.close()
            continue
        return client
    return None


def ephemeral_port() -> int:
    """A free port that Linux gives to clients: every second of the range, from its first; the others are given by ``bind``."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return next(port for port in random.sample(range(first, last, 2), 100) if processes.is_port_free(port))


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels choose ports otherwise")
async def test_a_port_lost_to_a_client_that_is_connected_to_itself_is_named_with_that_client(home: Home) -> None:
    port = ephemeral_port()
    client = connected_to_itself(port)
    assert client is not None
    with client:
        supervisor = make_supervisor(home, [program("broker", ports=(port,))], lambda _: None)
        with pytest.raises(
            PortTakenError, match=rf"127\.0\.0\.1:{port}: process {os.getpid()} \(.*\) is connected to itself there: it tried"
        ):
            await supervisor.run(lambda: None)


LISTENING = """
import os, pathlib, signal, socket
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", {port}))
listener.listen()
pathlib.Path(os.environ["MILLRACE_READY_FILE"]).write_text(str(os.getpid()))
signal.pause()
"""


async def test_a_port_is_not_lost_to_a_client_while_its_part_is_not_there(home: Home) -> None:
    port = ephemeral_port()
    broker = program("broker", LISTENING.format(port=port), ports=(port,), start_timeout_s=10.0)
    async with supervised(home, [broker]) as run:
        run.supervisor._backoff = Backoff(first_s=30.0)
        os.kill(run.pid("broker"), signal.SIGKILL)
        await run.until_said("broker", State.EXITED)
        assert await asyncio.to_thread(connected_to_itself, port) is None
        with socket.create_server((processes.LOOPBACK, port)):
            assert processes.accepts(port), "whoever is meant to listen still can"
    processes.reserve(port).close()


def test_who_has_a_port_is_told_truly() -> None:
    with socket.create_server((processes.LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        me = f"process {os.getpid()} \\("
        assert re.match(rf"{me}.*\) listens there", processes.holder_of_port(port))
        with socket.create_connection((processes.LOOPBACK, port)) as client, server.accept()[0]:
            mine = client.getsockname()[1]
            assert re.match(rf"a connection of {me}.*\) to 127\.0\.0\.1:{port} uses it", processes.holder_of_port(mine))
    assert processes.holder_of_port(mine) in ("a connection that has just ended keeps it for at most a minute", "another process has it")


def test_which_ports_the_kernel_gives_to_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports, kept = tmp_path / "range", tmp_path / "reserved"
    ports.write_text("32768\t60999\n")
    kept.write_text("40000,50000-50009\n")
    monkeypatch.setattr(processes, "_PORT_RANGE", ports)
    monkeypatch.setattr(processes, "_RESERVED_PORTS", kept)
    found = {port: processes.is_ephemeral(port) for port in (9092, 32768, 40000, 40001, 50005, 60999, 61000)}
    assert [port for port, given in found.items() if given] == [32768, 40001, 60999]
    assert processes.port_range() == "32768–60999"


def test_no_default_port_is_one_that_linux_gives_to_clients() -> None:
    from libs.local import jaeger
    from libs.local.settings import LocalSettings

    defaults = LocalSettings.model_fields
    ports = [defaults[name].default for name in ("kafka_port", "http_port", "grpc_port")] + [jaeger.OTLP_PORT, jaeger.QUERY_PORT]
    assert all(not 32_768 <= port <= 60_999 for port in (*ports, *range(9101, 9106)))
