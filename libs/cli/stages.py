"""Watching a version become validated, or a deployment become ready, stage by stage."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Protocol

from libs.cli.client import Client, EventStream, Json
from libs.cli.errors import PlatformUnreachableError, RequestRefusedError, StageFailedError, WaitTimeoutError
from libs.errors import MillraceError
from schemas.environment import VersionBuildFailed, VersionBuilt
from schemas.registry import DeploymentRequested, DeploymentStatus, VersionRegistered, VersionStatus
from schemas.serving import DeploymentFailed, DeploymentReady
from schemas.validation import VersionInspected, VersionNeedsExample, VersionRejected, VersionValidated

Report = Callable[[str, float], None]
"""Told each stage as it is reached, with the seconds that passed since the one before."""

VERSION_TIMEOUT_S = 900.0
"""Longest wait for a version: the builder may have to download a few gigabytes of packages."""

DEPLOYMENT_TIMEOUT_S = 300.0
REFRESH_S = 2.0
"""How long the event stream may be silent before the state is asked for, in case an event was missed."""

PROGRESS_S = 10.0
"""How often it is said what goes on while no stage is reached."""

SETTLE_S = 0.05
"""The same, once the last event was seen and only the gateway's own view of it is outstanding."""

GATEWAY_PATIENCE_S = 60.0
"""How long a gateway may be gone while we wait: one that died is started again within seconds."""

GATEWAY_RETRY_S = 0.2
SUBSCRIBE_TIMEOUT_S = 5.0
END_TIMEOUT_S = 1.0

_VERSION_STAGES: Mapping[str, str] = {
    VersionRegistered.event_type: VersionStatus.REGISTERED,
    VersionInspected.event_type: VersionStatus.INSPECTED,
    VersionBuilt.event_type: VersionStatus.BUILT,
    VersionNeedsExample.event_type: VersionStatus.NEEDS_EXAMPLE,
    VersionValidated.event_type: VersionStatus.VALIDATED,
    VersionRejected.event_type: VersionStatus.REJECTED,
    VersionBuildFailed.event_type: VersionStatus.BUILD_FAILED,
}
_VERSION_ENDS = {
    VersionStatus.REJECTED: "was rejected",
    VersionStatus.BUILD_FAILED: "cannot be built",
    VersionStatus.ARCHIVED: "is archived",
}

_LAST_STAGES = {VersionStatus.VALIDATED, VersionStatus.NEEDS_EXAMPLE, *_VERSION_ENDS, DeploymentStatus.READY, DeploymentStatus.FAILED}

_DOING: Mapping[str, str] = {
    VersionStatus.REGISTERED: "still being inspected",
    VersionStatus.INSPECTED: "still installing packages",
    VersionStatus.BUILT: "still being tried",
    DeploymentStatus.PENDING: "replicas still starting",
}
"""What goes on after a stage; said when it takes long."""

DEPLOYED = "deployed"
_DEPLOYMENT_STAGES: Mapping[str, str] = {
    DeploymentRequested.event_type: DEPLOYED,
    DeploymentReady.event_type: DeploymentStatus.READY,
    DeploymentFailed.event_type: DeploymentStatus.FAILED,
}


class Story(Protocol):
    """Something whose stages are watched, through its events and through the gateway's view of it."""

    name: str

    def stage(self, event: Json) -> str | None:
        """The stage that an event says was reached; None when the event is about something else."""
        ...

    def reached(self, view: Json) -> dict[str, datetime]:
        """Every stage that a view says was reached, and when."""
        ...

    def view(self) -> Json:
        """The gateway's view now."""
        ...

    def ended(self, view: Json) -> bool:
        """Whether the good end is reached; raises ``StageFailedError`` when a bad one is."""
        ...


class VersionStory:
    """A version on its way from registered to validated."""

    def __init__(self, client: Client, model: str, version: int) -> None:
        self.name = f"{model}@{version}"
        self._client = client.unobserved()
        self._model = model
        self._version = version

    def stage(self, event: Json) -> str | None:
        data = event.get("data") or {}
        if (data.get("model_name"), data.get("version")) != (self._model, self._version):
            return None
        return _VERSION_STAGES.get(event["type"])

    def reached(self, view: Json) -> dict[str, datetime]:
        return _times(view, {stage: stage for stage in _VERSION_STAGES.values()})

    def view(self) -> Json:
        return self._client.version(self._model, self._version)

    def ended(self, view: Json) -> bool:
        status = view.get("status")
        if status in _VERSION_ENDS:
            raise StageFailedError(_sentence(f"{self.name} {_VERSION_ENDS[VersionStatus(status)]}", view.get("reason")), view)
        if status == VersionStatus.NEEDS_EXAMPLE and (view.get("spec") or {}).get("example") is None:
            remedy = f"give it one: millrace models example {self.name} FILE --wait"
            raise StageFailedError(f"{_sentence(f'{self.name} needs an example', view.get('reason'))}; {remedy}", view)
        return status == VersionStatus.VALIDATED


