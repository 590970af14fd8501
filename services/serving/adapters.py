"""Everything that touches Ray: the client of Ray Serve, and what a replica needs of the machine it is on.

**Where runners listen.** A replica writes its runner's address into Ray's own key-value table (in the GCS, namespace ``millrace``), and
the client joins that with Serve's list of living replicas. Compared with the alternatives in Ray 2.60: Serve's ``record_replica_metadata``
is read once, when a replica becomes ready, and reaches routers only; a handle cannot ask *every* replica and brings a router with it; a
directory would need a shared file system. The table costs one call to write and one to read, works across machines, and ends with the
cluster, as the replicas do. An entry of a replica that Serve does not list is ignored and removed.

**Who owns what.** Applications and Serve's controller are detached: they outlive the process that asked for them. What an application
was last asked to be (generation, digest, replicas) is in the same table, so a restarted service finds it and restarts nothing.

Environment variables that Ray needs (``RAY_AUTH_MODE`` …) must be set before this module is imported.
"""

import asyncio
import contextlib
import contextvars
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import grpc
import ray
import ray.exceptions
from pydantic import Field
from ray import serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
from ray.experimental import internal_kv
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from schemas.base import Contract
from schemas.registry import Replica
from services.serving.errors import ClusterUnavailableError
from services.serving.keeper import Announcement
from services.serving.reconcile import ActualDeployment, AppStatus, Damage
from services.serving.spec import ReplicaSpec

NAMESPACE = "millrace"
DEPLOYMENT = "replica"
"""Every application has one Serve deployment, of this name."""

LOOPBACK = "127.0.0.1"
HEALTH_CHECK_PERIOD_S = 3.0
"""A dead worker process is found within this time; a dead runner at once, by its replica."""

WARM_WORKER_S = 30
"""How long a worker that was started in advance is kept by force; after that Ray keeps one idle worker per free logical CPU."""

_CALL_TIMEOUT_S = 30.0
_LOOK_S = 1.0
"""How long a call may take before it is looked whether the cluster is still there, and how long that may take."""

_WARM_DELAY_S = 5.0
_STOP_S = 5.0
_MAX_MESSAGE_CHARS = 500
_STATUSES = {
    "NOT_STARTED": AppStatus.STARTING,
    "DEPLOYING": AppStatus.STARTING,
    "RUNNING": AppStatus.RUNNING,
    "UNHEALTHY": AppStatus.DEGRADED,
    "DEPLOY_FAILED": AppStatus.FAILED,
    "DELETING": AppStatus.DELETING,
}
_UNBROKEN = ("NOT_STARTED", "DEPLOYING", "RUNNING", "UNHEALTHY")
P = ParamSpec("P")
T = TypeVar("T")
_RAY_ERRORS = (ray.exceptions.RayError, RayServeException, grpc.RpcError, ConnectionError, RuntimeError, TimeoutError)


class _Application(Contract):
    """What an application was last asked to be."""

    generation: int = 0
    digest: str = ""
    replicas: int = Field(default=0, ge=0)


