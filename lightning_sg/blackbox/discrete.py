"""Hard samples of Bernoulli and categorical variables from their logits, and the relaxed samples behind them.

Legend: K categories, p probabilities, u and v uniform random numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg.blackbox.sampling import Draw, Sampling, mirrored, repeated

# Uniform numbers keep this far from 0 and 1, where their logits are infinite.
_EDGE = 1e-7


class BernoulliSampling(Sampling):
    """Zeros and ones from logits, each on its own."""

    def draw(self, activation: Tensor, evaluations: int, generator: torch.Generator, step: int) -> Draw:
        """See :meth:`Sampling.draw`."""
        rows = repeated(activation, evaluations)
        return self._hard(rows, _uniform(rows, generator), evaluations)

    def draw_pairs(self, activation: Tensor, pairs: int, generator: torch.Generator, step: int) -> Draw:
        """See :meth:`Sampling.draw_pairs`: u and 1 - u."""
        u = _uniform(repeated(activation, pairs), generator)
        return self._hard(repeated(activation, 2 * pairs), torch.cat([u, 1 - u]), 2 * pairs)

    def _hard(self, rows: Tensor, u: Tensor, evaluations: int) -> Draw:
        return Draw(rows, (u < rows.sigmoid()).to(rows.dtype), rows.new_zeros(()), evaluations)

    def settled(self, activation: Tensor) -> Tensor:
        """The more probable value."""
        return (activation > 0).to(activation.dtype)

    def mean(self, activation: Tensor) -> Tensor:
        """The probabilities of ones."""
        return activation.sigmoid()

    def log_gradient(self, draw: Draw) -> Tensor:
        """B - p."""
        return draw.value - draw.activation.sigmoid()

    def relaxed(self, activation: Tensor, draw: Draw, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logistic variables above zero where b = 1 (arXiv 1711.00123, appendix B)."""
        v = _uniform(activation, generator)

        def given_value(logits: Tensor) -> Tensor:
            one = logits.sigmoid()
            u = torch.where(draw.value > 0, 1 - one + v * one, v * (1 - one)).clamp(_EDGE, 1 - _EDGE)
            return logits + torch.logit(u)

        with torch.no_grad():
            apart = given_value(draw.activation) - draw.activation
        return activation + apart, given_value(activation)

    def softened(self, relaxed: Tensor, temperature: Tensor | float) -> Tensor:
        """See :meth:`Sampling.softened`."""
        return torch.sigmoid(relaxed / temperature)

    def pair_gradient(self, draw: Draw, scores: Tensor) -> Tensor:
        """The pair's part of DisARM (Dong, Mnih and Tucker 2020, arXiv 2006.10680, equation 6)."""
        sign = draw.value - mirrored(draw.value)  # of (-1)^b̃, and zero where b = b̃
        return (scores - mirrored(scores)) / 2 * sign * draw.activation.abs().sigmoid()


class CategoricalSampling(Sampling):
    """One-hot vectors from logits over the last dimension."""

    def draw(self, activation: Tensor, evaluations: int, generator: torch.Generator, step: int) -> Draw:
        """See :meth:`Sampling.draw`: the largest of logits plus Gumbel noise."""
        rows = repeated(activation, evaluations)
        return self._hard(rows, _uniform(rows, generator), evaluations)

    def draw_pairs(self, activation: Tensor, pairs: int, generator: torch.Generator, step: int) -> Draw:
        """Independent values: categories have no mirror image."""
        return self.draw(activation, 2 * pairs, generator, step)

    def _hard(self, rows: Tensor, u: Tensor, evaluations: int) -> Draw:
        return Draw(rows, _one_hot(rows + _gumbel(u), rows), rows.new_zeros(()), evaluations)

    def settled(self, activation: Tensor) -> Tensor:
        """The most probable category."""
        return _one_hot(activation, activation)

    def mean(self, activation: Tensor) -> Tensor:
        """The probabilities."""
        return activation.softmax(-1)

    def log_gradient(self, draw: Draw) -> Tensor:
        """B - p."""
        return draw.value - draw.activation.softmax(-1)

    def relaxed(self, activation: Tensor, draw: Draw, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Perturbed logits whose largest is the drawn category (arXiv 1711.00123, appendix B)."""
        v = _uniform(activation, generator)

        def given_value(logits: Tensor) -> Tensor:
            log_p = logits.log_softmax(-1)
            top = (v * draw.value).sum(-1, keepdim=True)  # the number of the drawn category
            others = _gumbel_of_log(-torch.log(v) / log_p.exp().clamp_min(1e-30) - torch.log(top))
            return torch.where(draw.value > 0, _gumbel(top), others)

        freely = activation.log_softmax(-1)
        with torch.no_grad():
            apart = given_value(draw.activation) - freely
        return freely + apart, given_value(activation)

    def softened(self, relaxed: Tensor, temperature: Tensor | float) -> Tensor:
        """See :meth:`Sampling.softened`."""
        return torch.softmax(relaxed / temperature, -1)

    def pair_gradient(self, draw: Draw, scores: Tensor) -> Tensor:
        """Each score less that of the other draw: leave-one-out (Kool, van Hoof and Welling 2019)."""
        return (scores - mirrored(scores)) * self.log_gradient(draw)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    u = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return u.clamp(_EDGE, 1 - _EDGE)


def _gumbel(u: Tensor) -> Tensor:
    return _gumbel_of_log(-torch.log(u))


def _gumbel_of_log(exponential: Tensor) -> Tensor:
    return -torch.log(exponential)


def _one_hot(values: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(values.argmax(-1), values.shape[-1]).to(like.dtype)


__all__ = ["BernoulliSampling", "CategoricalSampling"]
