"""Sockets to listen on: handed over by whoever started this process, or opened here."""

import socket
from collections.abc import Iterable, Sequence

from libs.errors import ConfigurationError

Option = tuple[int, int, int]
"""Level, name and value, as ``setsockopt`` takes them."""


def listener(
    host: str, port: int, options: Iterable[Option], *, handed_over: Sequence[int], reuse_port: bool, variable: str
) -> socket.socket:
    """Return a socket that is bound, and takes these options; accepted connections have them from it.

    Parameters
    ----------
    handed_over
        Descriptors of sockets that somebody else holds, too: while this process is away, connections wait in their queue. The first is
        taken; when there is none, a socket is opened.
    reuse_port
        Share the port with other processes (``SO_REUSEPORT``).
    variable
        The setting of the port, for messages.

    Raises
    ------
    ConfigurationError
        The address cannot be used, or the descriptor is no socket that listens.
    """
    if handed_over:
        return _taken_over(handed_over[0], options, f"{variable.removesuffix('PORT')}SOCKETS")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigurationError(f"the address {host!r} cannot be used: {error.strerror}") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(address)
        _prepare(opened, options)
    except OSError as error:
        opened.close()
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}; set {variable} to a port that is free") from error
    return opened


def _taken_over(descriptor: int, options: Iterable[Option], variable: str) -> socket.socket:
    try:
        taken = socket.socket(fileno=descriptor)
        if not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            taken.detach()
            raise ConfigurationError(f"{variable} names the descriptor {descriptor}, which does not listen")
        _prepare(taken, options)
    except OSError as error:
        raise ConfigurationError(f"{variable} names the descriptor {descriptor}, which is no socket: {error.strerror}") from error
    return taken


def _prepare(prepared: socket.socket, options: Iterable[Option]) -> None:
    for option in options:
        prepared.setsockopt(*option)
    prepared.setblocking(False)
