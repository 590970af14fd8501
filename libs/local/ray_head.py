"""A Ray head for one machine: token-authenticated, every port on loopback, nothing left when it ends.

``python -m libs.local.ray_head --home H`` stays in the foreground until SIGTERM or SIGINT and writes ``H/run/ray.json``
(``{"address": "127.0.0.1:PORT"}``) when a driver can connect. A driver needs ``client_environment(home)`` before it imports ray.

Two small processes watch each other, so that ``kill -9`` of either leaves no orphan::

    launcher (in the foreground)  ──pipe──►  keeper, leader of a session of its own
                                               ├── gcs_server
                                               └── raylet ── agents, Serve's controller, replicas … (same session)

The keeper starts Ray by Ray's own ``Node`` class, then replaces itself by a plain interpreter that only watches (to keep Ray
loaded would cost 45 MB for nothing). When the launcher is gone the keeper reads end-of-file; when the keeper is gone the
launcher hears of it; whoever remains kills what is left of the session. Ray's own agents would outlive a killed raylet by
up to a minute (ray-project/ray ``_private/process_watcher.py``).

``ray start --node-ip-address=127.0.0.1`` cannot be used: it replaces a loopback address by the machine's own
(``resolve_ip_for_localhost`` in ``_private/services.py``) and Ray then listens on every interface.
"""

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"

LOGICAL_CPUS = 1
"""Scheduling units that Ray hands out, not cores: replicas ask for none, and Ray keeps as many idle workers as units are free."""

OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Ray's minimum is 75 MiB. Tensors do not travel through it; a page of it costs memory when it is first used."""

STOP_TIMEOUT_S = 4.0
"""How long Ray gets to end by itself before its session is killed."""

MAX_LOG_BYTES = 8 * 1024 * 1024
"""Size at which Ray begins another file of a log; one older file is kept."""

KEPT_LOGS = 3
"""Log directories that are kept, the running one included."""

FIRST_WORKERS = 2
"""Worker processes that are started with Ray, while serving imports its client: for Serve's controller and for the first replica."""

FIRST_WORKERS_KEPT_S = 120
"""How long they are kept by force; on a busy machine it takes so long until serving is there."""

_POLL_S = 0.5
_CALL_TIMEOUT_S = 10.0
_PRELOADED = (
    "libs.lean_ray",
    "ray.serve._private.controller",
    "ray.serve._private.replica",
    "libs.artifacts.factory",
    "libs.environments",
    "libs.inference.supervisor",
)


