"""What has crossed a scored boundary and waits for its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sg.blackbox.estimator import Example
from lightning_sg.blackbox.sampling import Draw
from lightning_sg.blackbox.scores import Coming


@dataclass
class Visit:
    """One call of a boundary in a training step.

    Attributes:
        carrier: What reached the boundary, with the graph of the stage before.
        draw: What was drawn.
        context: What is known besides, once for each row.
        leaf: What went on, as a leaf that collects the true gradient, if that is measured.
    """

    carrier: Tensor
    draw: Draw
    context: Any
    leaf: Tensor | None = None

    @property
    def samples(self) -> int:
        """The number of samples N."""
        return int(self.carrier.shape[0])

    def example(self, score: Tensor) -> Example:
        """The rows to learn from, with their scores."""
        return Example(self.draw.activation, self.draw.value, self.draw.spread, self.context, score.detach())

    def of_samples(self, rows: Tensor) -> Tensor:
        """The mean over evaluations of something for each row: ``(N, ...)`` of ``(R, ...)``."""
        return rows if self.draw.evaluations == 1 else rows.unflatten(0, (self.draw.evaluations, -1)).mean(0)


@dataclass
class Pending:
    """Rows whose scores come later.

    Attributes:
        batch: The number of the training batch.
        evaluations: How many evaluations are in the rows.
        draws: What crossed: activation, value and context for each visit.
        spread: The standard deviation of the noise, as a number or a list.
        coming: The scores, until they have come.
        score: The scores, once they have.
    """

    batch: int
    evaluations: int
    draws: list[tuple[Tensor, Tensor, Any]]
    spread: Any
    coming: Coming | None = None
    score: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state to save, once the scores have come."""
        return {
            "batch": self.batch,
            "evaluations": self.evaluations,
            "draws": self.draws,
            "spread": self.spread,
            "score": self.score,
        }


__all__ = ["Pending", "Visit"]
