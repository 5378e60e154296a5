"""The connection to a neighbouring stage: activations go down, targets and residuals come up."""

from __future__ import annotations

import logging
from contextlib import suppress

import torch

from lightning_sg.errors import StageLostError
from lightning_sg.transport.away import Away
from lightning_sg.transport.carrier import Carrier, Carriers
from lightning_sg.transport.clock import RunningClock
from lightning_sg.transport.inbox import Inbox, Neighbour
from lightning_sg.transport.line import Contact, Dial, Line, Position
from lightning_sg.transport.message import Alive, Arrived, End, Failed, Message, Rejoined
from lightning_sg.transport.outbox import Outbox
from lightning_sg.transport.watch import Watch

_log = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds for last words; a neighbour that hangs does not take them
_ENDING = 1.0  # seconds for threads whose connection is closed


class Link:
    """One end of the connection to a neighbour.

    Attributes:
        outbox: Messages to the neighbour.
        inbox: Messages from the neighbour.
        position: Where the neighbour was when this process met it.

    Args:
        dial: Makes the connection.
        contact: The first connection.
        neighbour: What is known of the neighbour.
        device: Where tensors are to be.
        watch: What this process does, and what else may end a wait.
    """

    def __init__(self, dial: Dial, contact: Contact, neighbour: Neighbour, device: torch.device, watch: Watch) -> None:
        self._dial = dial
        self._neighbour = neighbour
        self._watch = watch
        self._carriers = carriers = Carriers(device)
        patience = 0.0 if watch.away is None else watch.away.seconds
        self.position = contact.position
        self._line = Line(dial, contact, patience, renewable=neighbour.may_return)
        self.inbox = Inbox(self._line, carriers, neighbour, device, watch)
        self.outbox = Outbox(
            self._line, carriers, neighbour.name, self._alive, watch.interval, lambda: self.inbox.number
        )
        self._line.on_contact = self.outbox.again
        self._line.on_new_process = self._renew
        self.inbox.on_heard = self.outbox.heard
        self.inbox.on_saved = self.outbox.saved
        self.inbox.on_rejoined = self._say_from_where
        dial.position = lambda: Position(self.inbox.wants, self.outbox.first_batch)
        self.inbox.start()

    @property
    def neighbour(self) -> str:
        """The neighbour's name, for messages."""
        return self._neighbour.name

    @neighbour.setter
    def neighbour(self, name: str) -> None:
        self._neighbour.name = self.outbox.to = name

    @property
    def away(self) -> Away | None:
        """How long the neighbour may be silent; ``None`` for not at all."""
        return self._watch.away

    @property
    def clock(self) -> RunningClock:
        """What the neighbour's silence is measured by."""
        return self._watch.clock

    def carry(self, carrier: Carrier) -> None:
        """Has the tensors of batches take another way from now on; nothing about batches may be under way."""
        self._carriers.of_batches = carrier

    def begin_at(self, batch: int) -> None:
        """This process was started anew, and takes part from a batch on; tells the neighbour."""
        self.inbox.begin_at(batch)
        self.outbox.start_at(batch)
        self.send(Rejoined(number=batch))

    def _renew(self, contact: Contact) -> None:
        self.inbox.renew()
        self.outbox.renew()

    def _say_from_where(self, batch: int) -> None:
        _log.warning(
            "%s was started anew and is back. What it had not sent of its batches before number %d (training and "
            "evaluation count together) does not come: these are trained without it.",
            self.neighbour,
            batch,
        )

    def _alive(self) -> Alive | None:
        self.clock.now()  # while nobody else reads it, as this process computes
        if self._watch.returning:
            return None  # it goes on without this process for as long as it may
        return Alive(doing=self._watch.doing, waits=self._watch.waits)

    def send(self, message: Message) -> None:
        """Sends a message.

        Raises:
            StageLostError: If the neighbour is gone; with its own words, if it had time for any.
        """
        try:
            self.outbox.send(message)
        except StageLostError as error:
            reason = self.inbox.last_words()
            if reason is None:
                raise
            what = message.doing or f"The message '{type(message).__name__.lower()}'"
            raise StageLostError(f"{reason} {what} could not be sent to it.") from error

    def arrive(self, number: int, what: str, doing: str) -> None:
        """Tells the neighbour that this process has come to a meeting."""
        self.inbox.come_to(number, what)
        self.send(Arrived(number=number, what=what, doing=doing))

    def close(self, timeout: float) -> None:
        """Ends the conversation in good order: both sides have heard everything.

        Args:
            timeout: How many seconds the neighbour may take.

        Raises:
            StageLostError: If it does not end within them.
        """
        with suppress(StageLostError):  # it may be gone already, in good order
            self.outbox.send(End())
        self.outbox.flush(timeout)
        ended = self.inbox.join(timeout)
        self.outbox.close()
        self._dial.close()
        if not ended:
            raise StageLostError(f"{self.neighbour} did not end within {timeout:g} s: it is still at work, or hangs.")
        self._line.close()

    def leave(self) -> None:
        """Tells the neighbour that this process ends, and has no thread at work in torch when Python is gone."""
        self._say_last(End())
        self.outbox.close()
        self._dial.close()
        self._line.close()
        self.inbox.join(_ENDING)
        self.outbox.join(_ENDING)

    def fail(self, doing: str, reason: str) -> None:
        """Tells the neighbour why this process stops; a neighbour that is gone too need not know."""
        self._say_last(Failed(doing=doing, reason=reason))

    def _say_last(self, message: Message) -> None:
        with suppress(Exception):
            self.outbox.send(message)
            self.outbox.flush(_PATIENCE)


class Upstream(Link):
    """The connection to the process with the stage before this one."""


class Downstream(Link):
    """The connection to the process with the stage after this one."""


__all__ = ["Downstream", "Link", "Upstream"]
