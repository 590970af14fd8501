"""The scoring door of SageMaker and MLflow: ``POST /invocations`` and ``/endpoints/{endpoint}/invocations``.

Bodies are JSON, CSV or NumPy arrays by their content type; answers by ``Accept``.

References
----------
SageMaker Runtime API, ``InvokeEndpoint``; MLflow, "Local Inference Server Specification" and ``MlflowDeploymentClient``.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from importlib import metadata

from libs.errors import InvalidArgumentError, NotFoundError, NotReadyError
from libs.inference import tabular, v1
from libs.inference.requests import InferRequest
from schemas.base import ALIAS_PATTERN
from schemas.inference import Signature
from schemas.registry import DeploymentSnapshot
from services.gateway.catalog import Catalog
from services.gateway.doors.compression import compressed
from services.gateway.doors.headers import content_of, timeout_ms, who
from services.gateway.errors import NotAcceptableError, UnsupportedMediaTypeError
from services.gateway.exchange import Incoming, Outgoing, json_answer
from services.gateway.health import Health
from services.gateway.predictions import Ask, Handler, Prediction, Protocol, Read, Target

_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_ALIAS = re.compile(ALIAS_PATTERN)
_QUALITY = re.compile(r"(?:0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")
_CHARSETS = ("utf-8", "utf8", "us-ascii")


class Form(StrEnum):
    """What bodies and answers are written in."""

    JSON = "json"
    CSV = "csv"
    NPY = "npy"


MEDIA_TYPES: Mapping[Form, str] = {Form.JSON: "application/json", Form.CSV: "text/csv", Form.NPY: "application/x-npy"}
_FORMS = {media_type: form for form, media_type in MEDIA_TYPES.items()}
_ACCEPTED = _FORMS | {"*/*": Form.JSON, "application/*": Form.JSON, "text/*": Form.CSV}
_KNOWN = ", ".join(MEDIA_TYPES.values())


def reads(catalog: Catalog, default_endpoint: str | None, max_bytes: int) -> Mapping[tuple[str, str], Read]:
    """The predict routes.

    Parameters
    ----------
    default_endpoint
        The endpoint that ``/invocations`` is for; None: the only one there is.
    max_bytes
        Largest body after decompression.
    """

    def at_default(incoming: Incoming) -> Ask:
        return _read(incoming, _target(incoming, catalog, _default(catalog, default_endpoint)), max_bytes)

    def at_endpoint(incoming: Incoming) -> Ask:
        return _read(incoming, _target(incoming, catalog, incoming.parameters["endpoint"]), max_bytes)

    return {("POST", "/invocations"): at_default, ("POST", "/endpoints/{endpoint}/invocations"): at_endpoint}


def handlers(catalog: Catalog, health: Health) -> Mapping[tuple[str, str], Handler]:
    """What clients ask beside predictions."""
    version = metadata.version("millrace")

    async def ping(_incoming: Incoming) -> Outgoing:
        """Whether the gateway can do its work."""
        if not health.is_ready:
            raise NotReadyError("the gateway is not ready: it has not read the state yet, or is stopping")
        return json_answer({"status": "ok"})

    async def say_version(_incoming: Incoming) -> Outgoing:
        """Millrace's version."""
        return Outgoing(version.encode(), media_type=b"text/plain")

    async def endpoints(_incoming: Incoming) -> Outgoing:
        """All endpoints, as MLflow's deployments client lists them."""
        return json_answer({"endpoints": [_endpoint(catalog, name) for name in catalog.routing.endpoint_names()]})

    async def endpoint(incoming: Incoming) -> Outgoing:
        """One endpoint, as MLflow's deployments client sees it."""
        return json_answer(_endpoint(catalog, incoming.parameters["endpoint"]))

    return {
        ("GET", "/ping"): ping,
        ("GET", "/health"): ping,
        ("GET", "/version"): say_version,
        ("GET", "/api/2.0/endpoints/"): endpoints,
        ("GET", "/api/2.0/endpoints/{endpoint}"): endpoint,
    }


def content_form(body: bytes | bytearray, content_type: str | None) -> tuple[Form, Mapping[str, str]]:
    """What a body is, and the parameters of its content type; without one, or with ``application/octet-stream``, by how it begins.

    Raises
    ------
    UnsupportedMediaTypeError
        Not JSON, CSV or ``.npy``, or not in UTF-8.
    """
    media_type, parameters = _content_type(content_type or "")
    if parameters.get("charset", "utf-8").lower() not in _CHARSETS:
        raise UnsupportedMediaTypeError(f"the character set {parameters['charset'][:40]!r} is not taken here; UTF-8 is")
    if media_type in ("", "application/octet-stream"):
        return _guessed(body), parameters
    if media_type not in _FORMS:
        raise UnsupportedMediaTypeError(f"the content type {media_type[:80]!r} is not taken here; {_KNOWN} are")
    return _FORMS[media_type], parameters


def parse_content(body: bytes | bytearray, content_type: str | None, signature: Signature) -> InferRequest:
    """A body as tensors.

    Raises
    ------
    UnsupportedMediaTypeError
        A content type that is not taken here.
    InvalidArgumentError
        The body is empty, malformed or does not fit the signature.
    """
    if not body:
        raise InvalidArgumentError("the request body is empty")
    form, parameters = content_form(body, content_type)
    if form is Form.JSON:
        return tabular.parse_json(body, signature)
    if form is Form.NPY:
        return tabular.parse_npy(body, signature)
    return tabular.parse_csv(body, signature, _header(parameters))


