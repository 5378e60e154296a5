"""One training batch at one boundary, from its prediction to its target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_sg.predictors.base import Gradients


@dataclass
class Record:
    """One training batch at one boundary, kept until its target is learned from.

    Attributes:
        step: How many training batches crossed the boundary before this one.
        activations: What crossed, detached and in float32, each ``(N, ...)``.
        context: What the callback took from the batch.
        wants_target: Whether the predictor is measured on this batch, and trained if the target is good for that.
        learns_target: Whether the target is good for that: it is exact, or biased ones have to do.
        due: The step before whose prediction this batch is learned from.
        exact_due: The step at which the exact gradient of this batch is known, or ``None`` if it is not asked for.
        true_share: How much of the gradient used is the true one, which is then waited for: 0 to 1.
        prediction: The per-sample synthetic gradients as used, or ``None`` for none.
        shadow: The predictor's own prediction while the guard has another used in its place.
        targets: The per-sample targets as the next stage computes them, once they are here.
        exact_targets: The per-sample gradients of the model's own loss, once they are here.
        skipped: Whether the predictor does not learn from this batch, as its stage is not updated with it.
        fetch: Brings the targets from another process, or ``None`` if there are none; blocks until then.
        fetch_exact: Brings what the exact gradients are more than the targets; blocks until then.
    """

    step: int
    activations: Gradients
    context: Any
    wants_target: bool
    learns_target: bool = True
    due: int = 0
    exact_due: int | None = None
    true_share: float = 0.0
    prediction: Gradients | None = None
    shadow: Gradients | None = None
    targets: Gradients | None = None
    exact_targets: Gradients | None = None
    skipped: bool = False
    fetch: Callable[[], Gradients | None] | None = None
    fetch_exact: Callable[[], None] | None = None

    @property
    def samples(self) -> int:
        """The number of samples N: predictors work with the gradient of the sum over samples."""
        return max(1, self.activations[0].shape[0])

    @property
    def judged(self) -> Gradients | None:
        """The predictor's own prediction, whether it was used or not."""
        return self.prediction if self.shadow is None else self.shadow

    def per_sample(self, gradients: Iterable[torch.Tensor | None]) -> Gradients:
        """Gradients of the mean loss, of the activations' shapes, as those of the sum; ``None`` counts as zero."""
        return tuple(
            torch.zeros_like(activation) if gradient is None else gradient.detach().float() * self.samples
            for gradient, activation in zip(gradients, self.activations)
        )

    def add_target(self, gradients: Iterable[torch.Tensor | None]) -> None:
        """Adds the gradients of the mean loss to the target."""
        new = self.per_sample(gradients)
        self.targets = new if self.targets is None else tuple(old + more for old, more in zip(self.targets, new))

    def add_excess(self, gradients: Iterable[torch.Tensor | None]) -> None:
        """Says by how much the exact gradients of the mean loss exceed the targets, or zero if there are none."""
        excess = self.per_sample(gradients)
        self.exact_targets = excess if self.targets is None else tuple(t + e for t, e in zip(self.targets, excess))

    @property
    def used(self) -> Gradients:
        """The per-sample gradients that the stage before the boundary was given in all."""
        zeros = tuple(torch.zeros_like(activation) for activation in self.activations)
        synthetic, true = self.prediction or zeros, self.targets or zeros
        if self.true_share in (0.0, 1.0):
            return true if self.true_share else synthetic
        return tuple(self.true_share * t + (1 - self.true_share) * s for t, s in zip(true, synthetic))

    def collect(self) -> None:
        """Waits for the target if it comes from another process."""
        if self.fetch is not None:
            fetch, self.fetch = self.fetch, None
            gradients = fetch()
            if gradients is not None:
                self.add_target(gradients)

    def collect_exact(self) -> None:
        """Waits for the exact gradient if it comes from another process."""
        if self.fetch_exact is not None:
            fetch, self.fetch_exact = self.fetch_exact, None
            fetch()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this batch."""
        return {name: value for name, value in self.__dict__.items() if name not in ("fetch", "fetch_exact")}


__all__ = ["Record"]