def client_environment(home: Path) -> dict[str, str]:
    """Environment that a process needs before it imports ray, to be a driver of the head of ``home``.

    ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` is Ray's switch for "the cluster is this machine": 127.0.0.1 stays what it is.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(home)),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
    }


def token_path(home: Path) -> Path:
    """Where the head keeps the token that every connection to it must present."""
    return home.absolute() / "secrets" / "ray-token"


def address_path(home: Path) -> Path:
    """The file that says where the head listens; it exists while the head is ready."""
    return home.absolute() / "run" / "ray.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the head of a home; the exit status is 0 when it was told to stop."""
    parser = argparse.ArgumentParser(prog="python -m libs.local.ray_head", description="A Ray head on loopback.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--keep", type=Path, metavar="SESSION_DIRECTORY", help=argparse.SUPPRESS)
    parser.add_argument("--watch", type=int, nargs=2, metavar=("GCS_PID", "RAYLET_PID"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    home = given.home.absolute()
    if given.watch is not None:
        return _watch(given.keep, *given.watch)
    if given.keep is not None:
        return _keep(home, given.keep)
    return _launch(home)


def _launch(home: Path) -> int:
    for directory in (home / "run", home / "logs" / "ray", home / "secrets"):
        directory.mkdir(parents=True, exist_ok=True)
    (home / "secrets").chmod(0o700)
    (home / "logs" / "ray").chmod(0o700)
    with (home / "run" / "ray.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"a Ray head of {home} is already running") from None
        _write_token(token_path(home))
        _remove_stale(home)
        session = _session_directory(home)
        try:
            return _run_keeper(home, session)
        finally:
            _remove_stale(home)


def _run_keeper(home: Path, session: Path) -> int:
    watched = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, lambda *_: None)
    keeper = subprocess.Popen(
        [sys.executable, "-m", "libs.local.ray_head", "--home", str(home), "--keep", str(session)],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **client_environment(home), **_server_environment()},
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    asked = False
    while keeper.poll() is None and not asked:
        asked = signal.sigwait(watched) != signal.SIGCHLD
    if keeper.stdin is not None:
        keeper.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        keeper.wait(STOP_TIMEOUT_S + 1)
    _kill_session(keeper.pid)
    keeper.wait()
    if not asked:
        raise SystemExit(f"Ray ended by itself; its logs are in {home / 'logs' / 'ray'}")
    return 0


def _server_environment() -> dict[str, str]:
    """What Ray's processes are told on top of what drivers are told; the figures are CPU of one core of two, idle.

    ``RAY_worker_niceness`` is 15 by default, which the runners would inherit.
    """
    return {
        "RAY_ROTATION_MAX_BYTES": str(MAX_LOG_BYTES),
        "RAY_ROTATION_BACKUP_COUNT": "1",
        "RAY_preload_python_modules": ",".join(_PRELOADED),
        "RAY_prestart_worker_first_driver": "1",
        "RAY_worker_maximum_startup_concurrency": "2",
        "RAY_worker_niceness": "0",
        "RAY_event_stats": "0",
        "RAY_task_events_report_interval_ms": "0",
    }


def _keep(home: Path, session: Path) -> int:
    """Start Ray, say where it listens, then become the process that watches it."""
    from ray._private import services
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    # A head without the dashboard's server, which Ray starts even when the dashboard is off, and with our agent instead of Ray's.
    loopback_head = type("LoopbackHead", (Node,), {"start_api_server": lambda *_, **__: None})
    services._build_python_executable_command_memory_profileable = _agent_command
    parameters = RayParams(
        node_ip_address=LOOPBACK,
        num_cpus=LOGICAL_CPUS,
        num_gpus=0,
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=str(session),
        session_name="session",
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
    )
    node = loopback_head(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
    partial = address_path(home).with_suffix(".partial")
    partial.write_text(json.dumps({"address": node.gcs_address}))
    partial.replace(address_path(home))
    _start_workers(LOOPBACK, node.node_manager_port)
    pids = [str(node.all_processes[kind][0].process.pid) for kind in ("gcs_server", "raylet")]
    program = [sys.executable, "-m", "libs.local.ray_head", "--home", str(home), "--keep", str(session), "--watch", *pids]
    os.execv(sys.executable, program)  # noqa: S606 (no shell is meant)


def _start_workers(host: str, port: int) -> None:
    """Have the raylet start the first workers, for no job in particular; without them everything only takes longer."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
    from ray.exceptions import RayError

    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        job_id=b"\xff" * 4,
        keep_alive_duration_secs=FIRST_WORKERS_KEPT_S,
        num_workers=FIRST_WORKERS,
    )
    try:
        with contextlib.closing(init_grpc_channel(f"{host}:{port}")) as channel:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_CALL_TIMEOUT_S)
    except (grpc.RpcError, RayError, RuntimeError, ValueError, OSError) as error:
        sys.stderr.write(f"no worker is started in advance: {error}\n")


def _agent_command(component: str, _session_directory: str, unbuffered: bool = True) -> list[str]:
    """The beginning of an agent's command line, in place of Ray's function of the same shape; Ray appends its script and arguments."""
    if component == "dashboard_agent":
        return [sys.executable, "-I", "-S", str(Path(__file__).with_name("ray_agent.py"))]
    return [sys.executable, "-u"] if unbuffered else [sys.executable]


def _watch(session: Path, gcs_pid: int, raylet_pid: int) -> int:
    """Wait until the launcher is gone (end of file) or one of the two has ended, then end all of the session."""
    alive = {gcs_pid, raylet_pid}
    asked = False
    while len(alive) == 2 and not asked:
        asked = bool(select.select([sys.stdin], [], [], _POLL_S)[0])
        _reap(alive)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for pid in (raylet_pid, gcs_pid):
        if pid in alive:
            os.kill(pid, signal.SIGTERM)
        while pid in alive and time.monotonic() < deadline:
            time.sleep(0.02)
            _reap(alive)
    _kill_session(os.getpid())
    shutil.rmtree(session, ignore_errors=True)
    return 0 if asked else 1


def _reap(alive: set[int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            alive.discard(pid)


def _kill_session(leader: int) -> None:
    """Kill everything in a session but this process, until nothing is left of it."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := _members(leader)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _members(leader: int) -> list[int]:
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == leader and pid != os.getpid() and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def _session_directory(home: Path) -> Path:
    """Make a private directory with a short path (a socket's path has 107 bytes at most) and point Ray's logs into the home."""
    session = Path(tempfile.mkdtemp(prefix="millrace-ray-", dir="/tmp"))
    (home / "run" / "ray.session").write_text(str(session))
    logs = home / "logs" / "ray"
    for old in sorted(logs.iterdir())[: -(KEPT_LOGS - 1)]:
        shutil.rmtree(old, ignore_errors=True)
    current = logs / time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    current.mkdir(exist_ok=True)
    (session / "session").mkdir()
    (session / "session" / "logs").symlink_to(current)
    return session


def _remove_stale(home: Path) -> None:
    """Remove what a head that has ended, however it ended, left: its address and its session directory."""
    address_path(home).unlink(missing_ok=True)
    marker = home / "run" / "ray.session"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(marker.read_text(), ignore_errors=True)
        marker.unlink()


def _write_token(path: Path) -> None:
    """Write a new token, readable by the owner only; every start of the head has another."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


if __name__ == "__main__":
    sys.exit(main())
