"""Every route of the gateway in one table: what it takes, and what a caller needs to use it. What is not here does not exist."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import get_args
from urllib.parse import unquote_to_bytes

from libs.errors import InvalidArgumentError, MillraceError, NotFoundError
from schemas.base import ALIAS_PATTERN, NAME_PATTERN, Alias, Name
from services.gateway.errors import MethodNotAllowedError


class Permission(StrEnum):
    """What a principal may do."""

    READ = "read"
    MANAGE = "manage"
    PREDICT = "predict"


class Door(StrEnum):
    """Who answers a route: the plain ASGI side, or the management API, which differs in how its body is read."""

    PLAIN = "plain"
    API = "api"
    API_STREAM = "api_stream"


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
"""Methods of RFC 9110; in traces all others are ``HTTP``."""


@dataclass(frozen=True)
class HttpRoute:
    """A row of the table; ``permission`` None means public."""

    method: str
    template: str
    permission: Permission | None
    door: Door

    @cached_property
    def segments(self) -> tuple[re.Pattern[str], ...]:
        """One pattern per path segment."""
        return tuple(_segment_pattern(segment) for segment in self.template.split("/"))


def _segment_pattern(segment: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", segment)
    return re.compile("".join(f"(?P<{part[1:-1]}>.*)" if part.startswith("{") else re.escape(part) for part in parts), re.DOTALL)


ROUTES = (
    HttpRoute("GET", "/healthz", None, Door.PLAIN),
    HttpRoute("GET", "/metrics", Permission.READ, Door.PLAIN),
    HttpRoute("GET", "/v2/health/live", None, Door.PLAIN),
    HttpRoute("GET", "/v2/health/ready", None, Door.PLAIN),
    HttpRoute("GET", "/", Permission.READ, Door.PLAIN),
    HttpRoute("GET", "/v1/models", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v1/models/{model}:predict", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v1/models/{model}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v1/models/{model}/versions/{version}:predict", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v1/models/{model}/labels/{alias}:predict", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v1/models/{model}/versions/{version}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v1/models/{model}/labels/{alias}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/stats", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/{model}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/{model}/versions/{version}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/{model}/ready", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/{model}/versions/{version}/ready", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v2/models/{model}/infer", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v2/models/{model}/versions/{version}/infer", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/{model}/config", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/{model}/versions/{version}/config", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/{model}/stats", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v2/models/{model}/versions/{version}/stats", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v2/repository/index", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v2/repository/models/{model}/load", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v2/repository/models/{model}/unload", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/ping", None, Door.PLAIN),
    HttpRoute("GET", "/health", None, Door.PLAIN),
    HttpRoute("GET", "/version", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/invocations", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/endpoints/{endpoint}/invocations", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/api/2.0/endpoints/", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/api/2.0/endpoints/{endpoint}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v1/projects/{project}/locations/{location}/endpoints/{endpoint}:predict", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v1/projects/{project}/locations/{location}/endpoints/{endpoint}:rawPredict", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v1/projects/{project}/locations/{location}/endpoints/{endpoint}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v1beta1/projects/{project}/locations/{location}/endpoints/{endpoint}:predict", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/v1beta1/projects/{project}/locations/{location}/endpoints/{endpoint}:rawPredict", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/v1beta1/projects/{project}/locations/{location}/endpoints/{endpoint}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/api/v1/predictions/{operation_id}", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/api/v1/predictions/{operation_id}/result", Permission.PREDICT, Door.PLAIN),
    HttpRoute("POST", "/api/v1/predictions/{operation_id}:cancel", Permission.PREDICT, Door.PLAIN),
    HttpRoute("GET", "/docs", Permission.READ, Door.API),
    HttpRoute("GET", "/docs/oauth2-redirect", Permission.READ, Door.API),
    HttpRoute("GET", "/static-offline-docs/{file}", Permission.READ, Door.API),
    HttpRoute("GET", "/openapi.json", Permission.READ, Door.API),
    HttpRoute("POST", "/api/v1/artifacts", Permission.MANAGE, Door.API_STREAM),
    HttpRoute("GET", "/api/v1/models", Permission.READ, Door.API),
    HttpRoute("GET", "/api/v1/models/{model}", Permission.READ, Door.API),
    HttpRoute("GET", "/api/v1/models/{model}/versions", Permission.READ, Door.API),
    HttpRoute("POST", "/api/v1/models/{model}/versions", Permission.MANAGE, Door.API),
    HttpRoute("POST", "/api/v1/models/{model}/versions/{version}:archive", Permission.MANAGE, Door.API),
    HttpRoute("POST", "/api/v1/models/{model}/versions/{version}:example", Permission.MANAGE, Door.API),
    HttpRoute("GET", "/api/v1/models/{model}/versions/{version}", Permission.READ, Door.API),
    HttpRoute("PUT", "/api/v1/models/{model}/aliases/{alias}", Permission.MANAGE, Door.API),
    HttpRoute("DELETE", "/api/v1/models/{model}/aliases/{alias}", Permission.MANAGE, Door.API),
    HttpRoute("POST", "/api/v1/endpoints", Permission.MANAGE, Door.API),
    HttpRoute("GET", "/api/v1/endpoints", Permission.READ, Door.API),
    HttpRoute("GET", "/api/v1/endpoints/{endpoint}", Permission.READ, Door.API),
    HttpRoute("DELETE", "/api/v1/endpoints/{endpoint}", Permission.MANAGE, Door.API),
    HttpRoute("POST", "/api/v1/endpoints/{endpoint}/deployments", Permission.MANAGE, Door.API),
    HttpRoute("DELETE", "/api/v1/endpoints/{endpoint}/deployments/{deployment_id}", Permission.MANAGE, Door.API),
    HttpRoute("PUT", "/api/v1/endpoints/{endpoint}/traffic", Permission.MANAGE, Door.API),
    HttpRoute("PUT", "/api/v1/endpoints/{endpoint}/prediction-log", Permission.MANAGE, Door.API),
    HttpRoute("GET", "/api/v1/operations/{operation_id}", Permission.READ, Door.API),
    HttpRoute("GET", "/api/v1/events", Permission.READ, Door.API),
    HttpRoute("GET", "/api/v1/dead-letters", Permission.READ, Door.API),
    HttpRoute("GET", "/api/v1/dead-letters/{letter_id}", Permission.READ, Door.API),
    HttpRoute("POST", "/api/v1/dead-letters/{letter_id}:replay", Permission.MANAGE, Door.API),
)
"""More specific templates stand before those that would match the same path."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a request line means: a route with its parameters, or the error it deserves (told only to who may know)."""

    route: HttpRoute | None
    parameters: Mapping[str, str] = field(default_factory=dict)
    error: MillraceError | None = None