class DeploymentStory:
    """A deployment on its way to ready and to the traffic it was promised."""

    def __init__(self, client: Client, endpoint: str, deployment_id: str, generation: int) -> None:
        self.name = deployment_id
        self._client = client.unobserved()
        self._endpoint = endpoint
        self._generation = generation

    def stage(self, event: Json) -> str | None:
        data = event.get("data") or {}
        if data.get("deployment_id") != self.name or int(data.get("generation") or 0) < self._generation:
            return None
        return _DEPLOYMENT_STAGES.get(event["type"])

    def reached(self, view: Json) -> dict[str, datetime]:
        return _times(view, {"requested": DEPLOYED, DeploymentStatus.READY: "ready", DeploymentStatus.FAILED: "failed"})

    def view(self) -> Json:
        deployments = self._client.endpoint(self._endpoint)["deployments"]
        for deployment in deployments:
            if deployment["deployment_id"] == self.name:
                return dict(deployment)
        raise StageFailedError(f"deployment {self.name} was removed before it was ready")

    def ended(self, view: Json) -> bool:
        status = view.get("status")
        if status == DeploymentStatus.FAILED:
            raise StageFailedError(_sentence(f"deployment {self.name} failed", view.get("reason")))
        if status == DeploymentStatus.REMOVING:
            raise StageFailedError(f"deployment {self.name} was removed before it was ready")
        return status == DeploymentStatus.READY and view.get("pending_traffic_percent") is None


class EventFeed:
    """The gateway's events of one entity, read by a thread of its own; subscribed once the block begins.

    The stream is a convenience, the state is the truth: when the stream cannot be had or breaks, ``next`` stays silent and whoever
    waits asks for the state.
    """

    def __init__(self, client: Client, entity: str) -> None:
        self._client = client.unobserved()
        self._entity = entity
        self._events: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self._subscribed = threading.Event()
        self._stream: EventStream | None = None
        self._thread = threading.Thread(target=self._read, name="events", daemon=True)

    def __enter__(self) -> "EventFeed":
        self._thread.start()
        self._subscribed.wait(SUBSCRIBE_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.end()
        self._thread.join(END_TIMEOUT_S)

    def next(self, timeout_s: float) -> Json | None:
        """The next event, or None when there was none for ``timeout_s`` seconds."""
        try:
            return self._events.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            return None

    def _read(self) -> None:
        with suppress(MillraceError), self._client.follow_events(entity=self._entity) as stream:
            self._stream = stream
            self._subscribed.set()
            for event in stream:
                self._events.put(event)
        self._subscribed.set()


def follow(story: Story, feed: EventFeed, report: Report, first: Json, *, is_new: bool, since: datetime, timeout_s: float) -> Json:
    """Report each stage as its event arrives until the story has ended; the last view of it.

    Parameters
    ----------
    first
        The view to begin with: what the command was answered. If that is the end already, there is nothing to report.
    is_new
        The command made it; otherwise what it had reached before is not reported again.
    since
        When the command was given; the time of the first stage is counted from here.

    Raises
    ------
    StageFailedError
        When it came to a bad end.
    WaitTimeoutError
        When it took longer than ``timeout_s`` seconds.
    """
    if story.ended(first):
        return first
    deadline = time.monotonic() + timeout_s
    stages = _Stages(report, since, () if is_new else story.reached(first))
    view = first
    last_seen = False
    while True:
        for stage, moment in sorted(story.reached(view).items(), key=lambda item: item[1]):
            stages.reach(stage, moment)
        if story.ended(view):
            return view
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise WaitTimeoutError(f"{story.name} is still {view.get('status')} after {timeout_s:.0f} s; it goes on without us")
        event = feed.next(min(SETTLE_S if last_seen else REFRESH_S, left_s))
        told = story.stage(event) if event else None
        if event and told:
            stages.reach(told, _moment(event.get("time")))
            last_seen = told in _LAST_STAGES
        view = _patiently(story.view)
        stages.wait(_DOING.get(str(view.get("status"))))


def _patiently(look: Callable[[], Json]) -> Json:
    """Look, and go on looking for a while when the gateway does not answer: it may be starting again."""
    deadline = time.monotonic() + GATEWAY_PATIENCE_S
    while True:
        try:
            return look()
        except (PlatformUnreachableError, RequestRefusedError) as error:
            refused = isinstance(error, RequestRefusedError) and error.status != HTTPStatus.SERVICE_UNAVAILABLE
            if refused or time.monotonic() > deadline:
                raise
        time.sleep(GATEWAY_RETRY_S)


class _Stages:
    """Says each stage once, with the time since the one before, and between them what goes on."""

    def __init__(self, report: Report, since: datetime, known: Iterable[str]) -> None:
        self._report = report
        self._previous = since
        self._said = set(known)
        self._spoken_s = time.monotonic()

    def reach(self, stage: str, moment: datetime) -> None:
        if stage in self._said:
            return
        self._said.add(stage)
        self._report(stage, max((moment - self._previous).total_seconds(), 0.0))
        self._previous = max(moment, self._previous)
        self._spoken_s = time.monotonic()

    def wait(self, doing: str | None) -> None:
        if doing is None or time.monotonic() < self._spoken_s + PROGRESS_S:
            return
        self._report(doing, max((datetime.now(UTC) - self._previous).total_seconds(), 0.0))
        self._spoken_s = time.monotonic()


def _times(view: Json, names: Mapping[str, str]) -> dict[str, datetime]:
    times = view.get("stage_times") or {}
    return {names[status]: _moment(text) for status, text in times.items() if status in names}


def _moment(text: object) -> datetime:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return datetime.now(UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _sentence(beginning: str, reason: object) -> str:
    return f"{beginning}: {reason}" if reason else beginning
