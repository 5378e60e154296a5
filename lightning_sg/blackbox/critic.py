"""The critic: learns the score of a value and its context; its gradient is the synthetic gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sg.arguments import checked, whole
from lightning_sg.blackbox.estimator import Estimator, Example
from lightning_sg.blackbox.sampling import Draw
from lightning_sg.blackbox.score_net import ScoreNet
from lightning_sg.predictors.layers import DEPTH, WIDTH


class Critic(Estimator):
    r"""Learns the score, and predicts :math:`ĝ = ∂ĉ(h, context)/∂h`.

    It needs no score of the batch that it predicts for, so scores may come late. It is biased, as a gradient predictor
    is: it is as good as the critic. This is the deterministic policy gradient (Silver et al. 2014; Lillicrap et al.
    2016, arXiv 1509.02971) and the critic of Czarnecki et al. 2017 (arXiv 1703.00522) without a target gradient.

    A critic that has learned little misleads the stage before it, so by default it takes several steps for each batch,
    which cost no score. For discrete boundaries the critic learns from hard samples, and is differentiated at their
    probabilities.

    Args:
        hidden: The width of the hidden layers.
        layers: The number of hidden layers.
        updates: Optimizer steps for each training batch.
        batch: The number of rows of each step, drawn from the boundary's replay; without a replay, a step takes the
            newest rows.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range.
    """

    needs_score = False
    learned = True
    learns_first = True

    def __init__(self, hidden: int = 128, layers: int = 2, updates: int = 4, batch: int = 256) -> None:
        super().__init__()
        self.hidden = checked("Critic", "hidden", hidden, WIDTH)
        self.layers = checked("Critic", "layers", layers, DEPTH)
        self._updates = checked("Critic", "updates", updates, whole(1, 1_000))
        self.batch = checked("Critic", "batch", batch, whole(1, 1_000_000))

    @property
    def updates(self) -> int:
        """Optimizer steps for each training batch."""
        return self._updates

    @property
    def replays(self) -> bool:
        """Always."""
        return True

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Adam with learning rate 3e-3: the critic has to be ahead of the stage that it leads."""
        return torch.optim.Adam(parameters, lr=3e-3, fused=True)

    def build(self, example: Example) -> None:
        """See :meth:`Estimator.build`."""
        self.net = ScoreNet(example.value, example.context, example.scores.shape[1], self.hidden, self.layers)

    def loss(self, example: Example, generator: torch.Generator) -> Tensor:
        """The squared error of the predicted scores."""
        self.net.update(example.value, example.context, example.scores)
        return self.net.error(example.value, example.context, example.scores)

    def gradient(self, draw: Draw, context: Any, score: Tensor | None, generator: torch.Generator) -> Tensor:
        """See :meth:`Estimator.gradient`."""
        with torch.enable_grad():
            activation = draw.activation.detach().requires_grad_()
            predicted = self.net(self.sampling.reached(activation, draw), context).mean(1).sum()
            (gradient,) = torch.autograd.grad(predicted, activation)
        return gradient


__all__ = ["Critic"]
