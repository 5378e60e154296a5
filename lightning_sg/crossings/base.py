"""What happens at a boundary in one training batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lightning_sg.crossings.exact_pass import ExactPass
from lightning_sg.crossings.newest import NewestGradient
from lightning_sg.crossings.replay import ReplayedBatch
from lightning_sg.crossings.scale import GradientScale
from lightning_sg.finite.diagnosis import BatchOrigin
from lightning_sg.finite.policy import IgnoresNonFinite
from lightning_sg.predictors.base import LossInfo
from lightning_sg.training.record import TargetPlan, Visits


class Crossing(Protocol):
    """One batch at one boundary, each time that it crosses it: gone when the batch ends."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Takes the tensors that reach the boundary; returns those that the next stage goes on with."""

    def before_backward(self, loss: Tensor) -> None:
        """The batch's first backward pass is about to begin, from ``loss``."""

    def after_backward(self) -> None:
        """The batch's first backward pass is over."""

    def end(self) -> None:
        """The batch is over."""


class PlainCrossing:
    """The crossing that changes nothing; others override what they do."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the tensors."""
        return tensors

    def before_backward(self, loss: Tensor) -> None:
        """Does nothing."""

    def after_backward(self) -> None:
        """Does nothing."""

    def end(self) -> None:
        """Does nothing."""


@dataclass
class BatchContext:
    """What the boundaries are told of one training batch.

    Attributes:
        number: How many training batches there were before it.
        context: What predictors are told besides activations.
        scale: The factor on the gradients of its backward pass.
        loss: What a traced step told about the model's loss, or ``None``.
        plan: What it does about targets; decided again once the first step has been traced.
        features: What input predictors are told, or ``None`` without them.
        crossings: What has crossed boundaries in this process so far, in order, and boundaries in time.
        went_backward: Whether its first backward pass is over.
        origin: Where it comes from, for messages.
        finite: What is done if it is not finite.
        visits: By boundary, how often it has crossed it so far.
        exact: By the id of what was received, the exact gradient of the mean loss that has come to it so far.
        newest: What its own gradients count in the update; decided when its first backward pass begins.
        replayed: What its stages need to run it again, if they are to.
        exact_pass: What the exact pass before its current backward pass found, if it had one here.
    """

    number: int
    context: Any
    scale: GradientScale
    loss: LossInfo | None = None
    plan: TargetPlan = TargetPlan()
    features: Tensor | None = None
    crossings: list[Crossing] = field(default_factory=list)
    went_backward: bool = False
    origin: BatchOrigin = field(default_factory=BatchOrigin)
    finite: IgnoresNonFinite = field(default_factory=IgnoresNonFinite)
    visits: defaultdict[str, Visits] = field(default_factory=lambda: defaultdict(Visits))
    exact: dict[int, Tensor | None] = field(default_factory=dict)
    newest: NewestGradient = field(default_factory=NewestGradient)
    replayed: ReplayedBatch | None = None
    exact_pass: ExactPass | None = None

    def add_exact(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Adds the exact gradients that one backward pass has brought to what was received."""
        for leaf, gradient in zip(leaves, gradients):
            before = self.exact.get(id(leaf))
            if gradient is None or before is None:
                self.exact[id(leaf)] = before if gradient is None else gradient
            else:
                self.exact[id(leaf)] = before + gradient


__all__ = ["BatchContext", "Crossing", "PlainCrossing"]
