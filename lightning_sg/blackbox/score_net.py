"""A small network that predicts scores from values and context, in units that suit its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg._compat import tree_leaves
from lightning_sg.blackbox.estimator import rows_of
from lightning_sg.predictors.features import context_features, count_classes, is_label

_MEMORY = 0.99


class Standard(nn.Module):
    """The running mean and deviation of features, by which they are scaled.

    Args:
        features: How many features.
    """

    mean: Tensor
    square: Tensor
    weight: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("square", torch.zeros(features))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Takes in ``(R, D)`` rows; the first ones set what the next ones move."""
        if not rows.shape[0]:
            return
        self.weight.mul_(_MEMORY).add_(1 - _MEMORY)
        share = (1 - _MEMORY) / self.weight
        self.mean.lerp_(rows.mean(0), share)
        self.square.lerp_(rows.square().mean(0), share)

    @property
    def deviation(self) -> Tensor:
        """``(D,)``; 1 for what has never differed."""
        variance = self.square - self.mean.square()
        return torch.where(variance > 1e-6 * self.square, variance, torch.ones_like(variance)).clamp_min(1e-24).sqrt()

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows with mean 0 and deviation 1."""
        return (rows - self.mean) / self.deviation

    def restored(self, rows: Tensor) -> Tensor:
        """Inverts :meth:`scaled`."""
        return rows * self.deviation + self.mean


class ScoreNet(nn.Module):
    """An MLP from a value and its context to scores.

    Args:
        value: An example, ``(R, ...)``.
        context: An example of the context: tensors ``(R, ...)`` in any nesting, or ``None``. Whole numbers are labels.
        outputs: The number of scores of each row.
        hidden: The width of the hidden layers.
        layers: The number of hidden layers.
    """

    def __init__(self, value: Tensor, context: Any, outputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        leaves = _leaves(context)
        self.classes = [count_classes(leaf, None) if is_label(leaf) else None for leaf in leaves]
        features = self._features(value, context).shape[-1]
        self.inputs = Standard(features)
        self.outputs = Standard(outputs)
        parts: list[nn.Module] = []
        width = features
        for _ in range(layers):
            parts += [nn.Linear(width, hidden), nn.SiLU()]
            width = hidden
        last = nn.Linear(width, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*parts, last)

    def forward(self, value: Tensor, context: Any) -> Tensor:
        """The expected scores, ``(R, K)``."""
        return self.outputs.restored(self.standard(value, context))

    def standard(self, value: Tensor, context: Any) -> Tensor:
        """The expected scores in units of their deviation, ``(R, K)``."""
        found: Tensor = self.net(self.inputs.scaled(self._features(value, context)))
        return found

    def update(self, value: Tensor, context: Any, scores: Tensor) -> None:
        """Moves the running scales with one batch; ``scores`` are ``(R, K)``."""
        self.inputs.update(self._features(value, context))
        self.outputs.update(scores)

    def error(self, value: Tensor, context: Any, scores: Tensor) -> Tensor:
        """The mean squared error in units of the scores' variance."""
        return (self.standard(value, context) - self.outputs.scaled(scores)).square().mean()

    def _features(self, value: Tensor, context: Any) -> Tensor:
        known = [context_features(leaf, classes) for leaf, classes in zip(_leaves(context), self.classes)]
        return rows_of([value, *known])


def _leaves(context: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(context) if isinstance(leaf, Tensor)]


__all__ = ["ScoreNet", "Standard"]
