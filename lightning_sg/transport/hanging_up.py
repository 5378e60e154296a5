"""Ends this process's connections to a store whose host does not answer."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

from lightning_sg._compat import Store

_OPEN = "/dev/fd"  # has an entry for each file and socket that this process has open, on Linux and macOS


def place_of(store: Store) -> tuple[str, int] | None:
    """The host and the port of a store; ``None`` for a store without, such as one in a file."""
    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    port = getattr(inner, "port", 0)
    return (inner.host, port) if port else None  # type: ignore[attr-defined]


def hang_up(place: tuple[str, int] | None) -> None:
    """Closes all connections to a place; calls that wait there for an answer fail at once.

    torch's client of a store waits for an answer without a limit, and has no way to close its connection.

    Args:
        place: A host and a port.
    """
    if place is None or not os.path.isdir(_OPEN):
        return
    host, port = place
    with suppress(OSError):
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        for descriptor in map(int, os.listdir(_OPEN)):
            with suppress(OSError):
                _hang_up_if(descriptor, addresses, port)


def _hang_up_if(descriptor: int, addresses: set[str], port: int) -> None:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return
        theirs = connection.getpeername()
        if theirs[0].removeprefix("::ffff:") in addresses and theirs[1] == port:
            connection.shutdown(socket.SHUT_RDWR)


__all__ = ["hang_up", "place_of"]
