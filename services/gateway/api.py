"""The management API in FastAPI: routes that only translate."""

import json
import re
from functools import cache
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from libs.errors import InvalidArgumentError, MillraceError, PayloadTooLargeError
from services.gateway import bodies, openapi
from services.gateway.error_bodies import error_answer
from services.gateway.errors import InternalError
from services.gateway.exchange import TOLD
from services.gateway.handlers import Answer, Management
from services.gateway.journal import EventFilter
from services.gateway.validation import sentence
from services.gateway.views import View, dead_letter_view, endpoint_view, model_view, version_view

MAX_WAIT_S = 60.0

_WAIT = re.compile(r"wait=(\d{1,9})")

Prefer = Annotated[str | None, Header(description="`wait=S`: seconds to wait for the answer; `respond-async`: do not wait (RFC 7240).")]
Force = Annotated[bool, Query(description="Also when it takes traffic.")]
KeepTopics = Annotated[bool, Query(description="Its inference topics stay; else they go a little later.")]


def create_api(management: Management) -> FastAPI:
    """The application; every error it answers is ``{"error": sentence}``."""
    api = FastAPIOffline(
        title="Millrace",
        version="1",
        description='Management API of the gateway. Every error is `{"error": "one sentence"}`.',
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False},  # the front has the server span
    )
    _translate_errors(api)
    _add_models(api, management)
    _add_endpoints(api, management)
    _add_log(api, management)
    declared = api.openapi
    api.openapi = cache(lambda: openapi.document(declared()))  # type: ignore[method-assign]
    return api


def _add_models(api: FastAPI, management: Management) -> None:
    catalog = management.catalog

    file = {"schema": {"type": "string", "format": "binary"}}

    @api.post(
        "/api/v1/artifacts",
        status_code=201,
        tags=["models"],
        openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": file}}},
    )
    async def upload_artifact(
        request: Request,
        filename: Annotated[str, Query(description="Name of the file; kept as a label, never used as a path.")] = "artifact",
        x_millrace_sha256: Annotated[str | None, Header(description="What the content's SHA-256 must be.")] = None,
    ) -> Response:
        """Store an artifact; the body is a model's file, an archive (tar, tar.gz, zip) of several, or code that comes with a model."""
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > management.artifact_max_bytes:
            raise PayloadTooLargeError(f"the artifact is larger than the {management.artifact_max_bytes} bytes accepted")
        return _response(await management.upload(request.stream(), filename, x_millrace_sha256))

    @api.get("/api/v1/models", tags=["models"])
    async def list_models() -> Response:
        """All models."""
        return _json({"models": [model_view(catalog, catalog.models[name]) for name in sorted(catalog.models)]})

    @api.get("/api/v1/models/{model}", tags=["models"])
    async def show_model(model: str) -> Response:
        """One model."""
        return _json(model_view(catalog, catalog.model(model)))

    @api.get("/api/v1/models/{model}/versions", tags=["models"])
    async def list_versions(model: str) -> Response:
        """All versions of a model, oldest first."""
        return _json({"versions": [version_view(catalog, version) for version in catalog.versions_of(model)]})

    @api.post("/api/v1/models/{model}/versions", status_code=201, tags=["models"])
    async def register_version(model: str, body: bodies.NewVersion, prefer: Prefer = None) -> Response:
        """Register an uploaded artifact as the next version; 200 when the same content is a version already."""
        return _response(await management.register_version(model, body, wait_s(prefer)))

    @api.post("/api/v1/models/{model}/versions/{version}:archive", tags=["models"])
    async def archive_version(model: str, version: str, prefer: Prefer = None) -> Response:
        """Take a version out of use."""
        return _response(await management.archive_version(model, version, wait_s(prefer)))

    @api.post("/api/v1/models/{model}/versions/{version}:example", tags=["models"])
    async def set_example(model: str, version: str, body: bodies.NewExample, prefer: Prefer = None) -> Response:
        """Give an example to a version that needs one; it is tried again with it."""
        return _response(await management.set_example(model, version, body, wait_s(prefer)))

    @api.get("/api/v1/models/{model}/versions/{version}", tags=["models"])
    async def show_version(model: str, version: str, view: Annotated[str, Query(pattern="^(basic|full)$")] = "basic") -> Response:
        """One version, by number or alias; `view=full` adds the text of its environment's lock."""
        return _json(version_view(catalog, catalog.version(model, version), full=view == "full"))

    @api.put("/api/v1/models/{model}/aliases/{alias}", tags=["models"])
    async def set_alias(model: str, alias: str, body: bodies.AliasTarget, prefer: Prefer = None) -> Response:
        """Point an alias at a version."""
        return _response(await management.set_alias(model, alias, body.version, wait_s(prefer)))

    @api.delete("/api/v1/models/{model}/aliases/{alias}", tags=["models"])
    async def remove_alias(model: str, alias: str, prefer: Prefer = None) -> Response:
        """Remove an alias."""
        return _response(await management.set_alias(model, alias, None, wait_s(prefer)))


