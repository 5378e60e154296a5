"""Cheap direct predictors, for boundaries where there is nothing to predict a loss from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo
from lightning_sg.predictors.direct import MLPPredictor
from lightning_sg.predictors.features import join_rows, split_rows
from lightning_sg.predictors.normalize import InputScale
from lightning_sg.predictors.sizes import FirstSizes
from lightning_sg.predictors.stage_size import StageSize

#: The largest share of its stage's parameters and operations that a cheap predictor takes.
LARGEST_SHARE = 0.1
_WIDEST = 256
# Predicting is one forward pass; learning is one, and a backward pass that costs two.
_PASSES = 4


class ScalePredictor(GradientPredictor):
    """Predicts each feature's gradient as a multiple of the normalized feature, plus a constant.

    Args:
        shared: Whether all features share one factor and one constant.
    """

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.scale = InputScale("layer")

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Makes a factor and a constant for each feature, or one of each."""
        self._sizes = FirstSizes(activations)
        rows = join_rows(activations)
        size = 1 if self.shared else rows.shape[-1]
        self.factor = nn.Parameter(torch.zeros(size, device=rows.device))
        self.constant = nn.Parameter(torch.zeros(size, device=rows.device))

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        """See :meth:`GradientPredictor.forward`."""
        rows, seen = self._sizes.rows(activations)
        gradients = split_rows(self.scale(rows) * self.factor + self.constant, seen)
        gradients = self._sizes.back(gradients, activations)
        if self.target_rms is None:
            return gradients
        return tuple(gradient * rms for gradient, rms in zip(gradients, self.target_rms))


def cheap_predictor(activations: Gradients, stage: StageSize | None) -> tuple[GradientPredictor, str]:
    """An unbuilt predictor of the gradient from activations alone, with at most a tenth of its stage's size.

    Args:
        activations: The first activations, each ``(N, ...)``.
        stage: The stage before the boundary; ``None`` if its size is unknown.

    Returns:
        The predictor, and what it is in words.
    """
    rows = join_rows(activations)
    width = rows.shape[-1]
    hidden = _WIDEST
    if stage is not None:
        hidden = min(hidden, int((LARGEST_SHARE * stage.parameters - width) / (2 * width + 1)))
        if stage.operations:
            of_one = _PASSES * 4 * rows.numel()
            hidden = min(hidden, int(LARGEST_SHARE * stage.operations / max(1, of_one)))
    if hidden >= 1:
        return MLPPredictor(hidden=hidden, conditional=False), f"a hidden layer of {hidden}"
    shared = stage is not None and 2 * width > LARGEST_SHARE * stage.parameters
    return ScalePredictor(shared), f"a factor for {'all features' if shared else 'each feature'}"


__all__ = ["LARGEST_SHARE", "ScalePredictor", "cheap_predictor"]
