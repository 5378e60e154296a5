"""Squared norms of gradients, and the relative error that predictors are trained on.

Every function takes a sequence of tensors and treats it as one long vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(predictions: Sequence[Tensor], targets: Sequence[Tensor], rms: Tensor | None = None) -> Tensor:
    r"""The relative squared error :math:`\lVert ĝ - g \rVert^2 / \lVert g \rVert^2`.

    Being relative, it gives a predictor's learning rate the same meaning at every boundary and throughout training,
    whatever the size of the gradients. If ``rms`` is given, a batch whose targets are zero or far smaller than usual is
    divided by their usual size instead; otherwise that one batch would produce a gradient large enough to spoil an
    adaptive optimizer's averages for good. The divisor is also at least a hundredth of the prediction's own squared
    norm, so the error never exceeds about 100.

    Args:
        predictions: Gradients of any shapes.
        targets: Gradients of the same shapes.
        rms: The running root mean square of each target, of shape ``(len(targets),)``.

    Returns:
        A scalar, float32.
    """
    size = squared_norm(targets)
    if rms is not None:
        size = torch.maximum(size, usual_square(targets, rms))
    return squared_error(predictions, targets) / at_least_a_tenth(size, predictions)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements."""
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def squared_error(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The squared norm of the difference."""
    return squared_norm([p - t for p, t in zip(predictions, targets)])


def usual_square(targets: Sequence[Tensor], rms: Tensor) -> Tensor:
    """The squared norm that targets of these shapes usually have, given their running root mean squares."""
    return torch.stack([value.square() * target.numel() for value, target in zip(rms, targets)]).sum()


def at_least_a_tenth(size: Tensor, predictions: Sequence[Tensor]) -> Tensor:
    """Raises the squared norm ``size`` to that of a tenth of the predictions, and above zero, for use as a divisor."""
    own = squared_norm([prediction.detach() for prediction in predictions])
    return torch.maximum(size, 0.01 * own).clamp_min(1e-24)


__all__ = ["at_least_a_tenth", "relative_error", "squared_error", "squared_norm", "usual_square"]
