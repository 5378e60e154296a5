"""Estimators that let the gradient of what follows through: straight-through and Gumbel-softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sg.arguments import checked, flag, number
from lightning_sg.blackbox.estimator import Estimator
from lightning_sg.blackbox.sampling import Draw


class Pathwise(Estimator):
    """Lets the true gradient of what follows through the boundary; what follows must be differentiable."""

    passes = True

    def gradient(self, draw: Draw, context: Any, score: Tensor | None, generator: torch.Generator) -> Tensor:
        """Nothing: no gradient is made of scores."""
        raise AssertionError("the gradient goes through the boundary")


class StraightThrough(Pathwise):
    """Goes backward as if the mean had been handed on in place of the drawn value: biased, without noise of its own.

    It needs a differentiable cost, so it is no way through a simulator. It serves to compare at discrete boundaries.
    Source: Bengio, Léonard and Courville 2013 (arXiv 1308.3432).
    """

    def passed(self, activation: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
        """See :meth:`Estimator.passed`."""
        mean = self.sampling.mean(activation)
        return draw.value.to(mean.dtype) + (mean - mean.detach())


class GumbelSoftmax(Pathwise):
    """Goes backward through a relaxed sample: biased, less so and noisier the lower the temperature.

    Source: Jang, Gu and Poole 2017 (arXiv 1611.01144); Maddison, Mnih and Teh 2017 (arXiv 1611.00712).

    Args:
        temperature: Of the relaxed sample.
        hard: Whether the hard sample is handed on, and the relaxed one only gives the gradient. Without, what follows
            sees relaxed samples in training.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range.
    """

    def __init__(self, temperature: float = 0.5, hard: bool = True) -> None:
        super().__init__()
        self.temperature = checked("GumbelSoftmax", "temperature", temperature, number(above=0, most=100))
        self.hard = checked("GumbelSoftmax", "hard", hard, flag())

    def passed(self, activation: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
        """See :meth:`Estimator.passed`."""
        free, _given = self.sampling.relaxed(activation.float(), draw, generator)
        soft = self.sampling.softened(free, self.temperature)
        return draw.value + (soft - soft.detach()) if self.hard else soft


__all__ = ["GumbelSoftmax", "Pathwise", "StraightThrough"]