def _add_endpoints(api: FastAPI, management: Management) -> None:
    catalog = management.catalog

    @api.post("/api/v1/endpoints", status_code=201, tags=["endpoints"])
    async def create_endpoint(body: bodies.NewEndpoint, prefer: Prefer = None) -> Response:
        """Create an endpoint."""
        return _response(await management.create_endpoint(body, wait_s(prefer)))

    @api.get("/api/v1/endpoints", tags=["endpoints"])
    async def list_endpoints() -> Response:
        """All endpoints with their deployments."""
        return _json({"endpoints": [endpoint_view(catalog, name) for name in sorted(catalog.endpoints)]})

    @api.get("/api/v1/endpoints/{endpoint}", tags=["endpoints"])
    async def show_endpoint(endpoint: str) -> Response:
        """One endpoint with its deployments."""
        return _json(endpoint_view(catalog, endpoint))

    @api.delete("/api/v1/endpoints/{endpoint}", tags=["endpoints"])
    async def delete_endpoint(endpoint: str, force: Force = False, keep_topics: KeepTopics = False, prefer: Prefer = None) -> Response:
        """Delete an endpoint; refused while it takes traffic, unless forced."""
        return _response(await management.delete_endpoint(endpoint, force, wait_s(prefer), keep_topics))

    @api.post("/api/v1/endpoints/{endpoint}/deployments", status_code=201, tags=["endpoints"])
    async def deploy(endpoint: str, body: bodies.NewDeployment, prefer: Prefer = None) -> Response:
        """Deploy a version; its traffic moves when it is ready."""
        return _response(await management.deploy(endpoint, body, wait_s(prefer)))

    @api.delete("/api/v1/endpoints/{endpoint}/deployments/{deployment_id}", tags=["endpoints"])
    async def undeploy(endpoint: str, deployment_id: str, force: Force = False, prefer: Prefer = None) -> Response:
        """Remove a deployment; refused while it takes traffic, unless forced."""
        return _response(await management.undeploy(endpoint, deployment_id, force, wait_s(prefer)))

    @api.put("/api/v1/endpoints/{endpoint}/traffic", tags=["endpoints"])
    async def set_traffic(endpoint: str, body: bodies.NewTraffic, prefer: Prefer = None) -> Response:
        """Set the whole traffic split."""
        return _response(await management.set_traffic(endpoint, body, wait_s(prefer)))

    @api.put("/api/v1/endpoints/{endpoint}/prediction-log", tags=["endpoints"])
    async def set_prediction_log(endpoint: str, body: bodies.NewPredictionLog, prefer: Prefer = None) -> Response:
        """Set how an endpoint's requests are logged."""
        return _response(await management.set_prediction_log(endpoint, body, wait_s(prefer)))


