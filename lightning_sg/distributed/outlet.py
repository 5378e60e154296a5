"""The end of this process's stages: activations go out, targets and exact gradients come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lightning_sg import profiling
from lightning_sg.crossings.kept_graph import KeptGraph
from lightning_sg.distributed.absence import Absence
from lightning_sg.distributed.inlet import Inlet, Residuals
from lightning_sg.distributed.mismatch import mismatch, other_count, other_end
from lightning_sg.distributed.status import ProcessStatus, Stopping
from lightning_sg.precision import without_autocast
from lightning_sg.predictors.base import Gradients
from lightning_sg.session import Session
from lightning_sg.training.base import BoundaryTrainer, Profile
from lightning_sg.training.record import Record, TargetPlan
from lightning_sg.transport import Activations, Downstream, Message, Residual, Target, never, split


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

    def expect(self, sent: Sent) -> None:
        """A batch is about to be sent, whose targets and perhaps exact gradients will come back."""

    def await_targets(self, sent: Sent) -> list[Gradients | None]:
        """Brings in the next answer to a batch, whether it is due or not: the target of each record, or its part."""

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

    def expect(self, sent: Sent) -> None:
        """Does nothing."""

    def await_targets(self, sent: Sent) -> list[Gradients | None]:
        """Cannot be asked for."""
        raise AssertionError("the last stage sends nothing")

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

    def expect(self, sent: Sent) -> None:
        """See :meth:`Outlet.expect`."""
        self._targets.expect(sent)

    def await_targets(self, sent: Sent) -> list[Gradients | None]:
        """See :meth:`Outlet.await_targets`."""
        return self._targets.take_next(sent)

    def await_answers(self, number: int | None, most: int) -> None:
        """See :meth:`Outlet.await_answers`."""
        self._channel.await_answers(number, most)


@dataclass
class Sent:
    """A training batch whose targets, and perhaps exact gradients, have not come back yet.

    Attributes:
        number: Its number, for the neighbours.
        batch: The number of the training batch, for corrections.
        records: Of its crossings that carry a gradient, so far.
        places: For each of these, which of all its crossings it is.
        plan: What it does about targets.
        kept: Its graph, if its exact gradient goes through it.
        answers: How many answers have come.
        known: How many crossings that had come in have gone backward, so that they have exact gradients.
    """

    number: int
    batch: int
    records: list[Record]
    plan: TargetPlan = TargetPlan()
    places: list[int] = field(default_factory=list)
    kept: KeptGraph | None = None
    answers: int = 0
    known: int = 0

    @property
    def coupled(self) -> bool:
        """Whether the stage waits for its targets and uses them."""
        return any(record.coupled for record in self.records)

    def of_each(self, tensors: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """What belongs to each record, of what belongs to each crossing."""
        return [tensors[place] for place in self.places]

    def residuals(self, leaves: Sequence[Tensor | None] = ()) -> list[Residuals]:
        """What is passed on to the stage before: for each crossing of its boundary, the residuals of the leaves.

        Args:
            leaves: The residual of each leaf of the kept graph.
        """
        assert self.kept is not None
        remaining, found = iter(leaves), []
        for number, received in enumerate(self.kept.received):
            parts = [each for _leaf, each in zip(received, remaining)]
            found.append(Residuals(received, parts if number < self.known else ()))
        return found


class AnswerChannel:
    """The connection to the next stage: activations go out, answers come back.

    Args:
        boundary: The boundary between the two.
        link: The connection.
        status: Names this process and what it is doing.
        stopping: Wishes to stop come with the targets.
        profile: Shows waiting and sending to the trainer's profiler.
    """

    def __init__(
        self, boundary: str, link: Downstream, status: ProcessStatus, stopping: Stopping, profile: Profile
    ) -> None:
        self.absence = Absence(link, status, "targets")
        self._boundary = boundary
        self._link = link
        self._status = status
        self._stopping = stopping
        self.profile = profile
        self._unconfirmed: deque[int] = deque()
        self._crossings: dict[int, int] = {}  # by number, how often a batch has been sent on

    def send(self, message: Message) -> None:
        """Sends activations on."""
        if isinstance(message, Activations) and not message.ended:
            self._crossings[message.number] = message.crossing + 1
        with self.profile(profiling.SEND):
            self._link.send(message)

    def take_targets(self, number: int, part: int = 0, *, needed: bool = True) -> list[tuple[Tensor, ...]] | None:
        """Waits for the next stage's answer to a batch: for each crossing the targets, or nothing.

        Args:
            number: The number of the batch.
            part: How many answers to it have come before.
            needed: Whether this stage cannot go on without; otherwise it does, while the next stage is away.

        Returns:
            ``None`` if the stage goes on without the answer.

        Raises:
            BatchMismatchError: If the batch was the last of one of the two stages only.
            BoundaryError: If the next stage has taken it another number of times than it was sent.
        """
        answer = self._answer(number, self._goes_on(needed), part)
        if answer is None:
            self.absence.went_on()
        return answer

    def _answer(self, number: int, goes_on: Callable[[], bool], part: int = 0) -> list[tuple[Tensor, ...]] | None:
        words = f"the target of {self._status.whose(number)}"
        with self.profile(profiling.WAIT_TARGET):
            message = self._link.inbox.receive_unless(Target, number, words, goes_on, part)
        if message is None:
            return None
        self.absence.answered()
        differences = other_end(message.last, self._status.places[number].last)
        if differences:
            raise mismatch(self._status, self._link.neighbour, [f"of {message.doing}, {differences[0]}"])
        if self._crossings.get(number, 0) != len(message.counts):
            raise other_count(self._status, self._link.neighbour, self._boundary, len(message.counts))
        self._stopping.wanted = self._stopping.wanted or message.stop
        return split(message.tensors, message.counts)

    def take_residuals(self, number: int) -> list[tuple[Tensor, ...]] | None:
        """Waits for a batch's :class:`Residual`, for each crossing its own; nothing of one that has none.

        Args:
            number: The number of the batch.

        Returns:
            ``None`` if they are not known.
        """
        words = f"an exact gradient ({self._status.doing} is going on)"
        with self.profile(profiling.WAIT_EXACT):
            message = self._link.inbox.receive_unless(Residual, number, words, self.absence.goes_on)
        return None if message is None or message.missing else split(message.tensors, message.counts)

    def forget(self, number: int) -> None:
        """No answer to this batch will be asked for any more."""
        self._crossings.pop(number, None)

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
            earlier = self._unconfirmed.popleft()
            self._answer(earlier, never)
            self.forget(earlier)


class RemoteTargets:
    """The source of targets where the next stage is in another process: one answer has those of a whole batch.

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
        self._under_way: dict[int, Sent] = {}  # by step, the batches whose targets are to come
        self._unanswered: set[int] = set()  # the steps that went on without targets
        self._exact: dict[int, Sent] = {}  # by step, the batches whose exact gradients are to come

    def expect(self, sent: Sent) -> None:
        """A batch is about to be sent; its first record is there."""
        step = sent.records[0].step
        self._under_way[step] = sent
        if sent.plan.exact:
            self._exact[step] = sent

    def target(self, record: Record) -> None:
        """See :meth:`TargetSource.target`; brings the targets of all crossings of the batch."""
        sent = self._under_way.get(record.step)
        if sent is not None and not sent.answers:
            self.take_next(sent)
        self._under_way.pop(record.step, None)
        if sent is not None:
            self._channel.forget(sent.number)

    def take_next(self, sent: Sent) -> list[Gradients | None]:
        """Takes the next answer to a batch; see :meth:`Outlet.await_targets`."""
        answer = self._channel.take_targets(sent.number, sent.answers, needed=sent.coupled)
        sent.answers += 1
        if answer is None:
            self._unanswered.add(sent.records[0].step)
            return [None for _ in sent.records]
        found: list[Gradients | None] = []
        for record, gradients in zip(sent.records, sent.of_each(answer)):
            # A stage that has gone ahead on predicted inputs could not know whether the target is wanted.
            wanted = bool(gradients) and record.wants_target
            if wanted:
                record.add_target(gradients)
            found.append(record.per_sample(gradients) if wanted else None)
        return found

    def exact(self, record: Record) -> None:
        """Takes the exact gradients through this process's stages, and passes what is left of them on upstream."""
        sent = self._exact.pop(record.step, None)
        if sent is None:
            return
        self.target(record)
        residuals = None if self._is_exact else self._channel.take_residuals(sent.number)
        missing = record.step in self._unanswered or (residuals is None and not self._is_exact)
        self._unanswered.discard(record.step)
        if missing and sent.kept is not None:
            self._inlet.send_no_residual(sent.number, sent.residuals())
        if missing:
            return
        if residuals is None:
            for each in sent.records:
                each.exact_targets = each.targets
        elif residuals:
            for each, gradients in zip(sent.records, sent.of_each(residuals)):
                if gradients and sent.plan.whole:
                    each.add_exact(gradients)
                elif gradients:
                    each.add_residual(gradients)
        if sent.kept is None:
            return
        with self._channel.profile(profiling.EXACT), without_autocast(self._device_type):
            found, applied = sent.kept.backward(sent.records, self._session.applied_late(sent.plan.applies))
        self._inlet.send_residual(sent.number, sent.residuals(found))
        self._session.hold_late(sent.batch, applied)


__all__ = ["AnswerChannel", "DownstreamOutlet", "NoOutlet", "Outlet", "RemoteTargets", "Sent"]
