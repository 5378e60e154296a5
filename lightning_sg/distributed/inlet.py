"""The start of this process's stages: activations come in, targets and residuals go back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg.distributed.absence import Absence
from lightning_sg.distributed.first_uses import FirstUses
from lightning_sg.distributed.mismatch import mismatch, other_place, other_shapes
from lightning_sg.distributed.skipping import BatchSkipped
from lightning_sg.distributed.stage import Stage
from lightning_sg.distributed.status import Place
from lightning_sg.training.base import Profile
from lightning_sg.transport import Activations, Compression, Residual, Target, Upstream, never

Shapes = list[tuple[int, ...]]


class Inlet(Protocol):
    """What a stage can do towards the stage before it."""

    boundary: str | None

    def take(self, number: int, fingerprint: int, shapes: Shapes) -> Activations:
        """Waits for the activations of a batch."""

    def take_late(self, number: int, fingerprint: int, shapes: list[tuple[int, ...]]) -> Activations | None:
        """Waits for the activations of a batch that has gone on without; ``None`` if the stage before is away."""

    def reply(self, number: int, targets: Sequence[Tensor]) -> None:
        """Answers a batch with its targets, or with none."""

    def send_residual(self, number: int, leaves: Sequence[Tensor], residual: Sequence[Tensor | None]) -> None:
        """Tells the stage before what the exact gradient of a batch is, relative to the target it was sent."""

    def send_no_residual(self, number: int, leaves: Sequence[Tensor]) -> None:
        """Tells the stage before that the exact gradient of a batch will not come."""


class NoInlet:
    """The first stage has none before it."""

    boundary: str | None = None

    def take(self, number: int, fingerprint: int, shapes: Shapes) -> Activations:
        """Cannot be asked for."""
        raise AssertionError("the first stage receives nothing")

    def take_late(self, number: int, fingerprint: int, shapes: list[tuple[int, ...]]) -> Activations | None:
        """Cannot be asked for."""
        raise AssertionError("the first stage receives nothing")

    def reply(self, number: int, targets: Sequence[Tensor]) -> None:
        """Does nothing."""

    def send_residual(self, number: int, leaves: Sequence[Tensor], residual: Sequence[Tensor | None]) -> None:
        """Does nothing."""

    def send_no_residual(self, number: int, leaves: Sequence[Tensor]) -> None:
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

    def take(self, number: int, fingerprint: int, shapes: Shapes) -> Activations:
        """Waits for the activations of a batch, and takes what else the stage before had to say.

        Args:
            number: The number of the batch.
            fingerprint: Of the batch as this process was given it.
            shapes: That the activations must have.

        Raises:
            BatchMismatchError: If the stage before was given another batch.
            StageLostError: If it is gone or does not send.
            BatchSkipped: If it has none, as it or one before it was started anew.
        """
        with self._profile(profiling.WAIT_ACTIVATIONS):
            message = self._link.inbox.receive_unless(Activations, number, self._whose(number), never)
        if message is None or message.skipped:
            raise BatchSkipped
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

    def _whose(self, number: int) -> str:
        behind = self._status.number - number
        doing = self._status.doing
        whose = doing if not behind else f"a batch {behind} before ({doing} is going on)"
        return f"the activations of {whose}"

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

    def reply(self, number: int, targets: Sequence[Tensor]) -> None:
        """Answers a batch with its targets, gradients of the mean loss, or with none."""
        with self._profile(profiling.SEND):
            self._link.send(
                Target(
                    number=number,
                    doing=self._status.doing,
                    stop=self._stopping.wanted,
                    last=self._status.places[number].last,
                    tensors=targets,
                    compression=self._compression,
                )
            )

    def send_residual(self, number: int, leaves: Sequence[Tensor], residual: Sequence[Tensor | None]) -> None:
        """Sends exact minus target gradient of a batch.

        Args:
            number: The number of the batch.
            leaves: What was received of it and carries a gradient; without any there is nothing to send.
            residual: Of the mean loss, one for each leaf; ``None`` for zero.
        """
        if not leaves or self._is_exact:
            return
        tensors: Sequence[Tensor] = ()
        if any(part is not None for part in residual):
            tensors = [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(residual, leaves)]
        message = Residual(number=number, doing=self._status.doing, tensors=tensors, compression=self._compression)
        with self._profile(profiling.SEND):
            self._link.send(message)

    def send_no_residual(self, number: int, leaves: Sequence[Tensor]) -> None:
        """See :meth:`Inlet.send_no_residual`."""
        if leaves and not self._is_exact:
            self._link.send(Residual(number=number, doing=self._status.doing, missing=True))


__all__ = ["Inlet", "NoInlet", "UpstreamInlet"]
