"""What the builder does with events."""

import time
from collections.abc import Callable, Mapping, Sequence

from libs import telemetry
from libs.environments import ImpossibleEnvironmentError, this_platform, this_python
from libs.errors import DeadlineExceededError
from libs.messaging.cloudevents import Event
from libs.messaging.processing import Handler
from libs.requirements import InvalidRequirementsError
from schemas.base import Payload
from schemas.environment import VersionBuildFailed, VersionBuilt
from schemas.validation import VersionInspected
from services.builder.adapters import Environments, Resolver
from services.builder.environment import environment_request


class Handlers:
    """Answers every inspected version with the fact that its environment exists, or why it cannot.

    Repeating is harmless: resolutions and environments that are known are found again, and the fact's id is derived from its cause.

    Parameters
    ----------
    timer
        Seconds from any start, for how long things took.
    """

    def __init__(self, resolver: Resolver, environments: Environments, timer: Callable[[], float] = time.monotonic) -> None:
        self._resolver = resolver
        self._environments = environments
        self._timer = timer

    def table(self) -> Mapping[type[Payload], Handler]:
        """Handler by event."""
        return {VersionInspected: self.inspected}

    async def inspected(self, event: Event[VersionInspected]) -> Sequence[Payload]:
        """Build the environment of a version. A transient error goes up, so that the event is tried again."""
        version = event.data
        try:
            return [await self._built(version)]
        except ImpossibleEnvironmentError as error:
            return [_failed(version, error.message, error.evidence)]
        except (InvalidRequirementsError, DeadlineExceededError) as error:
            return [_failed(version, error.message)]

    async def _built(self, version: VersionInspected) -> VersionBuilt:
        started = self._timer()
        with telemetry.tracer().start_as_current_span("resolve requirements"):
            request = environment_request(version.requirements, python=this_python(), platform=this_platform())
            lock = await self._resolver.resolve(request)
        resolved = self._timer()
        is_known = self._environments.holds(lock)
        attributes: dict[str, str | bool] = {"millrace.environment.id": lock.environment_id, "millrace.environment.reused": is_known}
        with telemetry.tracer().start_as_current_span("install environment", attributes=attributes):
            await self._environments.ensure(lock)
        return VersionBuilt(
            model_name=version.model_name,
            version=version.version,
            environment=lock,
            reused=is_known,
            resolve_s=resolved - started,
            install_s=self._timer() - resolved,
        )


def _failed(version: VersionInspected, reason: str, evidence: str = "") -> VersionBuildFailed:
    return VersionBuildFailed(model_name=version.model_name, version=version.version, reason=reason, evidence=evidence)
