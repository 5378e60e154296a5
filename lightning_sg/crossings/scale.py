"""The factor between the gradients of a backward pass and those of the mean loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sg.lightning_api import pl
from lightning_sg.predictors.base import Gradients


@dataclass(frozen=True)
class GradientScale:
    """What Lightning multiplies the loss by before it goes backward.

    It divides the loss by the number of accumulated batches, and a gradient scaler multiplies it. Predictors must see
    one scale all the time.

    Attributes:
        factor: The factor on the gradients of the current backward pass.
    """

    factor: Tensor | float = 1.0

    @classmethod
    def of(cls, trainer: pl.Trainer) -> GradientScale:
        """The scale of the batch that ``trainer`` is at."""
        factor: Tensor | float = 1.0
        if trainer.lightning_module.automatic_optimization:
            factor /= trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            factor = scaler.scale(torch.ones((), device=trainer.strategy.root_device)) * factor
        return cls(factor)

    def removed(self, gradient: Tensor) -> Tensor:
        """A gradient of the mean loss, from one of the backward pass.

        One in float16 comes back as float32: it has the factor because it vanishes without.
        """
        if isinstance(self.factor, float) and self.factor == 1.0:
            return gradient
        return (gradient.float() if gradient.dtype == torch.float16 else gradient) / self.factor

    def all_removed(self, gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
        """:meth:`removed` for each gradient; ``None`` stays."""
        return tuple(None if gradient is None else self.removed(gradient) for gradient in gradients)

    def applied(self, per_sample: Gradients, samples: int, dtypes: Iterable[torch.dtype]) -> Gradients:
        """Gradients of the backward pass, from per-sample ones.

        Args:
            per_sample: Gradients of the sum of the samples' losses.
            samples: The number of samples N.
            dtypes: Of the activations, one for each gradient.
        """
        factor = self.factor / samples
        return tuple((part * factor).to(dtype) for part, dtype in zip(per_sample, dtypes))


__all__ = ["GradientScale"]