class RayServe:
    """Client of one Ray cluster's Serve. Every method is idempotent, none blocks the event loop.

    Parameters
    ----------
    address
        ``host:port`` of the cluster.
    address_file
        File that names it instead once the cluster is up, as JSON (``{"address": …}``).
    replica
        Class of the replicas; its constructor takes a ``ReplicaSpec`` as JSON.
    keeps_warm
        Keep a worker process with Serve imported in advance, so that a replica starts in 0.4 s instead of 2.3 s (90 MB).
        Only for a cluster of one machine.
    replica_cpus
        Logical CPUs that Ray reserves for a replica.
    """

    def __init__(
        self, address: str, replica: type, *, address_file: Path | None = None, keeps_warm: bool = False, replica_cpus: float = 0.0
    ) -> None:
        self._address = address
        self._address_file = address_file
        self._replica = replica
        self._keeps_warm = keeps_warm
        self._replica_cpus = replica_cpus
        self._warming: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect, and start Serve without any ingress if it does not run yet.

        Raises
        ------
        ClusterUnavailableError
            The cluster cannot be reached, or refuses our token.
        """
        if self._address_file is not None:
            self._address = _address_in(self._address_file)
        if not await self._is_reachable():  # Ray would try for a minute
            raise self._nothing_listens()
        await self._call(self._connect)
        if self._address_file is None:  # the head that writes it has started workers
            self._warm()

    async def stop(self) -> None:
        """Disconnect; what runs goes on running."""
        for task in self._warming:
            task.cancel()
        if await self._is_reachable():
            await asyncio.wait({_begun(ray.shutdown)}, timeout=_STOP_S)

    async def apply(self, spec: ReplicaSpec, generation: int, replicas: int) -> None:
        """Run so many replicas of ``spec``; returns when Serve knows, long before they answer.

        Applying what runs already restarts nothing, unless it failed before.
        """
        await self._call(self._deploy, spec, generation, replicas)
        self._warm()

    async def scale(self, deployment_id: str, generation: int, replicas: int) -> None:
        """Run another number of the same replicas; those that stay are not touched."""
        await self._call(self._scale, deployment_id, generation, replicas)

    async def delete(self, deployment_id: str) -> None:
        """Stop an application; returns when Serve knows. One that does not exist is no error."""
        await self._call(_delete, deployment_id)

    async def status(self) -> dict[str, ActualDeployment]:
        """Every application in Serve, with the replicas whose runner answers."""
        return await self._call(_status)

    def _connect(self) -> None:
        ray.init(address=self._address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
        serve.start(proxy_location="Disabled")

    def _deploy(self, spec: ReplicaSpec, generation: int, replicas: int) -> None:
        running = _controller_details().get(spec.deployment_id, {}).get("status")
        if running in _UNBROKEN and _application(spec.deployment_id).digest == spec.digest:
            return self._scale(spec.deployment_id, generation, replicas)
        application = _Application(generation=generation, digest=spec.digest, replicas=replicas)
        internal_kv._internal_kv_del(f"failure:{spec.deployment_id}", namespace=NAMESPACE)
        _remember(spec.deployment_id, application)
        deployment = serve.deployment(
            self._replica,
            name=DEPLOYMENT,
            num_replicas=replicas,
            ray_actor_options={"num_cpus": self._replica_cpus},
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
            health_check_timeout_s=15,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=10,
            max_constructor_retry_count=2,
            logging_config={"enable_access_log": False},
        )
        target = serve.RunTarget(
            target=deployment.bind(spec.model_dump_json()), name=spec.deployment_id, route_prefix=None, external_scaler_enabled=True
        )
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        return None

    def _scale(self, deployment_id: str, generation: int, replicas: int) -> None:
        known = _application(deployment_id)
        _remember(deployment_id, known.model_copy(update={"generation": generation, "replicas": replicas}))
        if known.replicas != replicas:
            ray.get(_controller().update_deployment_replicas.remote(DeploymentID(DEPLOYMENT, deployment_id), replicas))

    def _warm(self) -> None:
        """Have Ray start a worker in advance, some time from now: the replica that is starting needs the CPU first."""
        if self._keeps_warm:
            task = asyncio.create_task(self._warm_soon())
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)

    async def _warm_soon(self) -> None:
        await asyncio.sleep(_WARM_DELAY_S)
        with contextlib.suppress(ClusterUnavailableError):
            await self._call(_start_worker)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call of Ray in a thread, and translate what it raises.

        Ray's client tries for a minute to reach a cluster that is gone; here the call is given up as soon as nothing listens there.
        """
        calling = _begun(function, *args, **kwargs)
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                while not calling.done():
                    await asyncio.wait({calling}, timeout=_LOOK_S)
                    if not calling.done() and not await self._is_reachable():
                        raise self._nothing_listens()
                return calling.result()
        except _RAY_ERRORS as error:
            text = str(error).strip().splitlines()
            raise ClusterUnavailableError(f"Ray does not answer: {text[-1] if text else type(error).__name__}") from error

    async def _is_reachable(self) -> bool:
        """Whether somebody listens at the cluster's address; one that only is slow does."""
        host, _, port = self._address.rpartition(":")
        try:
            async with asyncio.timeout(_LOOK_S):
                _, writer = await asyncio.open_connection(host, int(port))
        except TimeoutError:
            return True
        except OSError:
            return False
        writer.close()
        return True

    def _nothing_listens(self) -> ClusterUnavailableError:
        return ClusterUnavailableError(f"Ray is away: nothing listens on {self._address}")


