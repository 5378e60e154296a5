"""How the gradient of a predictor is compared with its target, for training it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_sg.predictors.base import (
    Gradients,
    at_least_a_tenth,
    relative_error,
    squared_error,
    squared_norm,
    usual_square,
)

Match = Literal["l2", "cosine", "normalized"]


def check_match(match: str) -> None:
    """Refuses an unknown name.

    Raises:
        ValueError: If ``match`` is not one of :data:`Match`.
    """
    if match not in get_args(Match):
        raise ValueError(f"match must be 'l2', 'cosine' or 'normalized', not '{match}'.")


def gradient_error(match: Match, predictions: Gradients, targets: Gradients, rms: Tensor | None) -> Tensor:
    r"""The error of ``predictions``, without a unit.

    All three stay finite for targets that are zero or far smaller than usual, and so do their derivatives.

    Args:
        match: ``"normalized"``: :func:`~lightning_sg.predictors.base.relative_error`, by the size of this batch's
            targets, in which every batch counts the same. ``"l2"``: the squared error by the *running* size of the
            targets, in which batches with large gradients count more. ``"cosine"``: 1 minus the cosine over the whole
            batch, which leaves the size of predictions to the callback's bound.
        predictions: Gradients of any shapes.
        targets: Gradients of the same shapes.
        rms: The running root mean square of the targets, one for each; ``None`` takes this batch's.

    Returns:
        A scalar, float32.
    """
    if match == "normalized":
        return relative_error(predictions, targets, rms)
    size = squared_norm(targets)
    usual = size if rms is None else usual_square(targets, rms)
    if match == "l2":
        return squared_error(predictions, targets) / at_least_a_tenth(usual, predictions)
    size = torch.maximum(size, usual)
    dot = torch.stack([(p * t).sum() for p, t in zip(predictions, targets)]).sum()
    # A hundredth of the target's square: the direction of a prediction of zero is anything, and must not matter.
    own = (squared_norm(predictions) + 0.01 * size + 1e-24).sqrt()
    return 1 - dot / (own * size.sqrt().clamp_min(1e-12))


__all__ = ["Match", "check_match", "gradient_error"]
