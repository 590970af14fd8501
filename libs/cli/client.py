"""The gateway's HTTP API as one method per operation."""

import copy
import hashlib
import json
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from libs.cli.errors import CommandError, PlatformUnreachableError, RequestRefusedError, WaitTimeoutError

# httpx imports its own command line, and with it rich and pygments, if it can: half of the time that `millrace` takes to start.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # None: as if it could not be imported

import httpx  # noqa: E402

Json = dict[str, Any]
OnBytes = Callable[[int], None]

CHUNK_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 120.0
"""Longest silence of the gateway: the first prediction of a heavy model may take a while."""

OPERATION_TIMEOUT_S = 60.0
OPERATION_POLL_S = 0.25

EVENT_SILENCE_S = 60.0
"""A followed event stream sends a comment at least every few seconds; longer silence means the connection is dead."""


@dataclass(frozen=True)
class Answer:
    """A prediction: the body as it was sent, and who gave it."""

    text: str
    request_id: str | None
    model_version: str | None

    @property
    def body(self) -> Json:
        """The body, parsed."""
        parsed: Json = json.loads(self.text)
        return parsed


class EventStream:
    """The events of one subscription, as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[Json]:
        return server_sent(self._response.iter_lines())

    def end(self) -> None:
        """Break the connection, from whatever thread: whoever waits for the next event gets ``PlatformUnreachableError``."""
        connection = self._response.extensions["network_stream"].get_extra_info("socket")
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class Client:
    """A connection to a gateway.

    Every method raises ``PlatformUnreachableError`` when nobody answers and ``RequestRefusedError`` with the gateway's own sentence when it
    says no.

    Parameters
    ----------
    traceparent
        Called before each request; what it returns travels as the W3C ``traceparent`` header.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        traceparent: Callable[[], str | None] = lambda: None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url
        self._traceparent = traceparent
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            trust_env=False,
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def unobserved(self) -> "Client":
        """The same connection, for looking again and again: what it asks is left out of the trace."""
        other = copy.copy(self)
        other._traceparent = lambda: _unsampled(self._traceparent())
        return other

    # Models

    def upload_artifact(self, path: Path, on_bytes: OnBytes = lambda _: None) -> Json:
        """Stream a file to the artifact store; its digest goes ahead of it, so that the gateway can refuse a damaged copy."""
        digest = sha256_of(path)
        headers = {
            "content-type": "application/octet-stream",
            "content-length": str(path.stat().st_size),
            "x-millrace-sha256": digest,
        }
        with path.open("rb") as file:
            chunks = _counted(iter(lambda: file.read(CHUNK_BYTES), b""), on_bytes)
            return self._call("POST", "/api/v1/artifacts", params={"filename": path.name}, headers=headers, content=chunks)

    def register_version(self, model: str, body: Json) -> tuple[Json, bool]:
        """Register an uploaded artifact; the version's view, and whether it is new (the same content existed otherwise)."""
        status, answer = self._command("POST", f"/api/v1/models/{segment(model)}/versions", body)
        return answer, status != httpx.codes.OK

    def models(self) -> list[Json]:
        """All models."""
        return self._list("/api/v1/models", "models")

    def model(self, model: str) -> Json:
        """One model."""
        return self._call("GET", f"/api/v1/models/{segment(model)}")

    def versions(self, model: str) -> list[Json]:
        """All versions of a model."""
        return self._list(f"/api/v1/models/{segment(model)}/versions", "versions")

    def version(self, model: str, version: int | str) -> Json:
        """One version, by number or alias."""
        return self._call("GET", f"/api/v1/models/{segment(model)}/versions/{segment(str(version))}")

    def set_alias(self, model: str, alias: str, version: int) -> Json:
        """Point an alias at a version."""
        path = f"/api/v1/models/{segment(model)}/aliases/{segment(alias)}"
        return self._command("PUT", path, {"version": version})[1]

    def set_example(self, model: str, version: int, example: Any) -> Json:
        """Give an example to a version that needs one; the version's view."""
        return self._command("POST", f"/api/v1/models/{segment(model)}/versions/{version}:example", {"example": example})[1]

    def archive_version(self, model: str, version: int) -> Json:
        """Take a version out of use."""
        return self._command("POST", f"/api/v1/models/{segment(model)}/versions/{version}:archive")[1]

    # Endpoints

    def create_endpoint(self, endpoint: str) -> Json:
        """Create an endpoint."""
        return self._command("POST", "/api/v1/endpoints", {"name": endpoint})[1]

    def endpoints(self) -> list[Json]:
        """All endpoints."""
        return self._list("/api/v1/endpoints", "endpoints")

    def endpoint(self, endpoint: str) -> Json:
        """One endpoint with its deployments."""
        return self._call("GET", f"/api/v1/endpoints/{segment(endpoint)}")

    def delete_endpoint(self, endpoint: str, *, force: bool = False, keep_topics: bool = False) -> Json:
        """Delete an endpoint."""
        kept = {"keep_topics": "true"} if keep_topics else {}
        return self._command("DELETE", f"/api/v1/endpoints/{segment(endpoint)}", params=_forced(force) | kept)[1]

    def deploy(self, endpoint: str, body: Json) -> Json:
        """Deploy a version to an endpoint; the deployment's view."""
        return self._command("POST", f"/api/v1/endpoints/{segment(endpoint)}/deployments", body)[1]

    def undeploy(self, endpoint: str, deployment_id: str, *, force: bool = False) -> Json:
        """Remove a deployment from an endpoint."""
        path = f"/api/v1/endpoints/{segment(endpoint)}/deployments/{segment(deployment_id)}"
        return self._command("DELETE", path, params=_forced(force))[1]

    def set_traffic(self, endpoint: str, traffic: Mapping[str, int]) -> Json:
        """Set the whole traffic split of an endpoint."""
        return self._command("PUT", f"/api/v1/endpoints/{segment(endpoint)}/traffic", {"traffic": dict(traffic)})[1]

    def set_prediction_log(self, endpoint: str, body: Json) -> Json:
        """Set how an endpoint's requests are logged."""
        return self._command("PUT", f"/api/v1/endpoints/{segment(endpoint)}/prediction-log", body)[1]

    # Predictions

    def predict(self, endpoint: str, request: bytes) -> Answer:
        """Ask an endpoint: a body with ``inputs`` goes to the V2 door, any other to V1 ``:predict``."""
        path = f"/v2/models/{segment(endpoint)}/infer" if _is_v2(request) else f"/v1/models/{segment(endpoint)}:predict"
        with self._translated():
            response = self._http.post(path, content=request, headers={"content-type": "application/json", **self._trace_headers()})
        _check(response)
        return Answer(response.text, response.headers.get("x-request-id"), response.headers.get("x-millrace-model-version"))

    def metrics(self) -> str:
        """What the gateway counts, in Prometheus's text format."""
        with self._translated():
            response = self._http.get("/metrics", headers={"accept": "text/plain"})
        _check(response)
        return response.text

    # Events, operations, dead letters

    def operation(self, operation_id: str) -> Json:
        """Whether a command has been decided, and how."""
        return self._call("GET", f"/api/v1/operations/{segment(operation_id)}")

    def recent_events(self, **filters: str | None) -> list[Json]:
        """The events that the gateway still remembers, oldest first."""
        answer = self._call("GET", "/api/v1/events", params={**_given(filters), "follow": "false"})
        return list(answer["events"])

    @contextmanager
    def follow_events(self, **filters: str | None) -> Iterator["EventStream"]:
        """Events from now on, each a structured CloudEvent, until the connection ends; subscribed when the block begins."""
        timeout = httpx.Timeout(EVENT_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        params = {**_given(filters), "follow": "true"}
        headers = {"accept": "text/event-stream", **self._trace_headers()}
        with (
            self._translated(),
            self._http.stream("GET", "/api/v1/events", params=params, headers=headers, timeout=timeout) as response,
        ):
            if response.is_error:
                response.read()
            _check(response)
            yield EventStream(response)

    def dead_letters(self) -> list[Json]:
        """What could not be handled, newest first."""
        return self._list("/api/v1/dead-letters", "dead_letters")

    def dead_letter(self, identity: str) -> Json:
        """One dead letter."""
        return self._call("GET", f"/api/v1/dead-letters/{segment(identity)}")

    def replay_dead_letter(self, identity: str) -> Json:
        """Publish the original record again, where it came from."""
        return self._call("POST", f"/api/v1/dead-letters/{segment(identity)}:replay")

    # How it is done

    def _list(self, path: str, name: str) -> list[Json]:
        return list(self._call("GET", path)[name])

    def _call(self, method: str, path: str, **arguments: Any) -> Json:
        return self._answer(method, path, **arguments)[1]

    def _command(self, method: str, path: str, body: Json | None = None, params: Mapping[str, str] | None = None) -> tuple[int, Json]:
        """Send a command and return its answer: what it made, or (when the registry was slow) the fact that says so."""
        status, answer = self._answer(method, path, json=body, params=params)
        if status != httpx.codes.ACCEPTED or "operation_id" not in answer:
            return status, answer
        return status, self._decided(str(answer["operation_id"]))

    def _decided(self, operation_id: str) -> Json:
        deadline = time.monotonic() + OPERATION_TIMEOUT_S
        while time.monotonic() < deadline:
            operation = self.operation(operation_id)
            if operation.get("done"):
                if operation.get("error"):
                    raise RequestRefusedError(str(operation["error"]), httpx.codes.CONFLICT)
                return {**(operation.get("outcome") or {}).get("data", {}), "operation_id": operation_id}
            time.sleep(OPERATION_POLL_S)
        raise WaitTimeoutError(
            f"the registry has not answered for {OPERATION_TIMEOUT_S:.0f} s; the command is kept and will be carried out, "
            f"see {self.url}/api/v1/operations/{operation_id}"
        )

    def _answer(self, method: str, path: str, headers: Mapping[str, str] | None = None, **arguments: Any) -> tuple[int, Json]:
        with self._translated():
            response = self._http.request(method, path, headers={**self._trace_headers(), **(headers or {})}, **arguments)
        _check(response)
        return response.status_code, _object(response) if response.content else {}

    def _trace_headers(self) -> dict[str, str]:
        traceparent = self._traceparent()
        return {"traceparent": traceparent} if traceparent else {}

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise PlatformUnreachableError(f"the platform does not answer at {self.url}; start it with: millrace up") from error
        except httpx.TimeoutException as error:
            raise PlatformUnreachableError(f"the platform at {self.url} accepted the request and then said nothing for too long") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise CommandError(f"MILLRACE_URL {self.url!r} is not a usable address: {error}") from error
        except httpx.TransportError as error:
            raise PlatformUnreachableError(f"the connection to {self.url} broke: {error or type(error).__name__}") from error


def segment(text: str) -> str:
    """Text as one segment of a path, whatever it holds.

    >>> segment("a/b"), segment("..")
    ('a%2Fb', '%2E%2E')
    """
    return quote(text, safe="") if text.strip(".") else "%2E" * len(text)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, lower-case hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def server_sent(lines: Iterable[str]) -> Iterator[Json]:
    """The JSON objects of a server-sent event stream; comments (heartbeats) and other fields are passed over.

    References
    ----------
    WHATWG HTML, section 9.2.6: consecutive ``data`` lines are joined by line feeds, an empty line ends the event.

    >>> list(server_sent([": alive", "id: 7", 'data: {"a":', "data: 1}", "", 'data: {"cut": "off"']))
    [{'a': 1}]
    """
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield json.loads("\n".join(data))
            data = []


def _counted(chunks: Iterable[bytes], on_bytes: OnBytes) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        on_bytes(len(chunk))


def _given(filters: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in filters.items() if value is not None}


def _unsampled(traceparent: str | None) -> str | None:
    """W3C Trace Context, section 3.2.2.5: the last flag says whether the caller records."""
    return f"{traceparent[:-2]}00" if traceparent else None


def _forced(force: bool) -> dict[str, str]:
    return {"force": "true"} if force else {}


def _is_v2(request: bytes) -> bool:
    try:
        body = json.loads(request)
    except ValueError:
        return False
    return isinstance(body, dict) and "inputs" in body and "instances" not in body


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        sentence = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        sentence = (
            f"{response.request.method} {response.request.url.path} was answered with {response.status_code} {response.reason_phrase}"
        )
    raise RequestRefusedError(" ".join(sentence.split()), response.status_code)


def _object(response: httpx.Response) -> Json:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise CommandError(f"what answers at {response.request.url} is not a Millrace gateway: its answer is not a JSON object")
    return body
