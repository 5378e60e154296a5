"""How a loss model's gradient is compared with its target, and how much that counts in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_sg.arguments import check_fields, flag, number, one_of
from lightning_sg.predictors.base import Gradients
from lightning_sg.predictors.norms import at_least_a_tenth, relative_error, squared_error, squared_norm, usual_square

Measure = Literal["l2", "cosine", "normalized"]


@dataclass(frozen=True)
class Matching:
    """How a ``LossModelPredictor`` learns to match the target gradient.

    Args:
        weight: With ``objective="both"``, the weight of the gradient error; the head's own loss has weight 1.
        between: With ``objective="both"``, whether the head learns from its own loss alone on batches without an exact
            target. If not, it skips them.
        measure: The gradient error: ``"normalized"`` by the size of the batch's targets, ``"l2"`` by their running
            size, or ``"cosine"``, which ignores size; see :func:`gradient_error`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``weight`` is out of range, or there is no such measure.
    """

    weight: float = 0.5
    between: bool = True
    measure: Measure = "normalized"

    def __post_init__(self) -> None:
        measures = one_of(*get_args(Measure))
        check_fields("Matching", self, weight=number(least=0, most=1e6), between=flag(), measure=measures)

    def error(self, predictions: Gradients, targets: Gradients, rms: Tensor | None) -> Tensor:
        """The gradient error by this :attr:`measure`; see :func:`gradient_error`."""
        return gradient_error(self.measure, predictions, targets, rms)


def gradient_error(measure: Measure, predictions: Gradients, targets: Gradients, rms: Tensor | None) -> Tensor:
    r"""A dimensionless error of ``predictions``.

    All three measures and their derivatives stay finite for targets that are zero or far smaller than usual.

    Args:
        measure: ``"normalized"``: :func:`~lightning_sg.predictors.norms.relative_error`, which divides by the size of
            this batch's targets, so that every batch counts the same. ``"l2"``: the squared error over the *running*
            size of the targets, so that batches with large gradients count more. ``"cosine"``: 1 minus the cosine over
            the whole batch, which leaves the size of predictions to the callback's bound.
        predictions: Gradients of any shapes.
        targets: Gradients of the same shapes.
        rms: The running root mean square of each target, of shape ``(len(targets),)``; ``None`` uses this batch's.

    Returns:
        A scalar, float32.
    """
    if measure == "normalized":
        return relative_error(predictions, targets, rms)
    size = squared_norm(targets)
    usual = size if rms is None else usual_square(targets, rms)
    if measure == "l2":
        return squared_error(predictions, targets) / at_least_a_tenth(usual, predictions)
    size = torch.maximum(size, usual)
    dot = torch.stack([(p * t).sum() for p, t in zip(predictions, targets)]).sum()
    # A prediction of zero has an arbitrary direction. Adding a hundredth of the target's square hides it.
    own = (squared_norm(predictions) + 0.01 * size + 1e-24).sqrt()
    return 1 - dot / (own * size.sqrt().clamp_min(1e-12))


__all__ = ["Matching", "Measure", "gradient_error"]
