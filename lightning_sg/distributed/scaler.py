"""The gradient scaler of ``precision="16-mixed"`` in a process that may have no gradients in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class StageScaler(torch.amp.GradScaler):
    """Scales as torch's own scaler does, but skips the step of an optimizer without gradients.

    In one process the last stage always has gradients. A process with other stages has none while its predictors
    predict nothing, which torch's scaler treats as an error.
    """

    def __init__(self, device: torch.device, like: Any) -> None:
        super().__init__(
            device.type,
            init_scale=like.get_scale(),
            growth_factor=like.get_growth_factor(),
            backoff_factor=like.get_backoff_factor(),
            growth_interval=like.get_growth_interval(),
            enabled=like.is_enabled(),
        )
        self._checked = False

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divides the gradients by the scale, and looks for infinities."""
        if _has_gradients(optimizer):
            self._checked = True
            super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Takes the optimizer's step unless a gradient is not finite, or there is none."""
        if not _has_gradients(optimizer):
            return None
        self._checked = True
        result: float | None = super().step(optimizer, *args, **kwargs)
        return result

    def update(self, new_scale: Any = None) -> None:
        """Adapts the scale to this step's gradients, if there were any."""
        if self._checked or new_scale is not None:
            super().update(new_scale)
        self._checked = False


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


__all__ = ["StageScaler"]
