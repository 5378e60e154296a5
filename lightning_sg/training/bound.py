"""The bound on predictions, relative to the targets seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sg.predictors.base import Gradients
from lightning_sg.replicas import Replicas
from lightning_sg.training.metrics import norms


class TargetScale:
    """The running size of the targets at one boundary, and the bound that it puts on predictions.

    The rule: the root mean square of a prediction is at most ``bound`` times that of the targets, an exponential
    average over their squares in which recent targets weigh more. Without a bound the prediction error feeds on itself
    in networks without normalisation layers, and ends in NaN.

    Args:
        bound: The largest ratio of prediction to target.
        decay: The weight of the past in the average; 0.9 remembers about ten targets.
    """

    def __init__(self, bound: float = 1.0, decay: float = 0.9) -> None:
        self.bound = bound
        self.decay = decay
        self._sum: Tensor | None = None  # decayed sum of mean squares, one for each activation
        self._weight = 0.0
        self._rms: Tensor | None = None

    @property
    def rms(self) -> Tensor | None:
        """The running root mean square, one for each activation; ``None`` before the first target."""
        return self._rms

    def update(
        self, targets: Gradients, replicas: Replicas | None = None, sizes: Sequence[Tensor] | None = None
    ) -> None:
        """Adds one batch's targets, of all replicas together, to the average.

        Args:
            targets: The targets.
            replicas: The replicas.
            sizes: The norms of the targets, if they are known.
        """
        sizes = norms(targets) if sizes is None else sizes
        squares = torch.stack([size.square() / target.numel() for size, target in zip(sizes, targets)])
        if replicas is not None:
            (squares,) = replicas.average([squares])
        self._sum = squares if self._sum is None else self._sum * self.decay + squares
        self._weight = self._weight * self.decay + 1.0
        self._rms = (self._sum / self._weight).sqrt()

    def limit(self, predictions: Gradients, sizes: Sequence[Tensor] | None = None) -> Gradients:
        """Shrinks each prediction to the bound; before the first target the bound is zero.

        Args:
            predictions: The predictions.
            sizes: Their norms, if they are known.
        """
        if self._rms is None:
            return tuple(torch.zeros_like(prediction) for prediction in predictions)
        limited = []
        for prediction, own, usual in zip(predictions, sizes or norms(predictions), self._rms.unbind()):
            most = usual * (self.bound * math.sqrt(prediction.numel()))
            if own.device.type == "cpu" and own <= most:  # any other device would stop for the answer
                limited.append(prediction)
            else:
                limited.append(prediction * (most / own.clamp_min(1e-30)).clamp_max(1.0))
        return tuple(limited)

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores :meth:`state_dict`."""
        self._sum = None if state["sum"] is None else state["sum"].to(device)
        self._weight = state["weight"]
        self._rms = None if self._sum is None else (self._sum / self._weight).sqrt()


__all__ = ["TargetScale"]
