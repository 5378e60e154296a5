"""Receives messages from a neighbour before they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_sg.errors import BatchMismatchError, StageLostError, SyntheticGradientsError
from lightning_sg.transport.carrier import Carriers, on_stream
from lightning_sg.transport.connection import Connection
from lightning_sg.transport.line import Line, LineBrokenError
from lightning_sg.transport.message import (
    OF_BATCHES,
    Activations,
    Alive,
    Arrived,
    Copy,
    End,
    Failed,
    Gathered,
    Gathering,
    Message,
    Rejoined,
    Residual,
    Saved,
    Target,
    meeting_of,
    place_of,
)
from lightning_sg.transport.watch import Watch
from lightning_sg.words import first_line

#: What tells messages apart: their type, their number, and their place among those of this number.
_Key = tuple[type[Message], int, int]
Numbered = TypeVar("Numbered", Activations, Target, Residual, Gathering, Gathered, Copy)

_SLICE = 0.2  # seconds between two looks at what else may end a wait
_GRACE = 0.25  # of the timeout: for the error of a neighbour that waits for somebody itself


#: What to do where one process has come to a meeting and another has not, or to another one.
EVERY_PROCESS = (
    "What all processes do together, such as `trainer.save_checkpoint`, `strategy.broadcast` and `strategy.barrier`, "
    "every process must do, in the same order: not under `if trainer.is_global_zero`."
)


def never() -> bool:
    """Says of a message that is needed that nobody goes on without it."""
    return False


@dataclass
class Neighbour:
    """What is known of a neighbour.

    Attributes:
        name: Its name, for messages.
        doing: What it is doing, by its last message.
        waits: Whether it was waiting for a neighbour of its own.
        heard: When its last sign of life came, on the clock of this process's waits.
        meeting: The meeting that it has come to: its number and what it is for.
        may_return: Whether a new process may take its place.
        remark: What else there is to say if it is gone.
    """

    name: str
    doing: str = ""
    waits: bool = False
    heard: float = 0.0
    meeting: tuple[int, str] | None = None
    may_return: bool = False
    remark: str = ""


class Inbox:
    """Receives messages over a line in a thread of its own, so that the next are here before they are asked for.

    Attributes:
        sender: What is known of the sending stage.
        number: Of the last frame that has come.
        meeting: The number and the name of the last meeting of all stages that this process has come to.
        wants: The first batch whose activations have not come.
        on_heard: Is told how much the sender has heard of this process.
        on_saved: Is told which meetings the sender has saved.
        on_rejoined: Is told from which batch on a sender that was started anew takes part.

    Args:
        line: The connection.
        carriers: The ways of the tensors.
        sender: The sending stage.
        device: Where tensors are to be.
        watch: What this process does, how long it waits, and what else ends a wait.
    """

    def __init__(
        self,
        line: Line,
        carriers: Carriers,
        sender: Neighbour,
        device: torch.device,
        watch: Watch,
    ) -> None:
        self.number = 0
        self.meeting = 0, ""
        self.wants = 0
        self.on_heard: Callable[[int], None] = lambda number: None
        self.on_saved: Callable[[int], None] = lambda number: None
        self.on_rejoined: Callable[[int], None] = lambda number: None
        self._floor = 0  # of batches before this one nothing comes any more
        self._line = line
        self._carriers = carriers
        self.sender = sender
        self._device = device
        self._watch = watch
        sender.heard = watch.clock.now()
        self._messages: dict[_Key, tuple[Message, torch.cuda.Event | None]] = {}
        self._dropped: set[_Key] = set()
        self._newest: dict[type[Message], int] = {}  # the largest number of each type that has come
        self._lost: str | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._stream = carriers.host.stream()
        self._thread = threading.Thread(target=self._run, name=f"lightning_sg inbox from {sender.name}", daemon=True)

    def start(self) -> None:
        """Begins to receive."""
        self._thread.start()

    def receive(self, kind: type[Numbered], number: int, waiting_for: str) -> Numbered:
        """Returns the message of this kind about batch or meeting ``number``, waiting for it if need be.

        Args:
            kind: The type of message.
            number: The number of the batch or meeting.
            waiting_for: What the caller needs, for messages: "the target of training batch 17".

        Raises:
            StageLostError: If the sender is gone, failed, or did not send it within the timeout.
            BatchMismatchError: If the sender has no more batches.
        """
        message = self.receive_unless(kind, number, waiting_for, never)
        assert message is not None
        return message

    def receive_unless(
        self, kind: type[Numbered], number: int, waiting_for: str, goes_on: Callable[[], bool], place: int = 0
    ) -> Numbered | None:
        """See :meth:`receive`; ``None`` once ``goes_on`` says so, or if the sender was killed before it sent it.

        The message is dropped if it comes later. ``place`` is its crossing or part, see :func:`place_of`.
        """
        began = self._watch.clock.now()
        with self._changed:
            self._watch.waits = True
            try:
                while (kind, number, place) not in self._messages:
                    if kind in OF_BATCHES and number < self._floor:
                        return None
                    if goes_on():
                        self._dropped.add((kind, number, place))
                        return None
                    self._check(kind, number, waiting_for, self._watch.clock.now() - began)
                    self._changed.wait(min(_SLICE, self._watch.interval))
            finally:
                self._watch.waits = False
            message, event = self._messages.pop((kind, number, place))
        assert isinstance(message, kind)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
            for tensor in message.tensors:
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return message

    @property
    def lost(self) -> str | None:
        """Why the sender is lost, if it is."""
        return self._lost

    def check_here(self, what: str) -> None:
        """Looks after the sender while something else is waited for, to which it has to come.

        Args:
            what: What is waited for.

        Raises:
            StageLostError: If the sender is gone, failed, or has been silent for the timeout.
        """
        with self._changed:
            if self._lost is not None:
                raise StageLostError(f"{self._lost} This stage was waiting for {what}.", self._lost)
            if self.silent > self._watch.timeout:
                reason = f"{self.sender.name} did not come to {what}. {self._why_not(self.silent)}"
                raise StageLostError(reason, reason)
        self._watch.check()

    @property
    def silent(self) -> float:
        """For how many seconds in which this process ran there has been no sign of life."""
        return self._watch.clock.now() - self.sender.heard

    def begin_at(self, number: int) -> None:
        """One of the two processes was started anew: nothing comes of batches before this one, or is wanted."""
        with self._changed:
            self._floor = number
            self.wants = max(self.wants, number)
            self._changed.notify_all()

    def renew(self) -> None:
        """There is a new process in the sender's place, which counts its frames anew."""
        self.number = 0
        self.sender.meeting = None

    def come_to(self, meeting: int, what: str) -> None:
        """This process comes to a meeting: nothing of those before is wanted, such as a new process sends again."""
        with self._changed:
            self.meeting = meeting, what
            past = [key for key, (message, _event) in self._messages.items() if 0 < meeting_of(message) < meeting]
            for key in past:
                del self._messages[key]

    def forget(self) -> None:
        """Drops messages about batches that nobody has asked for, at the end of a run."""
        with self._changed:
            self._dropped.clear()
            self._newest.clear()
            self._messages = {key: value for key, value in self._messages.items() if key[0] not in OF_BATCHES}

    def check_meeting(self) -> None:
        """Compares what the two stages have come together for.

        Raises:
            SyntheticGradientsError: If the sender has come to another meeting.
        """
        theirs = self.sender.meeting
        if theirs is not None and theirs[0] == self.meeting[0] and theirs[1] != self.meeting[1]:
            raise SyntheticGradientsError(
                f"{self.sender.name} has come to '{theirs[1]}' and this stage to '{self.meeting[1]}'. {EVERY_PROCESS}"
            )

    def _check(self, kind: type[Message], number: int, waiting_for: str, waited: float) -> None:
        """Raises if there is no sense in waiting on."""
        sender, waiting = self.sender, f"This stage was waiting for {waiting_for}."
        if self._lost is not None:
            raise StageLostError(f"{self._lost} {waiting}", self._lost)
        if self._ended:
            raise StageLostError(f"{sender.name} has ended its run in good order. {waiting}{self._advice(kind)}")
        if kind in OF_BATCHES and sender.meeting is not None and sender.meeting[0] > self.meeting[0]:
            raise BatchMismatchError(
                f"{sender.name} has no more batches: it has come to '{sender.meeting[1]}' while this stage waits for "
                f"{waiting_for}. Every stage must be given the same batches: loaders of the same length, and no rank "
                "that calls `trainer.save_checkpoint`, `validate` and the like on its own."
            )
        self.check_meeting()
        if kind in (Activations, Target) and self._watch.away is None and number < self._newest.get(kind, 0):
            raise BatchMismatchError(
                f"{sender.name} has gone on to {sender.doing} without {waiting_for}. Every process must run the same "
                "code on the same batches: whether and how often a step runs the network may depend on the batch and "
                "its number, not on the process or on values that another stage computes."
            )
        self._watch.check()
        patience = self._watch.timeout
        silent = self.silent
        if sender.waits and silent < self._watch.timeout:
            patience += max(2.0, _GRACE * self._watch.timeout)
        if self._watch.away is not None:
            patience += self._watch.away.seconds
        if waited >= patience:
            raise StageLostError(
                f"{sender.name} did not send {waiting_for} within {self._watch.timeout:g} s. {self._why_not(silent)}"
                f"{self._advice(kind)}"
            )

    def _advice(self, kind: type[Message]) -> str:
        """What to look for if the sender has not come to a meeting of all stages to which this process has come."""
        if kind in OF_BATCHES or (self.sender.meeting is not None and self.sender.meeting[0] >= self.meeting[0]):
            return ""
        return f" {EVERY_PROCESS}"

    def _why_not(self, silent: float) -> str:
        sender = self.sender
        if silent > min(5.0, self._watch.timeout / 2):
            return (
                f"Nothing has been heard of it for {silent:.0f} s: its process is stopped, or its machine or the link "
                "to it is down."
            )
        doing = f", at {sender.doing}" if sender.doing else ""
        if sender.waits:
            return f"It is waiting for a neighbour itself{doing}."
        return (
            f"Its process runs{doing}: it hangs there, it was given fewer batches, or its batches take longer: raise "
            "SyntheticGradientStrategy(timeout=...) then."
        )

    def last_words(self, patience: float = 5.0) -> str | None:
        """Why the sender is lost, in its own words if it sent any; waits a moment for them."""
        self._thread.join(patience)
        return self._lost

    def join(self, timeout: float) -> bool:
        """Waits for the sender's last message; returns whether it came."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            with on_stream(self._stream):
                while self._take():
                    pass
        except LineBrokenError as error:
            self._lose(f"{self.sender.name} is gone: its connection closed ({first_line(error)}).{self.sender.remark}")
        except Exception as error:  # whatever it is, a waiting stage must hear of it
            self._lose(f"{self.sender.name} sent what cannot be read ({type(error).__name__}: {first_line(error)}).")

    def _take(self) -> bool:
        """Takes the next message; returns whether more are to come."""
        connection = self._line.current()
        try:
            number, heard, text = connection.receive()
            message = Message.decode(text)
            parts = self._parts(message, connection)
        except OSError as error:
            self._line.broke(connection, error)
            self._line.redial(self.number)
            return True
        self.on_heard(heard)
        self.sender.heard = self._watch.clock.now()
        if number and number <= self.number:
            return True  # the connection was made again, and this had come before
        self.number = number or self.number
        self._deliver(message, parts)
        return not isinstance(message, (End, Failed))

    def _parts(self, message: Message, connection: Connection) -> list[list[Tensor]]:
        carrier = self._carriers.way_of(message)
        parts = [spec.empty(carrier.device) for spec in message.specs]
        flat = [part for each in parts for part in each]
        if carrier.in_frame:
            connection.fill(flat)
        else:
            carrier.receive(flat)
        return parts

    def _deliver(self, message: Message, parts: list[list[Tensor]]) -> None:
        sender, key = self.sender, (type(message), message.number, place_of(message))
        with self._changed:
            sender.doing = message.doing or sender.doing
            sender.waits = isinstance(message, Alive) and message.waits
            if isinstance(message, Failed):
                self._lost = f"{sender.name} failed at {message.doing}: {message.reason.rstrip('.')}."
            elif isinstance(message, End):
                self._ended = True
            elif isinstance(message, Arrived):
                sender.meeting = (message.number, message.what)
            elif isinstance(message, Saved):
                self.on_saved(message.number)
            elif isinstance(message, Rejoined):
                self._floor = message.number
                self.on_rejoined(message.number)
            elif self._is_late(message):
                pass
            elif key in self._dropped:
                self._dropped.discard(key)
            elif isinstance(message, OF_BATCHES) and key in self._messages:
                what = type(message).__name__.lower()
                self._lost = f"{sender.name} sent the {what} of {message.doing} twice, so the stages are out of step."
            elif not isinstance(message, Alive):
                of_batch = isinstance(message, OF_BATCHES)
                device = self._device if of_batch else torch.device("cpu")
                message.tensors = [
                    spec.arrange([part.to(device) for part in each]) for spec, each in zip(message.specs, parts)
                ]
                event = self._stream.record_event() if self._stream is not None and of_batch else None
                self._messages[key] = (message, event)
                self._newest[type(message)] = max(message.number, self._newest.get(type(message), 0))
            self._changed.notify_all()

    def _is_late(self, message: Message) -> bool:
        """Whether nobody waits for a message, as one of the two processes was started anew."""
        if isinstance(message, Activations):
            self.wants = max(self.wants, message.number + 1)
        if isinstance(message, OF_BATCHES):
            return message.number < self._floor
        return 0 < meeting_of(message) < self.meeting[0]

    def _lose(self, reason: str) -> None:
        with self._changed:
            self._lost = f"{reason} Its own output says why."
            self._changed.notify_all()


__all__ = ["EVERY_PROCESS", "Inbox", "Neighbour", "never"]