def _add_log(api: FastAPI, management: Management) -> None:
    journal = management.journal

    @api.get("/api/v1/operations/{operation_id}", tags=["log"])
    async def show_operation(operation_id: str) -> Response:
        """What became of a command."""
        return _json(management.operation(operation_id))

    @api.get("/api/v1/events", tags=["log"], responses={200: {"content": {"text/event-stream": {}}}})
    async def events(
        type: Annotated[str | None, Query(max_length=256, description="Event type; `*` stands for anything.")] = None,  # noqa: A002
        entity: Annotated[str | None, Query(max_length=256, description="Model, endpoint, `model@version` or deployment id.")] = None,
        correlation_id: Annotated[str | None, Query(max_length=256, description="Id of the event that began the story.")] = None,
        follow: Annotated[bool, Query(description="Stream events as they come (server-sent events).")] = False,
        last_event_id: Annotated[str | None, Header(description="Go on after this event.")] = None,
    ) -> Response:
        """The last 10 000 events, oldest first, or a stream of those to come; each is a structured CloudEvent."""
        wanted = EventFilter(type, entity, correlation_id)
        if not follow:
            return _json({"events": [told.cloudevent() for told in journal.events(wanted)]})
        stream = management.follow(wanted, last_event_id)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})

    @api.get("/api/v1/dead-letters", tags=["log"])
    async def list_dead_letters() -> Response:
        """What could not be handled, newest first."""
        return _json({"dead_letters": [dead_letter_view(event) for event in journal.dead_letters()]})

    @api.get("/api/v1/dead-letters/{letter_id}", tags=["log"])
    async def show_dead_letter(letter_id: str) -> Response:
        """One dead letter with the record itself, by its id or that of the event."""
        return _json(dead_letter_view(journal.dead_letter(letter_id), full=True))

    @api.post("/api/v1/dead-letters/{letter_id}:replay", tags=["log"])
    async def replay_dead_letter(letter_id: str) -> Response:
        """Publish the original record again, where it came from."""
        return _json(await management.replay(letter_id))


def wait_s(prefer: str | None) -> float | None:
    """How long a caller will wait (RFC 7240), in seconds; None: it does not say.

    >>> wait_s("wait=3"), wait_s("respond-async"), wait_s("wait=1000"), wait_s("handling=strict"), wait_s(None)
    (3.0, 0.0, 60.0, None, None)
    """
    if prefer is None:
        return None
    match = _WAIT.search(prefer)
    if match is not None:
        return min(float(match[1]), MAX_WAIT_S)
    return 0.0 if "respond-async" in prefer else None


def _translate_errors(api: FastAPI) -> None:
    @api.exception_handler(MillraceError)
    async def millrace_error(request: Request, error: MillraceError) -> Response:
        return _error(request, error)

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return _error(request, InvalidArgumentError(_request_problem(error)))

    @api.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> Response:
        return _json({"error": str(error.detail)}, error.status_code)

    @api.exception_handler(ClientDisconnect)
    async def client_gone(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    @api.exception_handler(Exception)
    async def bug(_request: Request, _error: Exception) -> Response:
        return _error_response(InternalError("something went wrong in the gateway; its log tells more under this request's x-request-id"))


def _request_problem(error: RequestValidationError) -> str:
    problems = error.errors()
    if problems and problems[0]["type"] == "json_invalid":
        return f"the request body is not valid JSON: {problems[0].get('ctx', {}).get('error', 'it cannot be read')}"
    return sentence(problems)


def _error(request: Request, error: MillraceError) -> Response:
    request.scope[TOLD] = error
    return _error_response(error)


def _error_response(error: MillraceError) -> Response:
    answer = error_answer(error, "/api/v1")
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(answer.body, answer.status, headers, media_type="application/json")


def _response(answer: Answer) -> Response:
    return _json(answer.view, answer.status)


def _json(view: View | dict[str, Any], status: int = 200) -> Response:
    try:
        content = orjson.dumps(view)
    except orjson.JSONEncodeError:
        content = json.dumps(view).encode()  # not all that writes to the log keeps to 64 bits
    return Response(content, status, media_type="application/json")