def find(method: str, raw_path: str) -> Found:
    """Look a request line up; ``raw_path`` is still percent-encoded, so that an encoded slash stays inside its segment.

    ``HEAD`` leads where ``GET`` does: the server leaves the body of the answer out.
    """
    wanted = "GET" if method == "HEAD" else method
    try:
        segments = [_decoded(segment) for segment in raw_path.split("/")]
    except InvalidArgumentError as error:
        return Found(None, error=error)
    allowed: list[str] = []
    fits_another = False
    for route in ROUTES_BY_LENGTH.get(len(segments), ()):
        parameters = _match(route, segments)
        if parameters is None:
            continue
        problem = _problem(parameters)
        if route.method == wanted and not (problem and fits_another):
            return Found(route, parameters, problem)
        fits_another = fits_another or problem is None
        if route.method not in (wanted, *allowed):
            allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
    if allowed:
        return Found(None, error=MethodNotAllowedError(f"{raw_path[:200]} does not take {method}; it takes {', '.join(allowed)}", allowed))
    return Found(None, error=NotFoundError(f"there is nothing at {raw_path[:200]}"))


def _match(route: HttpRoute, segments: list[str]) -> dict[str, str] | None:
    parameters: dict[str, str] = {}
    for pattern, segment in zip(route.segments, segments, strict=True):
        match = pattern.fullmatch(segment)
        if match is None:
            return None
        parameters |= match.groupdict()
    return parameters


