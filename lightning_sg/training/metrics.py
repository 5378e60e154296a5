"""How well predictions meet their targets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sg.predictors.base import Gradients

#: A divisor that could be zero is at least this.
TINY = 1e-30


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
    square = goal.square().clamp_min(TINY)
    error = (size.square() + goal.square() - 2 * dot).clamp_min(0) / square
    means = [(p - t).sum(0).square().sum() / max(1, p.shape[0]) for p, t in zip(prediction, targets)]
    bias = torch.stack(means).sum() / square
    return {
        "cosine": dot / (size * goal).clamp_min(TINY),
        "norm_ratio": size / goal.clamp_min(TINY),
        "bias": bias,
        "variance": (error - bias).clamp_min(0),
    }


def cosine(left: Gradients, right: Gradients) -> Tensor:
    """The cosine similarity of two gradients; 0 if either is zero."""
    return compare(left, right)["cosine"]


def norms(tensors: Gradients) -> list[Tensor]:
    """The Euclidean norm of each tensor, a scalar; they are not finite if a value is not, or if they overflow."""
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


def known_finite(sizes: Sequence[Tensor]) -> bool:
    """Whether norms on the host show that their tensors are finite. Asking any other device would stop it."""
    return sizes[0].device.type == "cpu" and all(math.isfinite(size.item()) for size in sizes)


def products(prediction: Gradients, targets: Gradients, goals: Sequence[Tensor]) -> Tensor:
    """What the cosine of prediction ĝ and target g follows from: ⟨ĝ, g⟩, ⟨ĝ, ĝ⟩ and ⟨g, g⟩, of shape ``(3,)``.

    Args:
        prediction: The prediction.
        targets: The target.
        goals: The :func:`norms` of the target.
    """
    pairs = [(p.reshape(-1), t.reshape(-1)) for p, t in zip(prediction, targets)]
    found = [torch.stack([p.dot(t), p.dot(p), goal.square()]) for (p, t), goal in zip(pairs, goals)]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def all_finite(tensors: Gradients) -> Tensor:
    """Whether ``tensors`` are free of NaN and infinity, a boolean scalar; one pass over their sums tells."""
    return torch.stack([tensor.sum() for tensor in tensors]).isfinite().all()


__all__ = ["TINY", "all_finite", "compare", "cosine", "known_finite", "norms", "products"]
