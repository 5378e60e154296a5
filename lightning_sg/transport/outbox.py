"""Sends messages to a neighbour without waiting for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_sg.errors import StageLostError
from lightning_sg.transport.carrier import Carriers
from lightning_sg.transport.line import Contact, Line, LineBrokenError
from lightning_sg.transport.message import Activations, Alive, Message, meeting_of
from lightning_sg.words import first_line

_ALIVE = 0  # the number of frames that need not arrive


@dataclass(frozen=True)
class _Frame:
    """One message as it goes over the line.

    Attributes:
        number: Counts the frames of this outbox, from 1.
        text: The message but for its tensors.
        tensors: Its tensors.
        meeting: The meeting that it belongs to; 0 for none.
        batch: The batch whose activations it has; -1 for other messages.
    """

    number: int
    text: bytes
    tensors: Sequence[Tensor]
    meeting: int = 0
    batch: int = -1


class Outbox:
    """Sends messages in a thread of its own; no send waits for the receiver.

    The stages' bookkeeping bounds how many are under way.

    Args:
        line: The connection.
        carriers: The ways of the tensors.
        to: The receiving stage's name, for messages.
        alive: The message that says that this process runs; sent when there has been nothing else to send. ``None``
            for now has nothing said.
        every: After how many seconds.
        heard: The number of the last frame that has come from there.
    """

    def __init__(
        self,
        line: Line,
        carriers: Carriers,
        to: str,
        alive: Callable[[], Alive | None],
        every: float,
        heard: Callable[[], int],
    ) -> None:
        self.to = to
        self._line = line
        self._carriers = carriers
        self._alive = alive
        self._every = every
        self._heard = heard
        self._changed = threading.Condition()
        self._waiting: deque[_Frame] = deque()
        self._sent: deque[_Frame] = deque()  # what the receiver may still have to be sent again
        self._count = 0
        self._heard_there = 0
        self._saved = 0
        self._next_batch = 0
        self._contacts = 0  # how often the connection was made again
        self._error: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"lightning_sg outbox to {to}", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Sends ``message``; its tensors must not change afterwards.

        Raises:
            StageLostError: If the receiving process is gone.
        """
        parts = [part for spec, tensor in zip(message.specs, message.tensors) for part in spec.parts(tensor)]
        carrier = self._carriers.way_of(message)
        tensors = [part.to(carrier.device) for part in parts]
        with self._changed:
            if self._error is not None:
                what = message.doing or f"the message '{type(message).__name__.lower()}'"
                raise StageLostError(
                    f"{self.to} is gone: {what} could not be sent to it ({self._error}). Its own output says why."
                )
            self._count += 1
            in_frame = tensors if carrier.in_frame else []
            batch = message.number if isinstance(message, Activations) else -1
            self._next_batch = max(self._next_batch, batch + 1)
            self._waiting.append(_Frame(self._count, message.encode(), in_frame, meeting_of(message), batch))
            self._changed.notify_all()
        carrier.send(tensors)

    def heard(self, number: int) -> None:
        """The receiver has everything up to this frame."""
        with self._changed:
            self._heard_there = max(self._heard_there, number)
            self._forget()

    def saved(self, meeting: int) -> None:
        """The receiver needs nothing of this meeting and those before it again, even started anew."""
        with self._changed:
            self._saved = meeting
            self._forget()

    @property
    def first_batch(self) -> int:
        """The first batch whose activations can still be sent."""
        with self._changed:
            heard = self._heard_there
            kept = [each.batch for each in (*self._sent, *self._waiting) if each.batch >= 0 and each.number > heard]
            return min(kept, default=self._next_batch)

    def start_at(self, batch: int) -> None:
        """This process was started anew: its first activations are those of this batch."""
        self._next_batch = batch

    def renew(self) -> None:
        """There is a new process in the receiver's place: what it has not seen of a meeting goes to it, too."""
        with self._changed:
            self._heard_there = 0

    def _forget(self) -> None:
        """Drops what the receiver has, but what a new process in its place would have to be told again."""
        if not self._line.renewable:
            while self._sent and self._sent[0].number <= self._heard_there:
                self._sent.popleft()
        elif self._sent and self._sent[0].number <= self._heard_there:
            self._sent = deque(each for each in self._sent if self._wanted(each))

    def _wanted(self, frame: _Frame) -> bool:
        return frame.number > self._heard_there or frame.meeting > self._saved

    def again(self, contact: Contact) -> None:
        """There is a new connection: what the receiver has not heard goes over it once more."""
        with self._changed:
            self._contacts += 1
            kept: deque[_Frame] = deque()
            while self._sent:
                frame = self._sent.pop()
                if frame.number > contact.heard:
                    self._waiting.appendleft(frame)
                elif self._line.renewable and frame.meeting > self._saved:
                    kept.appendleft(frame)
            self._sent = kept
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Waits until everything has been handed to the system; returns whether it was within so many seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._waiting and self._error is None:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._changed.wait(remaining)
        return self._error is None

    def close(self) -> None:
        """Ends the thread; what has not been sent is not sent any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout: float) -> None:
        """Waits for the thread to end, after :meth:`close`."""
        self._thread.join(timeout)

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            while True:
                connection = self._line.current()  # first: a new one may bring frames that go before the next
                contacts = self._contacts
                frame = self._next()
                if frame is None:
                    return
                try:
                    connection.send(frame.number, self._heard(), frame.text, frame.tensors)
                except OSError as error:
                    self._line.broke(connection, error)
                    continue  # the frame still waits
                self._done(frame, contacts)
        except LineBrokenError as error:
            reason = first_line(error)
        except Exception as error:  # whatever it is, who sends must hear of it
            reason = first_line(error)
        with self._changed:
            self._error = reason
            self._changed.notify_all()

    def _next(self) -> _Frame | None:
        """The next frame to send, which stays where it is until it has been sent; ``None`` at the end."""
        with self._changed:
            while not self._closed:
                if not self._waiting:
                    self._changed.wait(self._every)
                if self._closed:
                    break
                if self._waiting:
                    return self._waiting[0]
                alive = self._alive()
                if alive is not None:
                    return _Frame(_ALIVE, alive.encode(), [])
            return None

    def _done(self, frame: _Frame, contacts: int) -> None:
        with self._changed:
            if contacts != self._contacts:  # sent over a connection that has broken since
                return
            if self._waiting and self._waiting[0] is frame:
                self._waiting.popleft()
                if self._line.lasting:
                    self._sent.append(frame)
                if not self._waiting:
                    self._changed.notify_all()


__all__ = ["Outbox"]
