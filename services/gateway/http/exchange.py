"""A request and the answer to it, between the HTTP server and what answers."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Protocol

from services.gateway.http.heads import Head

Header = tuple[bytes, bytes]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Link(Protocol):
    """The connection that an exchange came over. Tests of an application fake it."""

    @property
    def client(self) -> tuple[str, int] | None: ...

    @property
    def server(self) -> tuple[str, int] | None: ...

    def answer(self, exchange: "Exchange", status: int, headers: Sequence[Header], body: bytes) -> None: ...


class Exchange:
    """One request; answered once, at once or later, by ``respond``. All of it happens on the event loop's thread.

    Attributes
    ----------
    head
        The request's head as it was read. The same object for the next request of this connection if that has the same head to the
        byte, so an application may leave in ``head.memo`` whatever follows from the head alone, and must not change ``headers``.
    raw_path, query
        The target before and after its first ``?``, still percent-encoded.
    headers
        By lower-case name. A name that came more than once: values joined with ``", "``; where that decides framing, identity or
        routing the request was refused.
    body
        The whole body, from the moment ``handle`` is called.
    on_gone
        Called once when the exchange ends without the application's answer: the client went away, or did not send what it promised.
    on_refused
        Called with status and sentence when the body turns out to be too large, too slow or malformed, so that the application can
        say so in its own form, by ``respond``, before it returns. Unset: the server answers ``{"error": sentence}``.
    context
        The application's own, for what it knows of this request between ``admit`` and the answer.
    is_gone
        Nobody waits for the answer any more; ``respond`` does nothing.
    """

    __slots__ = (
        "_link",
        "body",
        "context",
        "head",
        "headers",
        "http_version",
        "is_gone",
        "method",
        "on_gone",
        "on_refused",
        "query",
        "raw_path",
    )

    def __init__(self, link: Link, head: Head, body: bytes | bytearray = b"") -> None:
        self._link = link
        self.head = head
        self.method = head.method
        self.raw_path = head.raw_path
        self.query = head.query
        self.headers = head.headers
        self.http_version = head.http_version
        self.body = body
        self.context: Any = None
        self.is_gone = False
        self.on_gone: Callable[[], None] | None = None
        self.on_refused: Callable[[int, str], None] | None = None

    @property
    def client(self) -> tuple[str, int] | None:
        """Address and port of the client."""
        return self._link.client

    @property
    def server(self) -> tuple[str, int] | None:
        """Address and port that the client connected to."""
        return self._link.server

    @property
    def scheme(self) -> str:
        """What the server speaks; TLS ends in front of it."""
        return "http"

    def respond(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        """Give the whole answer.

        Parameters
        ----------
        headers
            Lower-case names; not ``content-length``, ``transfer-encoding`` or ``connection``, which are the server's.
        """
        self._link.answer(self, status, headers, body)


class Application(Protocol):
    """What answers. Both methods are called on the event loop and must not block; neither raises for what a client did."""

    def admit(self, exchange: Exchange) -> int | AsgiApp | None:
        """Decide by the head alone, before the body has come.

        Returns
        -------
        int | AsgiApp | None
            An int: collect a body of at most so many bytes, then call ``handle``. An ASGI application: run it for this request, the
            body streaming. None: it has been answered already; the body is thrown away for a while, then the connection closes
            (unless all of it had come).
        """

    def handle(self, exchange: Exchange) -> None:
        """Answer a request whose body is there: now, or later through ``exchange.respond``."""