def _address_in(file: Path) -> str:
    try:
        address: str = json.loads(file.read_text())["address"]
    except (OSError, ValueError, KeyError) as error:
        raise ClusterUnavailableError("Ray is away: it has not come up yet") from error
    return address


def own_replica_id() -> str:
    """Id of the replica this is called in."""
    replica_id: str = serve.get_replica_context().replica_tag
    return replica_id


def replica_directory(replica_id: str) -> Path:
    """A replica's own directory, made with mode 0700 below Ray's session directory: short enough for a socket, gone with the cluster."""
    directory = _session_directory() / "replicas" / replica_id
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def remove_directory(directory: Path) -> None:
    """Remove a replica's directory."""
    shutil.rmtree(directory, ignore_errors=True)


def runner_log(deployment_id: str, replica_id: str) -> Path:
    """File for what a model prints, among Ray's logs."""
    logs = _session_directory() / "logs" / "runners"
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"{deployment_id}.{replica_id}.log"


def listen_address(kind: Literal["unix", "tcp"], directory: Path) -> str:
    """Where a runner shall listen: a socket in ``directory``, or any free port of this machine's address in the cluster."""
    return f"unix:{directory / 'runner'}" if kind == "unix" else f"tcp:{ray.util.get_node_ip_address()}:0"


def announce(deployment_id: str, replica_id: str, announcement: Announcement, damaged: Mapping[str, int]) -> None:
    """Write where a replica's runner listens, or why it does not, and how many copies it has found damaged, by kind."""
    value = json.dumps({"address": announcement.address, "reason": announcement.reason, "damaged": dict(damaged)})
    internal_kv._internal_kv_put(f"replica:{deployment_id}:{replica_id}", value, namespace=NAMESPACE)


def announce_failure(deployment_id: str, reason: str) -> None:
    """Write why a replica could not begin; it stays until the deployment is applied again."""
    internal_kv._internal_kv_put(f"failure:{deployment_id}", reason[:_MAX_MESSAGE_CHARS], namespace=NAMESPACE)


def keep_on_loopback() -> None:
    """On a cluster that lives on loopback, make Serve's replica do so too.

    Serve 2.60 opens a gRPC port for calls between deployments in every replica, on all interfaces (``[::]:0`` in
    ``_private/replica.py``, ``_on_initialized``), and has no setting for it. We never call it. It asks for the token, like all others.
    """
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() == LOOPBACK:
        replica.add_port_to_grpc_server = _add_loopback_port


def _add_loopback_port(server: Any, _address: str) -> Any:
    return add_port_to_grpc_server(server, f"{LOOPBACK}:0")


