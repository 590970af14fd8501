"""Who may do what: API keys, or the local user when there are none. Deny by default."""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from libs.errors import ConfigurationError, UnauthenticatedError
from services.gateway.errors import ForbiddenError
from services.gateway.routes import HttpRoute, Permission
from services.gateway.settings import Settings

MIN_KEY_CHARACTERS = 16
"""Shorter keys can be guessed: there is no limit on attempts here."""

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-fA-F]{64})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_AWS_CREDENTIAL = re.compile(rb"(?:^|[ ,])Credential=(?P<key>[^,\s]+)/[0-9]{8}/[^/,\s]+/[^/,\s]+/aws4_request(?=[,\s]|$)")


@dataclass(frozen=True)
class Principal:
    """Who asks, and what they may do."""

    name: str
    permissions: frozenset[Permission]


ANYONE = Principal("anyone", frozenset())
LOCAL = Principal("local", frozenset(Permission))


class AccessControl:
    """Decides for every request; the one place that does.

    Parameters
    ----------
    digests
        SHA-256 of each key, by the name of its holder. Empty: only this machine's users can reach the gateway, and they may do
        everything, but a web page that their browser shows may not.
    """

    def __init__(self, digests: Mapping[str, bytes]) -> None:
        self._digests = dict(digests)

    @property
    def needs_keys(self) -> bool:
        """Whether callers must present a key."""
        return bool(self._digests)

    def admit(self, route: HttpRoute | None, headers: Mapping[bytes, bytes]) -> Principal:
        """Who is asking, if they may use the route (None: a route that does not exist).

        Raises
        ------
        UnauthenticatedError
            Credentials are needed and missing or unknown.
        ForbiddenError
            The caller may not do this.
        """
        if not self.needs_keys:
            _refuse_foreign_pages(headers)
        if route is not None and route.permission is None:
            return ANYONE
        principal = self._authenticate(_key(headers)) if self.needs_keys else LOCAL
        if route is not None and route.permission not in principal.permissions:
            raise ForbiddenError(f"{principal.name} may not {route.permission} here")
        return principal

    def _authenticate(self, key: bytes) -> Principal:
        presented = hashlib.sha256(key.strip()).digest()
        holder = None
        for name, digest in self._digests.items():  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(presented, digest):
                holder = name
        if holder is None:
            raise UnauthenticatedError("the API key is not known here")
        return Principal(holder, frozenset(Permission))


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    """The key that a caller shows: as a bearer token, in ``x-goog-api-key`` as Google's clients do, or as the access key id of AWS's.

    The signature that comes with an access key id is not checked (only digests of keys are known here): such a key travels in the
    open, just as a bearer token does.

    Raises
    ------
    UnauthenticatedError
        There is none.
    """
    authorization = headers.get(b"authorization")
    if authorization is None:
        if b"x-goog-api-key" in headers:
            return headers[b"x-goog-api-key"]
        raise UnauthenticatedError("credentials are needed: send the header Authorization: Bearer <key>")
    scheme, _, credentials = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials
    signed = _AWS_CREDENTIAL.search(credentials) if scheme == b"AWS4-HMAC-SHA256" else None
    if signed is None:
        raise UnauthenticatedError("this scheme of Authorization is not known here; send Authorization: Bearer <key>")
    return signed["key"]


def access_control(settings: Settings) -> AccessControl:
    """Access control as configured.

    Raises
    ------
    ConfigurationError
        When a key is malformed, or the address is not a loopback one and there is no key.
    """
    digests = _inline_keys(settings.api_keys.get_secret_value())
    if settings.api_keys_file is not None:
        try:
            text = settings.api_keys_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"the file of API keys {settings.api_keys_file} cannot be read: {error}") from error
        digests |= _hashed_keys(text, str(settings.api_keys_file))
        if not digests:
            raise ConfigurationError(f"the file of API keys {settings.api_keys_file} holds no key")
    if not digests and not is_loopback(settings.host):
        raise ConfigurationError(
            f"listening on {settings.host}, which is not a loopback address, needs API keys: set GATEWAY_API_KEYS or GATEWAY_API_KEYS_FILE"
        )
    return AccessControl(digests)


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, True, False, False)
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _inline_keys(text: str) -> dict[str, bytes]:
    digests: dict[str, bytes] = {}
    for number, entry in enumerate(filter(None, (entry.strip() for entry in text.split(","))), start=1):
        name, separator, key = entry.partition(":")
        if not separator or not _NAME.fullmatch(name):
            raise ConfigurationError(f"entry {number} of GATEWAY_API_KEYS is not name:key")
        if len(key) < MIN_KEY_CHARACTERS:
            raise ConfigurationError(f"the API key of {name!r} has {len(key)} characters; at least {MIN_KEY_CHARACTERS} are needed")
        if name in digests:
            raise ConfigurationError(f"GATEWAY_API_KEYS names {name!r} twice")
        digests[name] = hashlib.sha256(key.encode()).digest()
    return digests


def _hashed_keys(text: str, place: str) -> dict[str, bytes]:
    digests: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        if match is None:
            raise ConfigurationError(f"line {number} of {place} is not name:SHA-256 of the key in hex")
        digests[match["name"]] = bytes.fromhex(match["digest"])
    return digests


def _refuse_foreign_pages(headers: Mapping[bytes, bytes]) -> None:
    """Without keys a browser on this machine could be led here by any web page: by its own name for 127.0.0.1, or across origins."""
    host = _host_of("//" + headers.get(b"host", b"").decode("latin-1"))
    if host and not is_loopback(host):
        raise ForbiddenError(f"without API keys the gateway answers only to a loopback name, not to {host!r}")
    origin = headers.get(b"origin")
    if origin is not None and not is_loopback(_host_of(origin.decode("latin-1"))):
        raise ForbiddenError("without API keys the gateway does not answer web pages of other sites")
    if headers.get(b"sec-fetch-site") == b"cross-site":
        raise ForbiddenError("without API keys the gateway does not answer web pages of other sites")


@lru_cache(maxsize=256)
def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return "invalid"
