"""Evolution strategies: antithetic values around the activation, several evaluations for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sg.blackbox.estimator import Estimator, credit
from lightning_sg.blackbox.sampling import Draw


class Evolution(Estimator):
    r"""Compares the scores of values on both sides of the activation: unbiased for the score averaged over the noise.

    With noise it is :math:`(c(h + σε) - c(h - σε))\,ε / 2σ`, the mean over pairs (Salimans et al. 2017, arXiv
    1703.03864). For ``Bernoulli`` boundaries the pairs come of u and 1 - u, and the estimator is DisARM (Dong, Mnih and
    Tucker 2020, arXiv 2006.10680). ``Categorical`` boundaries draw independent values and leave one out. Nothing is
    learned, so nothing lags behind a stage that learns too.

    The boundary needs an even number of ``evaluations``.
    """

    in_pairs = True

    def check(self, evaluations: int, explores: bool) -> None:
        """See :meth:`Estimator.check`."""
        if evaluations % 2:
            raise ValueError(
                f"Evolution compares pairs: give the boundary an even number of evaluations, not {evaluations}."
            )
        if not explores:
            raise ValueError("Evolution looks on both sides of an activation: give the boundary noise above 0.")

    def gradient(self, draw: Draw, context: Any, score: Tensor | None, generator: torch.Generator) -> Tensor:
        """See :meth:`Estimator.gradient`."""
        assert score is not None
        return self.sampling.pair_gradient(draw, credit(score, draw.activation))


__all__ = ["Evolution"]