def answer_form(accept: str | None) -> Form:
    """The form that a caller likes best; JSON when it does not say.

    Raises
    ------
    NotAcceptableError
        It accepts none that is known.
    """
    if accept is None or not accept.strip():
        return Form.JSON
    best, best_quality = None, 0.0
    for item in accept.split(","):
        media_type, parameters = _content_type(item)
        quality = parameters.get("q", "1")
        weight = float(quality) if _QUALITY.fullmatch(quality) else 0.0
        if media_type in _ACCEPTED and weight > best_quality:
            best, best_quality = _ACCEPTED[media_type], weight
    if best is None:
        raise NotAcceptableError(f"answers are given as {_KNOWN}, not as {accept[:80]!r}")
    return best


def writable(request: InferRequest, form: Form, signature: Signature) -> InferRequest:
    """The request, if its answer can be given in this form; raises ``InvalidInputError``."""
    if form is not Form.JSON:
        tabular.check_writable(request, signature, form.value)
    return request


def write_content(prediction: Prediction, form: Form) -> bytes:
    """The answer in a form."""
    if form is Form.JSON:
        return v1.render(prediction.response, prediction.request.groups)
    return (tabular.render_csv if form is Form.CSV else tabular.render_npy)(prediction.response)


def _read(incoming: Incoming, target: Target, max_bytes: int) -> Ask:
    form = answer_form(incoming.header(b"accept"))

    def parse(signature: Signature) -> InferRequest:
        request = parse_content(content_of(incoming, max_bytes), incoming.header(b"content-type"), signature)
        return writable(request, form, signature)

    def write(prediction: Prediction) -> Outgoing:
        variant = (b"x-amzn-invoked-production-variant", prediction.route.deployment_id.encode())
        answer = Outgoing(write_content(prediction, form), 200, MEDIA_TYPES[form].encode(), (*who(prediction), variant))
        return compressed(answer, incoming.headers.get(b"accept-encoding"))

    return Ask(target, Protocol.INVOCATIONS, parse, write, timeout_ms(incoming))


def _default(catalog: Catalog, default_endpoint: str | None) -> str:
    if default_endpoint is not None:
        return default_endpoint
    names = catalog.routing.endpoint_names()
    if not names:
        raise NotFoundError("there is no endpoint yet")
    if len(names) > 1:
        raise InvalidArgumentError(
            f"/invocations is for a gateway with one endpoint, this one has {len(names)}: "
            "post to /endpoints/{name}/invocations, or let GATEWAY_DEFAULT_ENDPOINT name one"
        )
    return names[0]


def _target(incoming: Incoming, catalog: Catalog, endpoint_name: str) -> Target:
    """The endpoint, and of it what the header of a variant names: a version, an alias or a deployment."""
    if b"x-amzn-sagemaker-target-model" in incoming.headers:
        raise InvalidArgumentError("X-Amzn-SageMaker-Target-Model is not known here: each model has an endpoint of its own")
    variant = incoming.header(b"x-amzn-sagemaker-target-variant")
    if variant is None:
        return Target(endpoint_name)
    if _VERSION.fullmatch(variant):
        return Target(endpoint_name, version=int(variant))
    if _ALIAS.fullmatch(variant):
        return Target(endpoint_name, alias=variant)
    return Target(endpoint_name, version=_version_of(catalog.routing.deployments_of(endpoint_name), endpoint_name, variant))


def _version_of(deployments: list[DeploymentSnapshot], endpoint_name: str, deployment_id: str) -> int:
    version = next((deployment.version for deployment in deployments if deployment.deployment_id == deployment_id), None)
    if version is None:
        raise NotFoundError(f"{deployment_id[:200]!r} is no version, alias or deployment of endpoint {endpoint_name!r}")
    if sum(deployment.version == version for deployment in deployments) > 1:
        raise InvalidArgumentError(
            f"endpoint {endpoint_name!r} has versions {version} of several models; name {deployment_id!r} by an alias that only it has"
        )
    return version


def _endpoint(catalog: Catalog, name: str) -> dict[str, object]:
    """An endpoint; its model is the one with the most traffic."""
    deployments = catalog.routing.deployments_of(name)
    traffic = catalog.endpoint(name).traffic
    shown = max(deployments, key=lambda deployment: (traffic.get(deployment.deployment_id, 0), deployment.version), default=None)
    return {
        "name": name,
        "endpoint_type": "predict",
        "model": {"name": shown.model_name if shown else None, "provider": "millrace"},
        "endpoint_url": f"/endpoints/{name}/invocations",
        "limit": None,
    }


def _content_type(value: str) -> tuple[str, dict[str, str]]:
    """Media type and parameters, names in lower case."""
    media_type, *rest = value.split(";")
    pairs = (item.partition("=") for item in rest)
    return media_type.strip().lower(), {name.strip().lower(): content.strip().strip('"') for name, _, content in pairs}


def _guessed(body: bytes | bytearray) -> Form:
    if body.startswith(tabular.NPY_MAGIC):
        return Form.NPY
    return Form.JSON if body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else Form.CSV


def _header(parameters: Mapping[str, str]) -> bool | None:
    """What RFC 4180's parameter says of the first row."""
    header = parameters.get("header")
    if header not in (None, "present", "absent"):
        raise InvalidArgumentError(f"the parameter header of text/csv is 'present' or 'absent', not {header[:40]!r}")
    return None if header is None else header == "present"
