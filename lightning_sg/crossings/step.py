"""What all boundaries need to know about the step that is going on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sg.inputs.boundaries import InputBoundaries
from lightning_sg.predictors.base import LossInfo
from lightning_sg.training.updates import RandomUpdates

if TYPE_CHECKING:
    from lightning_sg.crossings.local import LocalCrossing


def unscaled(gradient: Tensor, scale: Tensor | float) -> Tensor:
    """A gradient without a factor; one in float16 as float32, as it has the factor because it vanishes without."""
    if isinstance(scale, float) and scale == 1.0:
        return gradient
    return (gradient.float() if gradient.dtype == torch.float16 else gradient) / scale


class Step:
    """The current step: its context, what is done with the true gradient, and the factor on its gradients.

    Attributes:
        context: What the callback took from the batch, for the predictors.
        loss: What one traced step told about the model's loss, or ``None``.
        exact: Whether the exact gradient of this batch travels all the way up.
        bootstrap: Whether no exact gradients are sent for, so that biased targets have to do.
        true_share: How much of the gradient that the boundaries use is the true one, which they then wait for.
        inputs: What activations are predicted from, and by what.
        updates: Which stages are updated.
        crossings: The boundaries within this process that were crossed, in order, if ``exact``.
    """

    def __init__(self, inputs: InputBoundaries | None = None, updates: RandomUpdates | None = None) -> None:
        self.inputs = inputs or InputBoundaries(None, 0)
        self.updates = updates or RandomUpdates()
        self.context: Any = None
        self.loss: LossInfo | None = None
        self.exact = False
        self.bootstrap = False
        self.true_share = 0.0
        self.crossings: list[LocalCrossing] = []
        self._trainer: pl.Trainer | None = None

    def begin(self, trainer: pl.Trainer, context: Any, *, true_share: float) -> None:
        """A training batch begins; whether it is an exact one is for the callback to say."""
        self._trainer = trainer
        self.context = context
        self.exact = self.bootstrap = False
        self.true_share = true_share
        self.crossings = []

    def end(self) -> None:
        """The training batch is over."""
        self.context = None
        self.crossings = []

    def gradient_scale(self) -> Tensor | float:
        """The factor by which the gradients of this backward pass differ from those of the loss.

        Lightning divides the loss by the number of accumulated batches, and a gradient scaler multiplies it;
        predictors must see one scale all the time.
        """
        assert self._trainer is not None
        module = self._trainer.lightning_module
        scale: Tensor | float = 1.0
        if module.automatic_optimization:
            scale /= self._trainer.accumulate_grad_batches
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scale = scaler.scale(torch.ones((), device=self._trainer.strategy.root_device)) * scale
        return scale


__all__ = ["Step", "unscaled"]
