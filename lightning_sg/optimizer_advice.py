"""Warns of optimizers that lose most of what late gradients are worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from lightning_sg.lightning_api import rank_zero_warn


def warn_of_adam(optimizers: Sequence[Optimizer]) -> None:
    """Says, if the model trains with Adam or AdamW, what suits gradients that come late.

    Their momentum looks back: a gradient that is some batches old pushes further where the weights have gone already.
    Nesterov's momentum evaluates it a step ahead. See docs/late.md for what that is worth.

    Args:
        optimizers: The model's.
    """
    names = {type(optimizer).__name__ for optimizer in optimizers if isinstance(optimizer, _LOOK_BACK)}
    if names:
        rank_zero_warn(
            f"Late gradients meet {' and '.join(sorted(names))}, with which they do far worse than with an optimizer "
            "that looks ahead: torch.optim.NAdam(parameters, lr, betas=(0.95, 0.999), decoupled_weight_decay=True)."
        )


# AdamW is a kind of Adam in newer versions of torch only.
_LOOK_BACK = (torch.optim.Adam, torch.optim.AdamW)

__all__ = ["warn_of_adam"]
