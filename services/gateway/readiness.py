"""Which endpoints answer now: asked of their runners, and written down for ``millrace up`` and ``millrace status``."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from libs import reports
from libs.errors import MillraceError, NotFoundError
from libs.inference.pool import RunnerPool
from libs.reports import EndpointReport
from schemas.registry import DeploymentSnapshot, DeploymentStatus, Replica
from services.gateway.catalog import Catalog

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often runners are asked while one that should answer does not."""

SETTLED_S = 5.0
"""How often they are asked while all of them do."""

_PING_S = 2.0
_SERVING = (DeploymentStatus.READY, DeploymentStatus.DEGRADED)


class Readiness:
    """Asks the runners of all endpoints whether they answer; a component.

    The log says which runners there were when serving last looked. After a restart those are gone, so each is asked.

    Parameters
    ----------
    path
        Where it is written down; replaced at each look.
    """

    def __init__(self, catalog: Catalog, pool: RunnerPool, path: Path) -> None:
        self._catalog = catalog
        self._pool = pool
        self._path = path
        self._is_told = True

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)

    async def run(self) -> None:
        while True:
            began = time.monotonic()
            found = await self.look()
            self._write(found)
            pause_s = LOOK_S if any(each.is_awaited for each in found) else SETTLED_S
            await self._catalog.changes.next(pause_s)
            await asyncio.sleep(max(0.0, LOOK_S - (time.monotonic() - began)))

    async def stop(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    async def look(self) -> list[EndpointReport]:
        """All endpoints as they are now, by name."""
        return list(await asyncio.gather(*(self._endpoint(name) for name in self._catalog.routing.endpoint_names())))

    async def _endpoint(self, name: str) -> EndpointReport:
        try:
            deployments = self._catalog.routing.deployments_of(name)
        except NotFoundError:
            return EndpointReport(name, is_ready=False, reason="it is being deleted")
        traffic = self._catalog.endpoints[name].traffic
        asked = [each for each in deployments if traffic.get(each.deployment_id, 0) > 0 or each.pending_traffic_percent]
        if not asked:
            return EndpointReport(name, is_ready=False, reason="nothing with traffic is deployed" if deployments else "nothing is deployed")
        serving = [each for each in asked if each.status in _SERVING and traffic.get(each.deployment_id, 0) > 0]
        with_replicas = [each for each in serving if each.replicas]
        if with_replicas:
            silent = [reason for reason in await asyncio.gather(*map(self._why_silent, with_replicas)) if reason]
            return EndpointReport(name, is_ready=not silent, is_awaited=bool(silent), reason="; ".join(silent))
        is_awaited = any(each.status is not DeploymentStatus.FAILED for each in asked)
        return EndpointReport(name, is_ready=False, is_awaited=is_awaited, reason="; ".join(map(_state, asked)))

    async def _why_silent(self, deployment: DeploymentSnapshot) -> str:
        """Empty when one of its runners answers."""
        reasons = await asyncio.gather(*(self._ping(replica) for replica in deployment.replicas))
        if "" in reasons:
            return ""
        return f"{_version(deployment)}: no runner answers ({reasons[0]})"

    async def _ping(self, replica: Replica) -> str:
        try:
            await self._pool.ping(replica, timeout_s=_PING_S)
        except (MillraceError, TimeoutError) as error:
            return str(error) or "no answer in time"
        return ""

    def _write(self, found: Sequence[EndpointReport]) -> None:
        try:
            reports.write(self._path, found)
            self._is_told = True
        except OSError as error:
            if self._is_told:
                log.warning("which endpoints answer cannot be written to %s: %s", self._path, error.strerror)
            self._is_told = False


def _version(deployment: DeploymentSnapshot) -> str:
    return f"{deployment.model_name}@{deployment.version}"


def _state(deployment: DeploymentSnapshot) -> str:
    if deployment.status in _SERVING:
        return f"{_version(deployment)}: no runner is up"
    return f"{_version(deployment)}: {deployment.status}{f' ({deployment.reason})' if deployment.reason else ''}"
