"""The start of this process's stages: activations come in, targets and residuals go back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg.distributed.absence import Absence
from lightning_sg.distributed.first_uses import FirstUses
from lightning_sg.distributed.mismatch import mismatch, other_count, other_place, other_shapes
from lightning_sg.distributed.skipping import BatchSkipped
from lightning_sg.distributed.stage import Stage
from lightning_sg.distributed.status import Place
from lightning_sg.training.base import Profile
from lightning_sg.transport import Activations, Compression, Residual, Target, Upstream, never

Shapes = list[tuple[int, ...]]
#: The targets of each crossing of a batch.
Targets = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Residuals:
    """What one crossing of a batch has to add to its target; where that is applied whole, the exact gradient itself.

    Attributes:
        leaves: What was received and carries a gradient.
        parts: For each of these, exact minus target gradient of the mean loss, or the exact one; ``None`` for zero.
            Empty if they are not known.
    """

    leaves: Sequence[Tensor]
    parts: Sequence[Tensor | None] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """The residual as it is sent."""
        return [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(self.leaves, self.parts)]


class Inlet(Protocol):
    """What a stage can do towards the stage before it."""

    boundary: str | None

    @property
    def neighbour(self) -> str:
        """The stage before it, in words."""

    def take(self, number: int, fingerprint: int, shapes: Shapes, crossing: int = 0) -> Activations:
        """Waits for the activations of a batch, in its crossing of that number."""

    def take_late(self, number: int, fingerprint: int, shapes: list[tuple[int, ...]]) -> Activations | None:
        """Waits for the activations of a batch that has gone on without; ``None`` if the stage before is away."""

    def await_end(self, number: int, crossing: int) -> None:
        """Waits until the stage before has said that a batch has no more crossings."""

    def reply(self, number: int, targets: Targets, part: int = 0) -> None:
        """Answers a batch with its targets, for each crossing its own or none."""

    def send_residual(self, number: int, residuals: Sequence[Residuals]) -> None:
        """Tells the stage before what the exact gradient of a batch is, or what it is relative to the target sent."""

    def send_no_residual(self, number: int, residuals: Sequence[Residuals]) -> None:
        """Tells the stage before that the exact gradient of a batch will not come."""


class NoInlet:
    """The first stage has none before it."""

    boundary: str | None = None
    neighbour = ""

    def take(self, number: int, fingerprint: int, shapes: Shapes, crossing: int = 0) -> Activations:
        """Cannot be asked for."""
        raise AssertionError("the first stage receives nothing")

    def take_late(self, number: int, fingerprint: int, shapes: list[tuple[int, ...]]) -> Activations | None:
        """Cannot be asked for."""
        raise AssertionError("the first stage receives nothing")

    def await_end(self, number: int, crossing: int) -> None:
        """Does nothing."""

    def reply(self, number: int, targets: Targets, part: int = 0) -> None:
        """Does nothing."""

    def send_residual(self, number: int, residuals: Sequence[Residuals]) -> None:
        """Does nothing."""

    def send_no_residual(self, number: int, residuals: Sequence[Residuals]) -> None:
        """Does nothing."""


class UpstreamInlet:
    """The connection to the stage before.

    Args:
        boundary: The boundary between the two.
        is_exact: Whether the targets sent there are exact, so that there is no residual.
        link: The connection.
        stage: This process: its status, its wishes to stop, the metrics that pass through, the trainer's profiler.
        compression: How targets and residuals travel.
        first_uses: What earlier stages use for the first time comes with the activations.
    """

    def __init__(
        self,
        boundary: str,
        is_exact: bool,
        link: Upstream,
        stage: Stage,
        compression: Compression,
        first_uses: FirstUses,
    ) -> None:
        self.absence = Absence(link, stage.status, "activations")
        self.boundary: str | None = boundary
        self._is_exact = is_exact
        self._link = link
        self._status = stage.status
        self._stopping = stage.stopping
        self._metrics = stage.metrics
        self._compression = compression
        self._profile: Profile = stage.profiler.profile
        self._first_uses = first_uses

    @property
    def neighbour(self) -> str:
        """See :attr:`Inlet.neighbour`."""
        return self._link.neighbour

    def take(self, number: int, fingerprint: int, shapes: Shapes, crossing: int = 0) -> Activations:
        """Waits for the activations of a batch, and takes what else the stage before had to say.

        Args:
            number: The number of the batch.
            fingerprint: Of the batch as this process was given it.
            shapes: That the activations must have.
            crossing: How often the batch has crossed the boundary before.

        Raises:
            BatchMismatchError: If the stage before was given another batch.
            BoundaryError: If its step has crossed the boundary less often.
            StageLostError: If it is gone or does not send.
            BatchSkipped: If it has none, as it or one before it was started anew.
        """
        with self._profile(profiling.WAIT_ACTIVATIONS):
            words = self._whose(number, crossing)
            message = self._link.inbox.receive_unless(Activations, number, words, never, crossing)
        if message is None or message.skipped:
            raise BatchSkipped
        if message.ended:
            raise other_count(self._status, self._link.neighbour, str(self.boundary), crossing, message.ended)
        return self._taken(message, fingerprint, shapes)

    def take_late(self, number: int, fingerprint: int, shapes: list[tuple[int, ...]]) -> Activations | None:
        """See :meth:`Inlet.take_late`."""
        inbox, absence = self._link.inbox, self.absence
        with self._profile(profiling.WAIT_ACTIVATIONS):
            message = inbox.receive_unless(Activations, number, self._whose(number), absence.goes_on)
        if message is None or message.skipped:
            absence.went_on()
            return None
        absence.answered()
        return self._taken(message, fingerprint, shapes)

    def await_end(self, number: int, crossing: int) -> None:
        """See :meth:`Inlet.await_end`.

        Raises:
            BoundaryError: If its step has crossed the boundary more often.
        """
        with self._profile(profiling.WAIT_ACTIVATIONS):
            words = self._whose(number, crossing)
            message = self._link.inbox.receive_unless(Activations, number, words, never, crossing)
        if message is not None and not (message.ended or message.skipped):
            raise other_count(self._status, self._link.neighbour, str(self.boundary), crossing + 1)

    def _whose(self, number: int, crossing: int = 0) -> str:
        behind = self._status.number - number
        doing = self._status.doing
        whose = doing if not behind else f"a batch {behind} before ({doing} is going on)"
        return f"the activations of {whose}{f', crossing {crossing + 1} of the boundary' if crossing else ''}"

    def _taken(self, message: Activations, fingerprint: int, shapes: list[tuple[int, ...]]) -> Activations:
        self._check_same_batch(message, fingerprint, shapes)
        self._stopping.ends = message.ends if self._stopping.ends is None else self._stopping.ends
        self._metrics.arrive(message.metrics)
        self._first_uses.hear(message.owners)
        return message

    def _check_same_batch(self, message: Activations, fingerprint: int, own: Shapes) -> None:
        sent = [spec.shape for spec in message.specs]
        theirs = Place(message.doing, message.batches, message.last)
        ours = self._status.places[message.number]
        differences = other_place(theirs, ours) + other_shapes(sent, own)
        if message.fingerprint != fingerprint and not differences:
            differences = ["the latter's has other values"]
        if differences:
            raise mismatch(self._status, self._link.neighbour, differences)

    def reply(self, number: int, targets: Targets, part: int = 0) -> None:
        """Answers a batch with its targets, gradients of the mean loss.

        Args:
            number: The number of the batch.
            targets: For each crossing, those of what carries a gradient; none for no target.
            part: How many answers to this batch went before.
        """
        with self._profile(profiling.SEND):
            self._link.send(
                Target(
                    number=number,
                    doing=self._status.doing,
                    part=part,
                    counts=[len(each) for each in targets],
                    stop=self._stopping.wanted,
                    last=self._status.places[number].last,
                    tensors=[tensor for each in targets for tensor in each],
                    compression=self._compression,
                )
            )

    def send_residual(self, number: int, residuals: Sequence[Residuals]) -> None:
        """Sends exact minus target gradient of a batch, or the exact one.

        Args:
            number: The number of the batch.
            residuals: For each crossing, what was received and its residual, of the mean loss; without anything that
                carries a gradient there is nothing to send.
        """
        if self._is_exact or not any(each.leaves for each in residuals):
            return
        sent: list[list[Tensor]] = [[] for _ in residuals]
        if any(part is not None for each in residuals for part in each.parts):
            sent = [each.tensors for each in residuals]
        message = Residual(
            number=number,
            doing=self._status.doing,
            counts=[len(each) for each in sent],
            tensors=[tensor for each in sent for tensor in each],
            compression=self._compression,
        )
        with self._profile(profiling.SEND):
            self._link.send(message)

    def send_no_residual(self, number: int, residuals: Sequence[Residuals]) -> None:
        """See :meth:`Inlet.send_no_residual`."""
        if not self._is_exact and any(each.leaves for each in residuals):
            self._link.send(Residual(number=number, doing=self._status.doing, missing=True))


__all__ = ["Inlet", "NoInlet", "Residuals", "Targets", "UpstreamInlet"]
