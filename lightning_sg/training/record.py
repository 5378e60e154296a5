"""One crossing of one boundary by a training batch, from its prediction to its target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lightning_sg.predictors.base import Gradients


class Applied(Enum):
    """What stages apply of a batch's exact gradient when it has come."""

    NOTHING = "nothing: predictors alone learn from it"
    DIFFERENCE = "exact minus used gradient, on top of what was applied at once"
    WHOLE = "the exact gradient, whatever was applied at once"
    RECOMPUTED = "the exact gradient, by another forward pass with the newest weights"


@dataclass(frozen=True)
class TargetPlan:
    """What one batch does about targets, the same at all boundaries.

    Attributes:
        exact: Whether its exact gradient travels up to all boundaries.
        teaches: Whether all predictors that use targets learn from its exact gradient, and not only those that have
            nothing else to learn from.
        local: Whether no batch teaches those: exact gradients travel only to be applied.
        bootstrap: Whether no exact gradients travel at all, so that predictors learn from biased targets.
        coupled: Whether every stage waits for the true gradient and uses it.
        corrects: Whether stages apply exact gradients late, of this batch or of others.
        applies: What they apply of this batch's.
    """

    exact: bool = False
    teaches: bool = True
    local: bool = False
    bootstrap: bool = False
    coupled: bool = False
    corrects: bool = False
    applies: Applied = Applied.NOTHING

    @property
    def whole(self) -> bool:
        """Whether what travels up is the exact gradient itself, not its residual."""
        return self.applies in (Applied.WHOLE, Applied.RECOMPUTED)

    @property
    def keeps_graph(self) -> bool:
        """Whether stages need the batch's graph for its exact gradient."""
        return self.exact and self.applies is not Applied.RECOMPUTED


@dataclass
class Record:
    """One crossing of one boundary by a training batch, kept until its target is learned from.

    Attributes:
        step: How many training batches crossed the boundary before this one.
        activations: What crossed, detached and in float32, each ``(N, ...)``.
        context: What the predictor is told of the batch.
        wants_target: Whether a target is asked for: to learn from, to measure the prediction by, or to use.
        learns_target: Whether the target is good enough to learn from: it is exact, or biased ones have to do.
        coupled: Whether the stage uses the true gradient, which it waits for.
        skipped: Whether the predictor does not learn from this batch, as its stage is not updated with it.
        learned: Whether the predictor has learned from it already, when it predicted for it.
        due: The step before whose prediction this batch is learned from.
        exact_due: The step before which its exact gradient is here, or ``None`` if it is not asked for.
        prediction: The per-sample synthetic gradients as used, or ``None`` for none.
        shadow: The predictor's own prediction while the guard has another used in its place.
        targets: The per-sample targets as the next stage computes them, once they are here.
        exact_targets: The per-sample gradients of the model's own loss, once they are here.
        crossing: How many crossings of the same batch came before.
    """

    step: int
    activations: Gradients
    context: Any
    wants_target: bool
    learns_target: bool = True
    coupled: bool = False
    skipped: bool = False
    learned: bool = False
    due: int = 0
    exact_due: int | None = None
    prediction: Gradients | None = field(default=None)
    shadow: Gradients | None = None
    targets: Gradients | None = None
    exact_targets: Gradients | None = None
    crossing: int = 0

    @property
    def samples(self) -> int:
        """The number of samples N: predictors work with the gradient of the sum over samples."""
        return max(1, self.activations[0].shape[0])

    @property
    def empty(self) -> bool:
        """Whether there is nothing to predict for."""
        return self.activations[0].numel() == 0

    @property
    def judged(self) -> Gradients | None:
        """The predictor's own prediction, whether it was used or not."""
        return self.prediction if self.shadow is None else self.shadow

    @property
    def used(self) -> Gradients | None:
        """The per-sample gradient that the stage before the boundary was given, or ``None`` for none."""
        return self.targets if self.coupled else self.prediction

    @property
    def residual(self) -> Gradients | None:
        """Exact minus used gradient, per sample; ``None`` if the exact gradient is not known."""
        if self.exact_targets is None:
            return None
        used = self.used or tuple(torch.zeros_like(activation) for activation in self.activations)
        return tuple(exact - part for exact, part in zip(self.exact_targets, used))

    def per_sample(self, gradients: Iterable[Tensor | None]) -> Gradients:
        """Gradients of the sum of the samples' losses, from those of the mean; ``None`` counts as zero.

        They lie in memory as the activations do: sums over them, such as norms, are then the same to the bit whether
        they come from this process or another.
        """
        return tuple(
            torch.zeros_like(activation)
            if gradient is None
            else torch.mul(gradient.detach().float(), self.samples, out=torch.empty_like(activation))
            for gradient, activation in zip(gradients, self.activations)
        )

    def add_target(self, gradients: Iterable[Tensor | None]) -> None:
        """Adds gradients of the mean loss to the target: a second backward pass adds to that of the first."""
        new = self.per_sample(gradients)
        self.targets = new if self.targets is None else tuple(old + more for old, more in zip(self.targets, new))

    def add_exact(self, gradients: Iterable[Tensor | None]) -> None:
        """Adds gradients of the mean of the model's own loss; a second backward pass adds to those of the first."""
        old, new = self.exact_targets, self.per_sample(gradients)
        self.exact_targets = new if old is None else tuple(before + more for before, more in zip(old, new))

    def add_residual(self, gradients: Iterable[Tensor | None]) -> None:
        """Takes exact minus target gradients of the mean loss; without a target, the target counts as zero."""
        residual = self.per_sample(gradients)
        self.exact_targets = residual if self.targets is None else tuple(t + r for t, r in zip(self.targets, residual))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this batch."""
        return dict(self.__dict__)

    @classmethod
    def load(cls, state: dict[str, Any]) -> Record:
        """The inverse of :meth:`state_dict`."""
        state = dict(state)
        if "true_share" in state:  # of earlier versions, in which a share of the true gradient could be used
            state["coupled"] = state.pop("true_share") == 1
        return cls(**state)


@dataclass
class Visits:
    """One training batch at one boundary, which it crosses as often as its step runs the network.

    Attributes:
        step: How many training batches crossed the boundary before; ``None`` while this one has not.
        records: Of its crossings so far, those that carry a gradient.
    """

    step: int | None = None
    records: list[Record] = field(default_factory=list)


__all__ = ["Applied", "Record", "TargetPlan", "Visits"]
