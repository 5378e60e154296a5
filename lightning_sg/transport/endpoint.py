"""Where two neighbours meet: one listens, the other connects, and each proves that it is of this run."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from lightning_sg._compat import Store
from lightning_sg.transport.connection import Connection
from lightning_sg.transport.line import Contact, Position, at_start

#: An environment variable with a secret of the user's, for networks in which others can read the store.
SECRET = "LIGHTNING_SG_SECRET"
_BYTES = 32
_SECONDS = 3.0  # for a handshake: who connects by mistake does not keep others waiting for longer
_SLICE = 0.2  # seconds between two looks, so that signals are answered


@dataclass(frozen=True)
class MeetingPoint:
    """Where the two ends of a link find each other.

    Attributes:
        store: The store of the run.
        name: The link's name in it.
        key: What only processes of this run know.
        incarnation: Differs for each process.
        address: Where the other machines reach this one.
    """

    store: Store
    name: str
    key: bytes
    incarnation: str
    address: str


class Listener:
    """The end of a link that is connected to.

    The socket is open on one address only, where the other machines reach this one.

    Args:
        meeting: Where the other end finds it.
        lasting: Whether the socket stays open after the first connection.
    """

    def __init__(self, meeting: MeetingPoint, *, lasting: bool) -> None:
        self.position = at_start
        self._meeting = meeting
        self._lasting = lasting
        host = meeting.address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket: socket.socket | None = socket.create_server((host, 0), family=family)
        port = self._socket.getsockname()[1]
        meeting.store.set(meeting.name, json.dumps([host, port]))

    def __call__(self, heard: int, seconds: float) -> Contact:
        """See :class:`Dial`."""
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            if self._socket is None:
                raise ConnectionError("closed")
            self._socket.settimeout(min(_SLICE, remaining))
            with suppress(TimeoutError):
                sock, _address = self._socket.accept()
                contact = self._welcome(sock, heard)
                if contact is not None:
                    if not self._lasting:
                        self.close()
                    return contact
        raise TimeoutError("nobody connected")

    def _welcome(self, sock: socket.socket, heard: int) -> Contact | None:
        """The handshake; ``None`` for somebody who does not belong to the run."""
        connection = _timed(sock)
        try:
            ours = secrets.token_bytes(_BYTES)
            connection.write(ours)
            theirs, proof = connection.read(_BYTES), connection.read(_BYTES)
            if not hmac.compare_digest(proof, _proof(self._meeting.key, b"connects", ours, theirs)):
                raise ConnectionError("of another run")
            connection.write(_proof(self._meeting.key, b"listens", theirs, ours))
            return _greeted(self._meeting, connection, sock, heard, self.position())
        except (OSError, ValueError):
            connection.close()
            return None

    def close(self) -> None:
        """Closes the port."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Connector:
    """The end of a link that connects to the other.

    Args:
        meeting: Where it finds it.
    """

    def __init__(self, meeting: MeetingPoint) -> None:
        self.position = at_start
        self._meeting = meeting

    def __call__(self, heard: int, seconds: float) -> Contact:
        """See :class:`Dial`."""
        deadline = time.monotonic() + seconds
        reason: OSError = TimeoutError("it does not listen")
        while (remaining := deadline - time.monotonic()) > 0:
            try:
                if self._meeting.store.check([self._meeting.name]):
                    host, port = json.loads(self._meeting.store.get(self._meeting.name))
                    return self._introduce(socket.create_connection((host, port), min(2.0, remaining)), heard)
            except OSError as error:
                reason = error
            except RuntimeError as error:
                raise ConnectionError(f"the store of the run, which rank 0 keeps, is gone ({error})") from error
            time.sleep(min(0.02, max(0.0, remaining)))
        raise reason

    def _introduce(self, sock: socket.socket, heard: int) -> Contact:
        connection = _timed(sock)
        try:
            theirs, ours = connection.read(_BYTES), secrets.token_bytes(_BYTES)
            connection.write(ours + _proof(self._meeting.key, b"connects", theirs, ours))
            if not hmac.compare_digest(connection.read(_BYTES), _proof(self._meeting.key, b"listens", ours, theirs)):
                raise ConnectionError("somebody of another run listens there")
            return _greeted(self._meeting, connection, sock, heard, self.position())
        except OSError:
            connection.close()
            raise

    def close(self) -> None:
        """Does nothing."""


def key_of_run(store: Store) -> bytes:
    """What the processes of a run know each other by: a secret from the store, and the user's if there is one."""
    drawn = store.compare_set("secret", "", secrets.token_hex(_BYTES))
    return hashlib.sha256(drawn + os.environ.get(SECRET, "").encode()).digest()


def _timed(sock: socket.socket) -> Connection:
    connection = Connection(sock)
    sock.settimeout(_SECONDS)
    return connection


def _greeted(
    meeting: MeetingPoint, connection: Connection, sock: socket.socket, heard: int, position: Position
) -> Contact:
    """Each side says who it is, what it has heard, and where it is."""
    who = {"link": meeting.name, "heard": heard, "incarnation": meeting.incarnation}
    own = json.dumps({**who, "position": asdict(position)}).encode()
    connection.write(len(own).to_bytes(4, "little") + own)
    hello = json.loads(connection.read(int.from_bytes(connection.read(4), "little")))
    if hello["link"] != meeting.name:
        raise ConnectionError(f"the other side has link {hello['link']}")
    sock.settimeout(None)
    there = {name: int(number) for name, number in hello["position"].items()}
    return Contact(connection, int(hello["heard"]), str(hello["incarnation"]), Position(**there))


def _proof(key: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(key, role + first + second, "sha256")


__all__ = ["SECRET", "Connector", "Listener", "MeetingPoint", "key_of_run"]
