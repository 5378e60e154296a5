"""How well predictions meet their targets."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sg.predictors.base import Gradients

_TINY = 1e-30


def compare(prediction: Gradients, targets: Gradients) -> dict[str, Tensor]:
    r"""How well a prediction meets its target.

    With the error :math:`e_n = ĝ_n - g_n` of sample n, ``bias`` is :math:`\lVert \bar e \rVert^2` and ``variance``
    the mean of :math:`\lVert e_n - \bar e \rVert^2`, both over the mean of :math:`\lVert g_n \rVert^2`. A weight sees
    the mean over samples: ``bias`` is what that mean keeps of the error, ``variance`` what it averages out. Their sum
    is the relative squared error.

    Args:
        prediction: Synthetic gradients of any shapes, ``(N, ...)``.
        targets: Targets of the same shapes.

    Returns:
        Scalars ``cosine`` (similarity, -1 to 1; 0 if either is zero), ``norm_ratio`` (of prediction to target),
        ``bias`` and ``variance``.
    """
    dot = torch.stack([torch.dot(p.reshape(-1), t.reshape(-1)) for p, t in zip(prediction, targets)]).sum()
    size = torch.stack([torch.linalg.vector_norm(p) for p in prediction]).norm()
    goal = torch.stack([torch.linalg.vector_norm(t) for t in targets]).norm()
    square = goal.square().clamp_min(_TINY)
    error = (size.square() + goal.square() - 2 * dot).clamp_min(0) / square
    means = [(p - t).sum(0).square().sum() / max(1, p.shape[0]) for p, t in zip(prediction, targets)]
    bias = torch.stack(means).sum() / square
    return {
        "cosine": dot / (size * goal).clamp_min(_TINY),
        "norm_ratio": size / goal.clamp_min(_TINY),
        "bias": bias,
        "variance": (error - bias).clamp_min(0),
    }


def cosine(left: Gradients, right: Gradients) -> Tensor:
    """The cosine similarity of two gradients; 0 if either is zero."""
    return compare(left, right)["cosine"]


def mean_square(tensor: Tensor) -> Tensor:
    """The mean of the squares, in one pass and without a copy."""
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat) / flat.numel()


def all_finite(tensors: Gradients) -> Tensor:
    """Whether ``tensors`` are free of NaN and infinity, a boolean scalar; one pass over their sums tells."""
    return torch.stack([tensor.sum() for tensor in tensors]).isfinite().all()


__all__ = ["all_finite", "compare", "cosine", "mean_square"]
