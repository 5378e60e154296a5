"""Predictors and exact gradients leave the precision of the model's own operations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block in which operations keep the dtype of their inputs.

    Entering and leaving ``torch.autocast`` costs as much as several operations, so it is left out where it would change
    nothing.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


__all__ = ["without_autocast"]