def _decoded(segment: str) -> str:
    if "%" not in segment:
        return segment
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise InvalidArgumentError(f"the path segment {segment[:200]!r} is not percent-encoded UTF-8") from None


def _by_length(routes: tuple[HttpRoute, ...]) -> dict[int, tuple[HttpRoute, ...]]:
    lengths = {len(route.segments) for route in routes}
    return {length: tuple(route for route in routes if len(route.segments) == length) for length in lengths}


ROUTES_BY_LENGTH = _by_length(ROUTES)

NAME_RULE = get_args(Name)[1].description
ALIAS_RULE = get_args(Alias)[1].description
_VERSION_PATTERN = r"[1-9][0-9]{0,8}"
_PLACE_RULE = "1 to 100 letters, digits, '.', '_', ':' or '-'; starts and ends with a letter or digit"
_ID_RULE = "up to 200 letters, digits, '.', '_', ':' or '-'"


_ALIAS_OR_NUMBER = f"(?:{_VERSION_PATTERN}|{ALIAS_PATTERN.strip('^$')})"
_PLACE_PATTERN = r"[A-Za-z0-9](?:[A-Za-z0-9._:-]{0,98}[A-Za-z0-9])?"

PATTERNS: Mapping[str, str] = {
    "model": NAME_PATTERN.strip("^$"),
    "endpoint": NAME_PATTERN.strip("^$"),
    "alias": ALIAS_PATTERN.strip("^$"),
    "version": _ALIAS_OR_NUMBER,
    "project": _PLACE_PATTERN,
    "location": _PLACE_PATTERN,
    "deployment_id": rf"{NAME_PATTERN.strip('^$')}\.{NAME_PATTERN.strip('^$')}\.{_VERSION_PATTERN}",
    "file": r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}",
    "operation_id": r"[A-Za-z0-9._-]{1,200}",
    "letter_id": r"[A-Za-z0-9._:-]{1,200}",
}
"""By the name of a path parameter: what the whole of it must match."""


def _checker(name: str, what: str, rule: str) -> Callable[[str], None]:
    compiled = re.compile(PATTERNS[name])

    def check(value: str) -> None:
        if not compiled.fullmatch(value):
            shown = value if len(value) <= 80 else value[:80] + "…"
            raise InvalidArgumentError(f"{shown!r} is not {what}: {rule.rstrip('.')}")

    return check


CHECKS: Mapping[str, Callable[[str], None]] = {
    "model": _checker("model", "a model name", NAME_RULE),
    "endpoint": _checker("endpoint", "an endpoint name", NAME_RULE),
    "alias": _checker("alias", "an alias", ALIAS_RULE),
    "version": _checker("version", "a version", f"a number from 1 on, or an alias ({ALIAS_RULE.rstrip('.')})"),
    "project": _checker("project", "a project", _PLACE_RULE),
    "location": _checker("location", "a location", _PLACE_RULE),
    "deployment_id": _checker("deployment_id", "a deployment id", "<endpoint>.<model>.<version>"),
    "file": _checker("file", "a file of the API page", "letters, digits, '.', '_' or '-'"),
    "operation_id": _checker("operation_id", "an operation id", _ID_RULE),
    "letter_id": _checker("letter_id", "the id of a dead letter", _ID_RULE),
}
"""By the name of a path parameter: raises ``InvalidArgumentError`` that names the rule."""


def _problem(parameters: Mapping[str, str]) -> InvalidArgumentError | None:
    for name, value in parameters.items():
        try:
            CHECKS[name](value)
        except InvalidArgumentError as error:
            return error
    return None
