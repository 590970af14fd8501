"""Claim checks: bodies that are too large for a record lie in the artifact store, and the record says where."""

from collections.abc import AsyncIterator

from libs.artifacts import ArtifactStore
from libs.errors import InvalidArgumentError, InvalidMessage, NotFoundError, PayloadTooLargeError
from libs.inference.errors import printable
from services.streaming.requests import REFERENCE, Request


class Claims:
    """Fetches bodies of requests and stores those of results.

    Parameters
    ----------
    max_bytes
        Largest body that is fetched or stored.
    """

    def __init__(self, store: ArtifactStore, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    async def size(self, request: Request) -> int:
        """Bytes of the body that a request refers to.

        Raises
        ------
        InvalidMessage
            The reference names nothing that could be the body of a request.
        ArtifactStoreUnavailableError
            The store does not answer now.
        """
        reference = printable(request.dataref, 100)
        try:
            stored = await self._store.stat(_digest(request))
        except NotFoundError as error:
            raise InvalidMessage(f"the artifact store does not hold {reference}") from error
        except InvalidArgumentError as error:
            raise InvalidMessage(
                f"the dataref {reference!r} is not one of this platform: {REFERENCE} and 64 lower-case hexadecimal digits"
            ) from error
        if stored.size_bytes > self._max_bytes:
            raise InvalidMessage(f"the body at {reference} has {stored.size_bytes} bytes; at most {self._max_bytes} are fetched")
        return stored.size_bytes

    async def fetch(self, request: Request) -> None:
        """Give a request its body; ``size`` has been asked before.

        Raises
        ------
        InvalidMessage
            The body was removed meanwhile.
        ArtifactStoreUnavailableError, ArtifactCorruptError
            As the store raises.
        """
        try:
            request.fetched(b"".join([block async for block in self._store.open(_digest(request))]))
        except NotFoundError as error:
            raise InvalidMessage(f"the artifact store no longer holds {printable(request.dataref, 100)}") from error

    async def store(self, body: bytes) -> str:
        """Store a body and return its digest.

        Raises
        ------
        InvalidMessage
            It is larger than is stored.
        ArtifactStoreUnavailableError
            The store does not answer now.
        """
        try:
            return (await self._store.put(_once(body), max_bytes=self._max_bytes)).sha256
        except PayloadTooLargeError as error:
            raise InvalidMessage(f"the answer is too large: {len(body)} bytes; at most {self._max_bytes} are stored") from error


def _digest(request: Request) -> str:
    scheme, _, digest = (request.dataref or "").partition(":")
    return digest if f"{scheme}:" == REFERENCE else ""


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
