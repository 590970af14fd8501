"""What the predict doors read from a request's head, and what every answer says in its own."""

from functools import lru_cache

from libs.errors import InvalidArgumentError
from services.gateway.doors.compression import decompressed
from services.gateway.errors import UnsupportedMediaTypeError
from services.gateway.exchange import Incoming
from services.gateway.predictions import Prediction, Target

MAX_TIMEOUT_MS = 3_600_000

OCTETS = "application/octet-stream"
NPY = "application/x-npy"

_OTHER_KINDS = frozenset({"audio", "font", "image", "model", "multipart", "video"})
_OTHER_TYPES = frozenset(
    {
        OCTETS,
        NPY,
        "application/gzip",
        "application/msgpack",
        "application/pdf",
        "application/pickle",
        "application/protobuf",
        "application/python-pickle",
        "application/vnd.msgpack",
        "application/x-msgpack",
        "application/x-npz",
        "application/x-pickle",
        "application/x-protobuf",
        "application/x-python-pickle",
        "application/zip",
    }
)
"""What is plainly no JSON. What clients put there without thinking (``curl -d``: a form; ``text/plain``; nothing) is not among it."""


def target_of(incoming: Incoming) -> Target:
    """The endpoint that V1 and V2 call a model, with a version number or an alias if the path has one."""
    parameters = incoming.parameters
    return _target(parameters["model"], parameters.get("version"), parameters.get("alias"))


@lru_cache(maxsize=4096)
def _target(endpoint_name: str, version: str | None, alias: str | None) -> Target:
    if version is None:
        return Target(endpoint_name, alias=alias)
    return Target(endpoint_name, int(version)) if version.isdigit() else Target(endpoint_name, alias=version)


def check_content_type(incoming: Incoming, *taken: str) -> None:
    """Refuse a body whose content type says that it is plainly something else than JSON, and none of the types that are ``taken``.

    Raises
    ------
    UnsupportedMediaTypeError
        It is.
    """
    content_type = incoming.headers.get(b"content-type")
    other = None if content_type is None else _other(content_type)
    if other is not None and other not in taken:
        raise UnsupportedMediaTypeError(f"the content type {other[:80]!r} is not taken here; {', '.join(('application/json', *taken))} is")


@lru_cache(maxsize=256)
def _other(content_type: bytes) -> str | None:
    """The media type, if it is plainly no JSON."""
    media_type = content_type.partition(b";")[0].strip().lower().decode("latin-1")
    return media_type if media_type in _OTHER_TYPES or media_type.partition("/")[0] in _OTHER_KINDS else None


def content_of(incoming: Incoming, max_bytes: int) -> bytes | bytearray:
    """The body, uncompressed.

    Raises
    ------
    InvalidArgumentError
        An encoding that is not known, or a body that is not in it.
    PayloadTooLargeError
        It would be larger than ``max_bytes``.
    """
    encoding = incoming.headers.get(b"content-encoding")
    return incoming.body if encoding is None else decompressed(incoming.body, encoding.decode("latin-1"), max_bytes)


def timeout_ms(incoming: Incoming) -> int | None:
    """What ``x-request-timeout-ms`` says; None when it says nothing.

    Raises
    ------
    InvalidArgumentError
        It is no whole number, or too long.
    """
    value = incoming.headers.get(b"x-request-timeout-ms")
    if value is None:
        return None
    if not (value.isdigit() and len(value) <= 9 and 1 <= int(value) <= MAX_TIMEOUT_MS):
        raise InvalidArgumentError(
            f"x-request-timeout-ms must be a whole number from 1 to {MAX_TIMEOUT_MS}, not {value[:40].decode('latin-1')!r}"
        )
    return int(value)


def who(prediction: Prediction) -> tuple[tuple[bytes, bytes], ...]:
    """The header that names the version that answered."""
    return _named(prediction.route.model_name, prediction.route.version)


@lru_cache(maxsize=1024)
def _named(model_name: str, version: int) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"x-millrace-model-version", f"{model_name}@{version}".encode()),)
