"""The control variate: the critic's gradient, plus the score function of what the critic gets wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sg.arguments import checked, number, one_of, optional, whole
from lightning_sg.blackbox.estimator import Estimator, Example, credit
from lightning_sg.blackbox.noise import Gaussian
from lightning_sg.blackbox.sampling import Draw
from lightning_sg.blackbox.score_net import ScoreNet
from lightning_sg.predictors.layers import DEPTH, WIDTH


class ControlVariate(Estimator):
    r"""Unbiased, with less variance the better its critic is: LAX, and RELAX for discrete boundaries.

    .. math:: ĝ = (c(x) - ĉ(z̃))\,∂\log p(x \mid h)/∂h + ∂ĉ(z)/∂h - ∂ĉ(z̃)/∂h

    where z is a relaxed sample whose hard form is x, and z̃ another one, drawn on condition of x. With Gaussian noise
    both are x, and the last term is zero. Source: Grathwohl et al. 2018 (arXiv 1711.00123), equations 4, 7 and 8;
    Tucker et al. 2017 (REBAR, arXiv 1703.07370).

    Args:
        objective: What the critic is trained on: the ``"variance"`` of ĝ, as in the paper, or the squared error of the
            score (``"fit"``). By default the error where there is noise, which can be learned from a replay of earlier
            scores; and the variance at discrete boundaries, where a critic that fits hard samples is steep between
            them.
        temperature: Of the relaxed values that the critic sees at a discrete boundary, at the start; it is learned.
        hidden: The width of the hidden layers.
        layers: The number of hidden layers.
        updates: Optimizer steps for each training batch; by default 4 where the critic learns the score, else 1, as its
            loss is that of the newest rows.
        batch: The number of rows of each step, if they come from a replay.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range.
    """

    learned = True

    def __init__(
        self,
        objective: Literal["auto", "variance", "fit"] = "auto",
        temperature: float = 0.5,
        hidden: int = 128,
        layers: int = 2,
        updates: int | None = None,
        batch: int = 256,
    ) -> None:
        super().__init__()
        self.objective = checked("ControlVariate", "objective", objective, one_of("auto", "variance", "fit"))
        self.temperature = checked("ControlVariate", "temperature", temperature, number(above=0, most=100))
        self.hidden = checked("ControlVariate", "hidden", hidden, WIDTH)
        self.layers = checked("ControlVariate", "layers", layers, DEPTH)

        self._updates = checked("ControlVariate", "updates", updates, optional(whole(1, 1_000)))
        self.batch = checked("ControlVariate", "batch", batch, whole(1, 1_000_000))

    @property
    def _fits(self) -> bool:
        return self.objective == "fit" or (self.objective == "auto" and isinstance(self.sampling, Gaussian))

    @property
    def updates(self) -> int:
        """Optimizer steps for each training batch."""
        return self._updates or (4 if self._fits else 1)

    @property
    def replays(self) -> bool:
        """Whether the critic learns the score, of which earlier batches tell as much."""
        return self._fits

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Adam with learning rate 3e-3: the critic has to be ahead of the stage that it leads."""
        return torch.optim.Adam(parameters, lr=3e-3, fused=True)

    def check(self, evaluations: int, explores: bool) -> None:
        """See :meth:`Estimator.check`."""
        if not explores:
            raise ValueError("ControlVariate compares values that differ by chance: give the boundary noise above 0.")

    def build(self, example: Example) -> None:
        """See :meth:`Estimator.build`."""
        self.net = ScoreNet(example.value, example.context, example.scores.shape[1], self.hidden, self.layers)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self.temperature)))

    def loss(self, example: Example, generator: torch.Generator) -> Tensor:
        """The variance of the gradient, or the squared error of the critic."""
        activation, value, spread, context, score = example
        self.net.update(value, context, example.scores)
        if self._fits and isinstance(self.sampling, Gaussian):
            return self.net.error(value, context, example.scores)
        draw = Draw(activation, value, spread, 1)
        found = self._parts(draw, context, score, generator, create_graph=True)
        if self._fits:
            return (found.critic_of_given - example.scores).div(self.net.outputs.deviation).square().mean()
        # By the size that the gradient has without a critic: numbers of any scale suit one learning rate.
        size = (credit(score - score.mean(0), activation) * self.sampling.log_gradient(draw)).square().mean()
        return found.gradient.square().mean() / size.clamp_min(1e-30)

    def gradient(self, draw: Draw, context: Any, score: Tensor | None, generator: torch.Generator) -> Tensor:
        """See :meth:`Estimator.gradient`."""
        assert score is not None
        return self._parts(draw, context, score, generator, create_graph=False).gradient.detach()

    def _parts(
        self,
        draw: Draw,
        context: Any,
        score: Tensor,
        generator: torch.Generator,
        *,
        create_graph: bool,
    ) -> _Parts:
        temperature = self.log_temperature.exp()
        with torch.enable_grad():
            activation = draw.activation.detach().requires_grad_()
            free, given = self.sampling.relaxed(activation, draw, generator)
            of_free = self.net(self.sampling.softened(free, temperature), context)
            of_given = self.net(self.sampling.softened(given, temperature), context)
            difference = (of_free - of_given).mean(1).sum() if given.requires_grad else of_free.mean(1).sum()
            (slope,) = torch.autograd.grad(difference, activation, create_graph=create_graph)
            left = credit(score - of_given.view_as(score), draw.activation)
            return _Parts(left * self.sampling.log_gradient(draw) + slope, of_given)


class _Parts:
    """The gradient, and what the critic makes of z̃."""

    def __init__(self, gradient: Tensor, critic_of_given: Tensor) -> None:
        self.gradient = gradient
        self.critic_of_given = critic_of_given


__all__ = ["ControlVariate"]
