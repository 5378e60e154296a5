"""The end of this process's stages: activations go out, targets and exact gradients come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg.crossings.kept_graph import KeptGraph
from lightning_sg.distributed.absence import Absence
from lightning_sg.distributed.inlet import Inlet
from lightning_sg.distributed.mismatch import mismatch, other_end
from lightning_sg.distributed.status import ProcessStatus, Stopping
from lightning_sg.session import Session
from lightning_sg.training.base import BoundaryTrainer, Profile
from lightning_sg.training.record import Record
from lightning_sg.transport import Downstream, Message, Residual, Target, never


class Outlet(Protocol):
    """What a stage can do towards the stage after it.

    Attributes:
        boundary: The boundary between the two; ``None`` for the last stage.
    """

    boundary: str | None

    @property
    def untaught(self) -> int:
        """How many batches have gone on without a target, as the next stage was away."""

    @property
    def trainer(self) -> BoundaryTrainer:
        """Supplies the gradient at the boundary."""

    def send(self, message: Message) -> None:
        """Sends activations on."""

    def expect(self, record: Record, number: int, kept: KeptGraph | None) -> None:
        """A batch is about to be sent, whose target and perhaps exact gradient will come back."""

    def await_target(self, record: Record) -> None:
        """Brings in the target of a batch, whether it is due or not."""

    def await_answers(self, number: int | None, most: int) -> None:
        """Bounds how far this process is ahead where no prediction does."""


class NoOutlet:
    """The last stage has none after it."""

    boundary: str | None = None
    untaught = 0

    @property
    def trainer(self) -> BoundaryTrainer:
        """Cannot be asked for."""
        raise AssertionError("the last stage sends nothing")

    def send(self, message: Message) -> None:
        """Cannot be asked for."""
        raise AssertionError("the last stage sends nothing")

    def expect(self, record: Record, number: int, kept: KeptGraph | None) -> None:
        """Does nothing."""

    def await_target(self, record: Record) -> None:
        """Does nothing."""

    def await_answers(self, number: int | None, most: int) -> None:
        """Does nothing."""


class DownstreamOutlet:
    """The end of a stage that another one follows.

    Args:
        boundary: The boundary between the two.
        trainer: Supplies the gradient there; its targets come from the next stage from now on.
        channel: The connection to the next stage.
        targets: Where targets and exact gradients come from.
    """

    def __init__(self, boundary: str, trainer: BoundaryTrainer, channel: AnswerChannel, targets: RemoteTargets) -> None:
        self.boundary: str | None = boundary
        self.trainer = trainer
        self._channel = channel
        self._targets = targets
        trainer.targets = targets

    @property
    def untaught(self) -> int:
        """See :attr:`Outlet.untaught`."""
        return self._channel.absence.total

    def send(self, message: Message) -> None:
        """See :meth:`Outlet.send`."""
        self._channel.send(message)

    def expect(self, record: Record, number: int, kept: KeptGraph | None) -> None:
        """See :meth:`Outlet.expect`."""
        self._targets.expect(record, number, kept)

    def await_target(self, record: Record) -> None:
        """See :meth:`Outlet.await_target`."""
        self._targets.target(record)

    def await_answers(self, number: int | None, most: int) -> None:
        """See :meth:`Outlet.await_answers`."""
        self._channel.await_answers(number, most)


class AnswerChannel:
    """The connection to the next stage: activations go out, answers come back.

    Args:
        link: The connection.
        status: Names this process and what it is doing.
        stopping: Wishes to stop come with the targets.
        profile: Shows waiting and sending to the trainer's profiler.
    """

    def __init__(self, link: Downstream, status: ProcessStatus, stopping: Stopping, profile: Profile) -> None:
        self.absence = Absence(link, status, "targets")
        self._link = link
        self._status = status
        self._stopping = stopping
        self.profile = profile
        self._unconfirmed: deque[int] = deque()

    def send(self, message: Message) -> None:
        """Sends activations on."""
        with self.profile(profiling.SEND):
            self._link.send(message)

    def take_target(self, number: int, *, needed: bool = True) -> tuple[Tensor, ...] | None:
        """Waits for the next stage's answer to a batch: the targets, or nothing.

        Args:
            number: The number of the batch.
            needed: Whether this stage cannot go on without; otherwise it does, while the next stage is away.

        Returns:
            ``None`` if the stage goes on without the answer.

        Raises:
            BatchMismatchError: If the batch was the last of one of the two stages only.
        """
        answer = self._answer(number, self._goes_on(needed))
        if answer is None:
            self.absence.went_on()
        return answer

    def _answer(self, number: int, goes_on: Callable[[], bool]) -> tuple[Tensor, ...] | None:
        words = f"the target of {self._status.whose(number)}"
        with self.profile(profiling.WAIT_TARGET):
            message = self._link.inbox.receive_unless(Target, number, words, goes_on)
        if message is None:
            return None
        self.absence.answered()
        differences = other_end(message.last, self._status.places[number].last)
        if differences:
            raise mismatch(self._status, self._link.neighbour, [f"of {message.doing}, {differences[0]}"])
        self._stopping.wanted = self._stopping.wanted or message.stop
        return tuple(message.tensors)

    def take_residual(self, number: int) -> tuple[Tensor, ...] | None:
        """Waits for exact minus target gradient of a batch; nothing if they are equal, ``None`` if it is not known."""
        words = f"an exact gradient ({self._status.doing} is going on)"
        with self.profile(profiling.WAIT_EXACT):
            message = self._link.inbox.receive_unless(Residual, number, words, self.absence.goes_on)
        return None if message is None or message.missing else tuple(message.tensors)

    def _goes_on(self, needed: bool) -> Callable[[], bool]:
        return never if needed else self.absence.goes_on

    def await_answers(self, number: int | None, most: int) -> None:
        """Bounds how far this process is ahead where no prediction does: waits for answers to earlier batches.

        Args:
            number: A batch that was sent without a prediction, or ``None``.
            most: How many of these may be unanswered.
        """
        if number is not None:
            self._unconfirmed.append(number)
        while len(self._unconfirmed) > most:
            self._answer(self._unconfirmed.popleft(), never)


@dataclass
class _Sent:
    """A batch whose exact gradient has not come back yet.

    Attributes:
        number: The number of the batch, for the neighbours.
        batch: The number of the training batch, for corrections.
        kept: Its graph.
    """

    number: int
    batch: int
    kept: KeptGraph


class RemoteTargets:
    """The source of targets where the next stage is in another process.

    Args:
        channel: The connection to the next stage.
        inlet: Where residuals are passed on to.
        session: Holds the corrections that exact gradients bring.
        is_exact: Whether the next stage's targets are exact.
        device_type: That of this process's device.
    """

    def __init__(
        self, channel: AnswerChannel, inlet: Inlet, session: Session, *, is_exact: bool, device_type: str
    ) -> None:
        self._channel = channel
        self._inlet = inlet
        self._session = session
        self._is_exact = is_exact
        self._device_type = device_type
        self._targets: dict[int, int] = {}  # by step, the number of the batch whose target is to come
        self._unanswered: set[int] = set()  # the steps that went on without a target
        self._exact: dict[int, _Sent] = {}  # by step, the batch whose exact gradient is to come

    def expect(self, record: Record, number: int, kept: KeptGraph | None) -> None:
        """A batch is about to be sent.

        Args:
            record: The batch at the boundary.
            number: Its number for the neighbours.
            kept: Its graph, if its exact gradient is asked for.
        """
        self._targets[record.step] = number
        if kept is not None:
            self._exact[record.step] = _Sent(number, self._session.current.number, kept)

    def target(self, record: Record) -> None:
        """See :meth:`TargetSource.target`."""
        number = self._targets.pop(record.step, None)
        if number is None:
            return
        gradients = self._channel.take_target(number, needed=record.coupled)
        if gradients is None:
            self._unanswered.add(record.step)
        # A stage that has gone ahead on predicted inputs could not know whether the target is wanted.
        if gradients and record.wants_target:
            record.add_target(gradients)

    def exact(self, record: Record) -> None:
        """Takes the exact gradient through this process's stages, and passes what is left of it on upstream."""
        sent = self._exact.pop(record.step, None)
        if sent is None:
            return
        self.target(record)
        gradients = () if self._is_exact else self._channel.take_residual(sent.number)
        if record.step in self._unanswered or gradients is None:
            self._unanswered.discard(record.step)
            self._inlet.send_no_residual(sent.number, sent.kept.leaves)
            return
        if self._is_exact:
            record.exact_targets = record.targets
        elif gradients:
            record.add_residual(gradients)
        with self._channel.profile(profiling.EXACT), torch.autocast(self._device_type, enabled=False):
            residual, corrections = sent.kept.backward(record, self._session.corrected())
        self._inlet.send_residual(sent.number, sent.kept.leaves, residual)
        self._session.hold_corrections(sent.batch, corrections)


__all__ = ["Outlet", "RemoteTargets"]