def _begun(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[T]":
    """A call in a thread of its own, for which the end of the process does not wait, as it would for one of the event loop's."""
    calling: Future[T] = Future()
    calling.set_running_or_notify_cancel()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            calling.set_result(context.run(function, *args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - it is raised where the call is waited for
            calling.set_exception(error)

    threading.Thread(target=work, name=f"ray {function.__name__}", daemon=True).start()
    called = asyncio.wrap_future(calling)
    called.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting any more
    return called


def _delete(deployment_id: str) -> None:
    if deployment_id in _controller_details():
        serve.delete(deployment_id, _blocking=False)
    for key in [*_keys(f"replica:{deployment_id}:"), f"failure:{deployment_id}", f"app:{deployment_id}"]:
        internal_kv._internal_kv_del(key, namespace=NAMESPACE)


def _status() -> dict[str, ActualDeployment]:
    # The table first: a replica that announces itself in between is listed without an address until the next look, and not forgotten.
    table = _table()
    applications = _controller_details()
    _forget_dead(applications, table)
    return {deployment_id: _actual(deployment_id, details, table) for deployment_id, details in applications.items()}


def _actual(deployment_id: str, details: dict[str, Any], table: dict[str, str]) -> ActualDeployment:
    deployment = details["deployments"].get(DEPLOYMENT, {})
    application = _Application.model_validate_json(table.get(f"app:{deployment_id}", "{}"))
    running = [replica["replica_id"] for replica in deployment.get("replicas", []) if replica["state"] == "RUNNING"]
    announced = {replica_id: json.loads(table.get(f"replica:{deployment_id}:{replica_id}", "{}")) for replica_id in sorted(running)}
    reasons = [entry["reason"] for entry in announced.values() if not entry.get("address") and entry.get("reason")]
    status = _STATUSES[details["status"]]
    failure = table.get(f"failure:{deployment_id}", "") if status in (AppStatus.FAILED, AppStatus.DEGRADED) else ""
    return ActualDeployment(
        generation=application.generation,
        digest=application.digest,
        target_replicas=deployment.get("target_num_replicas", application.replicas),
        status=status,
        message=(failure or "; ".join(reasons) or _last_line(details["message"]))[:_MAX_MESSAGE_CHARS],
        replicas=tuple(
            Replica(replica_id=replica_id, address=entry["address"]) for replica_id, entry in announced.items() if entry.get("address")
        ),
        damage=tuple(
            Damage(replica_id, found.get("artifact", 0), found.get("environment", 0))
            for replica_id, entry in announced.items()
            if any((found := entry.get("damaged", {})).values())
        ),
    )


def _forget_dead(applications: dict[str, Any], table: dict[str, str]) -> None:
    """Remove the entries of replicas that Serve does not list any more."""
    alive = {
        f"replica:{deployment_id}:{replica['replica_id']}"
        for deployment_id, details in applications.items()
        for deployment in details["deployments"].values()
        for replica in deployment["replicas"]
    }
    for key in [key for key in table if key.startswith("replica:") and key not in alive]:
        internal_kv._internal_kv_del(key, namespace=NAMESPACE)


def _table() -> dict[str, str]:
    keys = [key.encode() for key in _keys("")]
    if not keys:
        return {}
    values = internal_kv.internal_kv_get_gcs_client().internal_kv_multi_get(keys, NAMESPACE.encode())
    return {key.decode(): value.decode() for key, value in values.items()}


def _keys(prefix: str) -> list[str]:
    return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)]


def _application(deployment_id: str) -> _Application:
    value = internal_kv._internal_kv_get(f"app:{deployment_id}", namespace=NAMESPACE)
    return _Application.model_validate_json(value or b"{}")


def _remember(deployment_id: str, application: _Application) -> None:
    internal_kv._internal_kv_put(f"app:{deployment_id}", application.model_dump_json(), namespace=NAMESPACE)


def _controller() -> Any:
    return _get_global_client()._controller


def _controller_details() -> dict[str, Any]:
    details: dict[str, Any] = ray.get(_controller().get_serve_instance_details.remote(), timeout=_CALL_TIMEOUT_S)
    applications: dict[str, Any] = details["applications"]
    return applications


def _start_worker() -> None:
    """Ask the raylet for one more worker; for no job in particular, because Serve's actors belong to a job that may have ended."""
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        job_id=ray.JobID.nil().binary(),
        keep_alive_duration_secs=WARM_WORKER_S,
        num_workers=1,
    )
    for node in ray.nodes():
        if node["Alive"]:
            with contextlib.closing(init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")) as channel:
                node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_CALL_TIMEOUT_S)


def _session_directory() -> Path:
    return Path(ray._private.worker.global_worker.node.get_session_dir_path())


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
