"""Says which optimizers late gradients are worth most with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from lightning_sg.crossings.late import usual_share
from lightning_sg.lightning_api import rank_zero_info, rank_zero_warn

_WHAT_LOOKS_AHEAD = "torch.optim.NAdam(parameters, lr, betas=(0.95, 0.999), decoupled_weight_decay=True)"


def advise_on_late_gradients(optimizers: Sequence[Optimizer], *, share: float | None) -> None:
    """Warns, if the model trains with Adam or AdamW, of late gradients with much weight; says what suits them.

    Momentum of Adam's kind looks back: a gradient that is some batches old pushes further where the weights have gone
    already. Nesterov's momentum evaluates it a step ahead. See docs/late.md for what that is worth.

    Args:
        optimizers: The model's.
        share: The weight of a late gradient; ``None`` for the usual one, which depends on the optimizers.
    """
    names = {type(optimizer).__name__ for optimizer in optimizers if isinstance(optimizer, _LOOK_BACK)}
    usual = usual_share(optimizers)
    if not names or (share is not None and share <= usual):
        return
    looking_back = " and ".join(sorted(names))
    if share is None:
        rank_zero_info(
            f"With {looking_back}, late gradients have a weight of {usual:g} while the learning rate is highest. An "
            f"optimizer that looks ahead takes more of them, and gains more: {_WHAT_LOOKS_AHEAD}."
        )
        return
    rank_zero_warn(
        f"Late gradients meet {looking_back}, with which they do far worse than with an optimizer that looks ahead: "
        f"{_WHAT_LOOKS_AHEAD}. With {looking_back}, use LateGradients() as it is: its share is {usual:g} then."
    )


# AdamW is a kind of Adam in newer versions of torch only.
_LOOK_BACK = (torch.optim.Adam, torch.optim.AdamW)

__all__ = ["advise_on_late_gradients"]
