"""The connection to one neighbour while it lasts, and the next one if it breaks and may be made again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lightning_sg.transport.connection import Connection

_BETWEEN = 0.1  # seconds between two attempts
_UNCONFIRMED = 5.0  # seconds


class LineBrokenError(OSError):
    """The connection is broken for good."""


@dataclass(frozen=True)
class Position:
    """Where one end of a link is, for a neighbour that was started anew.

    Attributes:
        wants: The first batch whose activations it does not have yet.
        has: The first batch whose activations it still can send; the neighbour has had those before.
    """

    wants: int = 0
    has: int = 0


def at_start() -> Position:
    """Where both ends begin."""
    return Position()


@dataclass(frozen=True)
class Contact:
    """A connection that has just been made.

    Attributes:
        connection: The connection.
        heard: The number of the last frame that the neighbour has of this process.
        incarnation: Differs for each process that has been this neighbour.
        position: Where the neighbour is.
    """

    connection: Connection
    heard: int
    incarnation: str
    position: Position = Position()


class Dial(Protocol):
    """Makes a connection to a neighbour.

    Attributes:
        position: Where this end is.
    """

    position: Callable[[], Position]

    def __call__(self, heard: int, seconds: float) -> Contact:
        """Tries for so many seconds.

        Args:
            heard: The number of the last frame that this process has of the neighbour.
            seconds: How long to try.

        Raises:
            OSError: If the neighbour could not be reached.
        """

    def close(self) -> None:
        """Makes no more."""


class Line:
    """Hands out the connection to a neighbour. Threads may use it together.

    Args:
        dial: Makes the connections after the first.
        contact: The first.
        patience: How many seconds a broken connection is tried to be made again; 0 for not at all.
        renewable: Whether it may be made with a new process in the neighbour's place.
    """

    def __init__(self, dial: Dial, contact: Contact, patience: float = 0.0, *, renewable: bool = False) -> None:
        self.renewable = renewable
        self.on_new_process: Callable[[Contact], None] = lambda contact: None
        self._dial = dial
        self._patience = patience
        self._take(contact)
        self._changed = threading.Condition()
        self._contact: Contact | None = contact
        self._incarnation = contact.incarnation
        self._broken = ""
        self._given_up = False
        self.on_contact: Callable[[Contact], None] = lambda contact: None

    @property
    def lasting(self) -> bool:
        """Whether a connection that breaks is made again."""
        return self._patience > 0

    def current(self) -> Connection:
        """The connection; while it is being made again, waits for it.

        Raises:
            LineBrokenError: If it is broken for good.
        """
        with self._changed:
            while self._contact is None:
                if self._given_up:
                    raise LineBrokenError(self._broken)
                self._changed.wait()
            return self._contact.connection

    def broke(self, connection: Connection, error: OSError) -> None:
        """A thread met an error on a connection, which closes it."""
        with self._changed:
            if self._contact is not None and self._contact.connection is connection:
                self._contact, self._broken = None, str(error)
                connection.close()
                self._given_up = self._given_up or not self._patience
                self._changed.notify_all()

    def redial(self, heard: int) -> None:
        """Makes the connection again, or gives up. One thread does, which is also who is told of a new process.

        Args:
            heard: The number of the last frame that this process has of the neighbour.
        """
        deadline = time.monotonic() + self._patience
        while self._contact is None and not self._given_up:
            try:
                contact = self._dial(heard, min(1.0, self._patience))
                if contact.incarnation != self._incarnation and not self.renewable:
                    contact.connection.close()
                    self._give_up("its process was started anew, which cannot go on with this run")
                    return
            except OSError as error:
                if time.monotonic() >= deadline:
                    none = f"; no new process took its place within {self._patience:g} s"
                    self._give_up(f"{error}{none if self.renewable else ''}")
                time.sleep(_BETWEEN)
                continue
            with self._changed:
                if self._given_up:
                    contact.connection.close()
                    return
                self._take(contact)
                if contact.incarnation != self._incarnation:
                    self._incarnation = contact.incarnation
                    self.on_new_process(contact)
                self.on_contact(contact)
                self._contact = contact
                self._changed.notify_all()

    def _take(self, contact: Contact) -> None:
        if self.lasting:  # after an outage, the system would wait for ever longer before it tries again
            contact.connection.give_up_after(_UNCONFIRMED)

    def _give_up(self, reason: str) -> None:
        with self._changed:
            self._given_up, self._broken = True, reason
            self._changed.notify_all()

    def close(self) -> None:
        """Closes the connection for good."""
        with self._changed:
            self._given_up, self._broken = True, self._broken or "closed"
            if self._contact is not None:
                self._contact.connection.close()
                self._contact = None
            self._changed.notify_all()


__all__ = ["Contact", "Dial", "Line", "LineBrokenError", "Position", "at_start"]
