"""The management API's operations: a request in, a command or a look at the state, a view out."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from libs.artifacts import ArtifactNotFoundError, ArtifactStore
from libs.errors import InvalidArgumentError, NotFoundError, PayloadTooLargeError
from libs.messaging.dead_letter import original
from schemas.base import Command, Payload
from schemas.predictions import PredictionLogSettings
from schemas.registry import (
    MAX_EXAMPLE_BYTES,
    ArchiveVersion,
    Artifact,
    CreateEndpoint,
    DeleteEndpoint,
    DeploymentRequested,
    DeploymentStatus,
    DeployVersion,
    Lineage,
    RegisterVersion,
    SetAlias,
    SetExample,
    SetPredictionLog,
    SetTraffic,
    UndeployVersion,
    VersionAlreadyRegistered,
    VersionRegistered,
    VersionSpec,
)
from services.gateway import bodies
from services.gateway.catalog import Catalog
from services.gateway.commands import Commander
from services.gateway.health import Health
from services.gateway.journal import EventFilter, Journal, Told
from services.gateway.validation import sentence
from services.gateway.views import View, dead_letter_view, deployment_view, endpoint_view, model_view, operation_view, version_view

HEARTBEAT_S = 10.0
"""A followed stream says something at least so often, so that a dead connection is noticed."""

_FILENAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")

C = TypeVar("C", bound=Command)


@dataclass(frozen=True)
class Answer:
    """A view with its HTTP status."""

    status: int
    view: View


class Management:
    """Everything the management API can do.

    Parameters
    ----------
    command_wait_s
        Time to wait for a command's answer when the caller does not say.
    artifact_max_bytes
        Largest artifact accepted.
    """

    def __init__(
        self,
        catalog: Catalog,
        journal: Journal,
        commander: Commander,
        store: ArtifactStore,
        health: Health,
        command_wait_s: float,
        artifact_max_bytes: int,
    ) -> None:
        self.catalog = catalog
        self.journal = journal
        self._commander = commander
        self._store = store
        self._health = health
        self._command_wait_s = command_wait_s
        self.artifact_max_bytes = artifact_max_bytes

    # Artifacts and versions

    async def upload(self, chunks: AsyncIterator[bytes], filename: str, sha256: str | None) -> Answer:
        """Store an artifact; nothing of it stays when the content is refused or the client goes away."""
        if not _FILENAME.fullmatch(filename):
            raise InvalidArgumentError("filename must have 1 to 255 characters, without slashes and control characters")
        stored = await self._store.put(_not_empty(chunks), expected_sha256=sha256, max_bytes=self.artifact_max_bytes)
        return Answer(201, {"sha256": stored.sha256, "size_bytes": stored.size_bytes, "filename": filename})

    async def register_version(self, model: str, body: bodies.NewVersion, wait_s: float | None) -> Answer:
        """Register an uploaded artifact as the next version of a model."""
        _check_size(body.example)
        artifact = await self._artifact(body.artifact)
        code = None if body.code is None else await self._artifact(body.code, "code")
        command = _checked(
            lambda: RegisterVersion(
                model_name=model,
                spec=VersionSpec(
                    artifact=artifact,
                    code=code,
                    format=body.format,
                    requirements=body.requirements,
                    example=body.example,
                    signature=body.signature,
                    forbid_batching=body.forbid_batching,
                    allow_code=body.allow_code,
                    description=body.description,
                    labels=body.labels,
                    lineage=Lineage(**dict(body.lineage)),
                ),
                aliases=body.aliases,
            )
        )

        def view(fact: Payload) -> Answer:
            number = fact.version if isinstance(fact, VersionRegistered | VersionAlreadyRegistered) else 0
            status = 200 if isinstance(fact, VersionAlreadyRegistered) else 201
            return Answer(status, version_view(self.catalog, self.catalog.version(model, str(number))))

        return await self._submit(command, wait_s, view)

    async def set_alias(self, model: str, alias: str, version: int | None, wait_s: float | None) -> Answer:
        """Point an alias at a version, or remove it."""
        if version is None and alias not in self.catalog.model(model).aliases:
            raise NotFoundError(f"model {model!r} has no alias {alias!r}")
        command = _checked(lambda: SetAlias(model_name=model, alias=alias, version=version))
        return await self._submit(command, wait_s, lambda _: Answer(200, model_view(self.catalog, self.catalog.model(model))))

    async def set_example(self, model: str, version: str, body: bodies.NewExample, wait_s: float | None) -> Answer:
        """Give an example to a version that needs one."""
        _check_size(body.example)
        number = self.catalog.version(model, version).version
        command = SetExample(model_name=model, version=number, example=body.example)
        return await self._submit(
            command, wait_s, lambda _: Answer(200, version_view(self.catalog, self.catalog.version(model, str(number))))
        )

    async def archive_version(self, model: str, version: str, wait_s: float | None) -> Answer:
        """Take a version out of use."""
        number = self.catalog.version(model, version).version
        command = ArchiveVersion(model_name=model, version=number)
        return await self._submit(
            command, wait_s, lambda _: Answer(200, version_view(self.catalog, self.catalog.version(model, str(number))))
        )

    # Endpoints

    async def create_endpoint(self, body: bodies.NewEndpoint, wait_s: float | None) -> Answer:
        """Create an endpoint."""
        command = CreateEndpoint(
            endpoint_name=body.name,
            labels=body.labels,
            description=body.description,
            prediction_log=None if body.prediction_log is None else _prediction_log(body.prediction_log),
        )
        return await self._submit(command, wait_s, lambda fact: Answer(201, self._endpoint(body.name, fact)))

    async def delete_endpoint(self, endpoint: str, force: bool, wait_s: float | None, keep_topics: bool = False) -> Answer:
        """Delete an endpoint with its deployments, and its inference topics unless they are kept."""
        command = DeleteEndpoint(endpoint_name=endpoint, force=force, keep_topics=keep_topics)
        return await self._submit(command, wait_s, lambda _: Answer(200, {"endpoint_name": endpoint}))

    async def deploy(self, endpoint: str, body: bodies.NewDeployment, wait_s: float | None) -> Answer:
        """Deploy a version to an endpoint."""
        command = _checked(
            lambda: DeployVersion(
                endpoint_name=endpoint,
                model_name=body.model,
                version=body.version,
                alias=body.alias,
                traffic_percent=body.traffic_percent,
                min_replicas=body.min_replicas,
                max_replicas=body.max_replicas if body.max_replicas is not None else body.min_replicas,
            )
        )

        def view(fact: Payload) -> Answer:
            deployment = self.catalog.deployments.get(fact.deployment_id) if isinstance(fact, DeploymentRequested) else None
            return Answer(201, deployment_view(self.catalog, deployment) if deployment else fact.model_dump(mode="json"))

        return await self._submit(command, wait_s, view)

    async def undeploy(self, endpoint: str, deployment_id: str, force: bool, wait_s: float | None) -> Answer:
        """Remove a deployment from an endpoint."""

        def view() -> View:
            deployment = self.catalog.deployments.get(deployment_id)
            return deployment_view(self.catalog, deployment) if deployment else {"deployment_id": deployment_id}

        deployment = self.catalog.deployments.get(deployment_id)
        if deployment is not None and deployment.endpoint_name == endpoint and deployment.status is DeploymentStatus.REMOVING:
            return Answer(200, view())
        command = UndeployVersion(endpoint_name=endpoint, deployment_id=deployment_id, force=force)
        return await self._submit(command, wait_s, lambda _: Answer(200, view()))

    async def set_traffic(self, endpoint: str, body: bodies.NewTraffic, wait_s: float | None) -> Answer:
        """Set an endpoint's whole traffic split."""
        traffic: dict[str, int] = {}
        for name, percent in body.traffic.items():
            deployment_id = self._deployment_id(endpoint, name)
            if deployment_id in traffic:
                raise InvalidArgumentError(f"the split names deployment {deployment_id!r} twice")
            traffic[deployment_id] = percent
        command = SetTraffic(endpoint_name=endpoint, traffic=traffic)
        return await self._submit(command, wait_s, lambda fact: Answer(200, self._endpoint(endpoint, fact)))

    async def set_prediction_log(self, endpoint: str, body: bodies.NewPredictionLog, wait_s: float | None) -> Answer:
        """Set how an endpoint's requests are logged."""
        command = SetPredictionLog(endpoint_name=endpoint, prediction_log=_prediction_log(body))
        return await self._submit(command, wait_s, lambda fact: Answer(200, self._endpoint(endpoint, fact)))

    # Operations, events, dead letters

    def operation(self, operation_id: str) -> View:
        """What became of a command."""
        return operation_view(self.journal.operation(operation_id))

    async def follow(self, wanted: EventFilter, last_event_id: str | None) -> AsyncIterator[bytes]:
        """Server-sent events: each matching event from now on, or from the one after ``last_event_id`` if it is still kept."""
        subscription = self.journal.subscribe(wanted)
        closing = asyncio.create_task(self._health.closing())
        getting = asyncio.create_task(subscription.queue.get())
        try:
            yield b": listening\n\n"
            if last_event_id is not None:
                for told in _after(self.journal.events(EventFilter()), last_event_id, wanted):
                    yield _server_sent(told)
            while not closing.done():
                await asyncio.wait({getting, closing}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    yield _server_sent(getting.result())
                    getting = asyncio.create_task(subscription.queue.get())
                elif subscription.overflowed:
                    yield b": too slow, events were left out; connect again with Last-Event-ID\n\n"
                    return
                else:
                    yield b": alive\n\n"
        finally:
            closing.cancel()
            getting.cancel()
            self.journal.unsubscribe(subscription)

    async def replay(self, letter_id: str) -> View:
        """Publish the original record of a dead letter again, where it came from."""
        event = self.journal.dead_letter(letter_id)
        record = original(event.data)
        await self._commander.send(record)
        return {**dead_letter_view(event), "replayed": True}

    # How it is done

    async def _submit(self, command: Command, wait_s: float | None, view: Callable[[Payload], Answer]) -> Answer:
        outcome = await self._commander.submit(command, self._command_wait_s if wait_s is None else wait_s)
        operation = {"operation_id": outcome.command_id, "operation_url": f"/api/v1/operations/{outcome.command_id}"}
        if outcome.fact is None:
            return Answer(202, operation)
        answer = view(outcome.fact)
        return Answer(answer.status, {**answer.view, "operation_id": outcome.command_id})

    def _endpoint(self, name: str, fact: Payload) -> View:
        """The endpoint as it is now; when it is gone again, what the fact says of it."""
        return endpoint_view(self.catalog, name) if name in self.catalog.endpoints else fact.model_dump(mode="json")

    async def _artifact(self, body: bodies.UploadedArtifact, field: str = "artifact") -> Artifact:
        try:
            stored = await self._store.stat(body.sha256)
        except ArtifactNotFoundError as error:
            raise NotFoundError(f"there is no artifact {body.sha256}; upload it first: POST /api/v1/artifacts") from error
        if body.size_bytes not in (None, stored.size_bytes):
            raise InvalidArgumentError(f"artifact {body.sha256} has {stored.size_bytes} bytes, not {body.size_bytes}")
        if not _FILENAME.fullmatch(body.filename):
            raise InvalidArgumentError(f"{field}.filename must have 1 to 255 characters, without slashes and control characters")
        return Artifact(sha256=stored.sha256, size_bytes=stored.size_bytes, filename=body.filename)

    def _deployment_id(self, endpoint: str, name: str) -> str:
        if not (name.isascii() and name.isdigit()):
            return name
        known = self.catalog.endpoint(endpoint).deployment_ids
        found = [deployment_id for deployment_id in known if deployment_id.rpartition(".")[2] == name.lstrip("0")]
        if not found:
            raise NotFoundError(f"version {name} is not deployed to endpoint {endpoint!r}; deployed: {', '.join(known) or 'nothing'}")
        if len(found) > 1:
            raise InvalidArgumentError(f"version {name} of several models is deployed to endpoint {endpoint!r}: {', '.join(found)}")
        return found[0]


def _check_size(example: dict[str, Any] | None) -> None:
    if example is not None and len(orjson.dumps(example)) > MAX_EXAMPLE_BYTES:
        raise PayloadTooLargeError(f"the example is larger than the {MAX_EXAMPLE_BYTES} bytes accepted; one or two rows are enough")


def _prediction_log(body: bodies.NewPredictionLog) -> PredictionLogSettings:
    return PredictionLogSettings(mode=body.mode, sample_percent=body.sample_percent, max_rows_per_s=body.max_rows_per_s)


def _checked(make: Callable[[], C]) -> C:
    try:
        return make()
    except ValidationError as error:
        raise InvalidArgumentError(sentence(error.errors())) from error


async def _not_empty(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    empty = True
    async for chunk in chunks:
        empty = empty and not chunk
        yield chunk
    if empty:
        raise InvalidArgumentError("the artifact is empty")


def _after(events: list[Told], last_event_id: str, wanted: EventFilter) -> list[Told]:
    places = [place for place, told in enumerate(events) if told.envelope.id == last_event_id]
    start = places[-1] + 1 if places else 0
    return [told for told in events[start:] if wanted.matches(told)]


def _server_sent(told: Told) -> bytes:
    return b"id: " + told.envelope.id.replace("\n", " ").encode() + b"\ndata: " + orjson.dumps(told.cloudevent()) + b"\n\n"
