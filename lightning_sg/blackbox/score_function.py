"""The score function: REINFORCE with a learned baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sg.arguments import checked, flag
from lightning_sg.blackbox.estimator import Estimator, Example, credit
from lightning_sg.blackbox.sampling import Draw
from lightning_sg.blackbox.score_net import ScoreNet
from lightning_sg.predictors.layers import DEPTH, WIDTH


class ScoreFunction(Estimator):
    r"""Weighs :math:`∂\log p(x \mid h)/∂h` by the score less a baseline: unbiased, and noisy.

    The baseline is a network on the activation and the context, trained on the squared error of the scores. With
    several evaluations, the mean of the others is subtracted too (leave-one-out). Source: Williams 1992; Mnih and
    Gregor 2014 (arXiv 1402.0030) for the learned baseline; Kool, van Hoof and Welling 2019 for leave-one-out.

    Args:
        baseline: Whether there is a learned baseline.
        hidden: The width of its hidden layers.
        layers: The number of its hidden layers.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range.
    """

    learned = True

    def __init__(self, baseline: bool = True, hidden: int = 128, layers: int = 1) -> None:
        super().__init__()
        self.baseline = checked("ScoreFunction", "baseline", baseline, flag())
        self.hidden = checked("ScoreFunction", "hidden", hidden, WIDTH)
        self.layers = checked("ScoreFunction", "layers", layers, DEPTH)

    def check(self, evaluations: int, explores: bool) -> None:
        """See :meth:`Estimator.check`."""
        if not explores:
            raise ValueError("ScoreFunction compares values that differ by chance: give the boundary noise above 0.")

    def build(self, example: Example) -> None:
        """See :meth:`Estimator.build`."""
        if self.baseline:
            outputs = example.scores.shape[1]
            self.net = ScoreNet(example.activation, example.context, outputs, self.hidden, self.layers)

    def loss(self, example: Example, generator: torch.Generator) -> Tensor:
        """The squared error of the baseline."""
        if not self.baseline:
            return super().loss(example, generator)
        self.net.update(example.activation, example.context, example.scores)
        return self.net.error(example.activation, example.context, example.scores)

    def gradient(self, draw: Draw, context: Any, score: Tensor | None, generator: torch.Generator) -> Tensor:
        """See :meth:`Estimator.gradient`."""
        assert score is not None
        advantage = score - self.net(draw.activation, context).view_as(score) if self.baseline else score
        if draw.evaluations > 1:
            each = advantage.unflatten(0, (draw.evaluations, -1))
            advantage = (each - (each.sum(0) - each) / (draw.evaluations - 1)).flatten(0, 1)
        return credit(advantage, draw.activation) * self.sampling.log_gradient(draw)


__all__ = ["ScoreFunction"]
