"""The main function of every service: settings, telemetry, build, run."""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from pydantic import ValidationError

from libs import lifecycle, telemetry
from libs.errors import ConfigurationError, MillraceError
from libs.lifecycle import Component
from libs.metrics import PROCESS
from libs.metrics.exposition import of
from libs.metrics.server import MetricsServer
from libs.settings import ProcessSettings, TelemetrySettings


class ServiceSettings(Protocol):
    """What the settings of every service have."""

    @property
    def process(self) -> ProcessSettings: ...

    @property
    def telemetry(self) -> TelemetrySettings: ...


@runtime_checkable
class MeasuredSettings(Protocol):
    """What the settings of a service have that shows ``/metrics`` on a port of its own."""

    @property
    def metrics_port(self) -> int: ...


@runtime_checkable
class Judged(Protocol):
    """A component that can tell whether it does its work; ``/readyz`` asks all of them."""

    def is_ready(self) -> bool: ...


S = TypeVar("S", bound=ServiceSettings)
T = TypeVar("T")


def read_settings(settings_type: Callable[[], T]) -> T:
    """Settings from the environment.

    Raises
    ------
    ConfigurationError
        When a value makes no sense; the message names each.
    """
    try:
        return settings_type()
    except ValidationError as error:
        problems = "; ".join(f"{'_'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise ConfigurationError(f"the settings in the environment are not valid: {problems}") from error


def run_service(
    name: str,
    settings_type: Callable[[], S],
    build: Callable[[S], Sequence[Component]],
    loop: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> None:
    """Run a service until it is told to stop.

    A service that cannot start or go on for a reason we know says so in one sentence and exits with 1; a bug leaves its traceback.

    Parameters
    ----------
    loop
        Runs the event loop; ``uvloop.run`` where speed counts.
    """
    try:
        settings = read_settings(settings_type)
    except ConfigurationError as error:
        sys.exit(f"{name}: {error}")

    async def run() -> None:
        # Built inside the loop: some clients bind to it when they are made.
        components = build(settings)
        await lifecycle.run([*_metrics_server(settings, components), *components], settings.process.ready_file)

    provider = telemetry.configure(name, settings.telemetry)
    try:
        loop(run())
    except MillraceError as error:
        sys.exit(f"{name}: {error}")
    finally:
        provider.shutdown()


def _metrics_server(settings: ServiceSettings, components: Sequence[Component] = ()) -> list[Component]:
    if not isinstance(settings, MeasuredSettings):
        return []
    judged = [component for component in components if isinstance(component, Judged)]
    is_ready = (lambda: all(component.is_ready() for component in judged)) if judged else None
    return [MetricsServer(of(PROCESS), settings.process.metrics_host, settings.metrics_port, is_ready)]
