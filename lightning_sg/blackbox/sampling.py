"""What a scored boundary does to the activation that reaches it: the distribution that it draws from.

Legend: N samples, E evaluations, R = E · N rows, those of the first evaluation first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What one call of a boundary has drawn.

    Attributes:
        activation: What reached the boundary, once for each evaluation, ``(R, ...)``, float32, detached.
        value: What was drawn, ``(R, ...)``, float32, detached.
        spread: The standard deviation of the noise, of a shape that broadcasts; a scalar zero where there is none.
        evaluations: E.
    """

    activation: Tensor
    value: Tensor
    spread: Tensor
    evaluations: int


class Sampling(ABC):
    """A distribution over values whose parameter is the activation."""

    @abstractmethod
    def draw(self, activation: Tensor, evaluations: int, generator: torch.Generator, step: int) -> Draw:
        """Draws independent values.

        Args:
            activation: ``(N, ...)``, float32, detached.
            evaluations: How many values for each sample.
            generator: Of the random numbers, on the activation's device.
            step: How many training batches there were, for schedules.
        """

    @abstractmethod
    def draw_pairs(self, activation: Tensor, pairs: int, generator: torch.Generator, step: int) -> Draw:
        """Draws antithetic values: evaluation ``e + pairs`` mirrors evaluation ``e``. Arguments as in :meth:`draw`."""

    @abstractmethod
    def settled(self, activation: Tensor) -> Tensor:
        """The value in evaluation, ``(N, ...)``: nothing is explored."""

    @abstractmethod
    def mean(self, activation: Tensor) -> Tensor:
        """The mean of the values, differentiable, of the activation's shape."""

    def reached(self, activation: Tensor, draw: Draw) -> Tensor:
        """Where a critic is differentiated, differentiable: by default at the mean.

        Args:
            activation: That of the draw, as a leaf that requires a gradient.
            draw: What was drawn.
        """
        return self.mean(activation)

    @abstractmethod
    def log_gradient(self, draw: Draw) -> Tensor:
        """The score function: the gradient of the value's log-probability by the activation, ``(R, ...)``."""

    @abstractmethod
    def relaxed(self, activation: Tensor, draw: Draw, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Continuous values z and z̃ that the activation reaches by reparametrization.

        Both have the same value and depend on the activation in different ways: drawn with common random numbers, they
        differ least (Tucker et al. 2017, arXiv 1703.07370, appendix). Source: Grathwohl et al. 2018 (arXiv 1711.00123),
        section 3 and appendix B.

        Args:
            activation: That of the draw, as a leaf that requires a gradient.
            draw: What was drawn.
            generator: Of the random numbers.

        Returns:
            z, one of those of which the drawn value is the hard form, differentiable as if it had been drawn freely;
            and z̃, differentiable as drawn on condition of that value.
        """

    @abstractmethod
    def softened(self, relaxed: Tensor, temperature: Tensor | float) -> Tensor:
        """A differentiable form of the values, of a relaxed one; the lower the temperature, the harder."""

    @abstractmethod
    def pair_gradient(self, draw: Draw, scores: Tensor) -> Tensor:
        """The gradient by the activation that antithetic pairs show, ``(R, ...)``.

        Args:
            draw: Of :meth:`draw_pairs`.
            scores: One for each row, of a shape that broadcasts to the activation's.
        """


def mirrored(rows: Tensor) -> Tensor:
    """The rows of the other member of each pair: the halves change places."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def repeated(tensor: Tensor, times: int) -> Tensor:
    """``(times · N, ...)``: the tensor so many times, one after the other."""
    return tensor if times == 1 else tensor.repeat(times, *[1] * (tensor.ndim - 1))


__all__ = ["Draw", "Sampling", "mirrored", "repeated"]
