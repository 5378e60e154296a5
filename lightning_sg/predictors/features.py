"""Turns activations and context of any shape into rows of features for a predictor's layers.

Legend: N samples, T positions, C channels, H W height and width, D features, K classes, P rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg.predictors.base import Gradients, LossInfo


def as_rows(tensor: Tensor) -> Tensor:
    """One row for each position that shares its weights with the others.

    Args:
        tensor: ``(N, D)``, ``(N, T, D)``, ``(N, C, H, W)`` or ``(N,)``; anything else is one row a sample.

    Returns:
        ``(N, D)``, ``(N, T, D)``, ``(N, H, W, C)``, ``(N, 1)``, or ``(N, all the rest)``.
    """
    if tensor.ndim == 1:
        return tensor.unsqueeze(-1)
    if tensor.ndim == 4:
        return tensor.movedim(1, -1)
    if tensor.ndim in (2, 3):
        return tensor
    return tensor.flatten(1)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`as_rows`: gives ``rows`` the shape of ``like``."""
    return rows.movedim(-1, 1) if like.ndim == 4 else rows.reshape(like.shape)


def join_rows(activations: Gradients) -> Tensor:
    """Several activations side by side, position by position where they have the same positions.

    Args:
        activations: Tensors of shape ``(N, ...)``; others may have the samples second, as an LSTM's states
            ``(layers, N, D)`` do.

    Returns:
        ``(..., D_1 + D_2 + ...)`` if all have the same leading dimensions, else ``(N, all features)``.
    """
    rows = [as_rows(activation) for activation in activations]
    if len(rows) == 1:
        return rows[0]
    if any(row.shape[:-1] != rows[0].shape[:-1] for row in rows):
        samples = activations[0].shape[0]
        rows = [_samples_first(activation, samples).flatten(1) for activation in activations]
    return torch.cat(rows, dim=-1)


def split_rows(rows: Tensor, like: Gradients) -> Gradients:
    """The inverse of :func:`join_rows`."""
    shapes = [as_rows(activation).shape for activation in like]
    if all(shape[:-1] == rows.shape[:-1] for shape in shapes):
        parts = rows.split([shape[-1] for shape in shapes], dim=-1)
        return tuple(from_rows(part, activation) for part, activation in zip(parts, like))
    samples = like[0].shape[0]
    parts = rows.split([activation.numel() // samples for activation in like], dim=-1)
    gradients = []
    for part, activation in zip(parts, like):
        first = _samples_first(activation, samples)
        part = part.reshape(first.shape)
        gradients.append(part if first.shape == activation.shape else part.movedim(0, 1))
    return tuple(gradients)


def _samples_first(tensor: Tensor, samples: int) -> Tensor:
    """``(N, ...)`` from ``(N, ...)`` or ``(L, N, ...)``."""
    if tensor.shape[0] != samples and tensor.ndim > 1 and tensor.shape[1] == samples:
        return tensor.movedim(1, 0)
    return tensor


def count_classes(labels: Tensor, loss: LossInfo | None) -> int:
    """The number of classes: from the model's own cross-entropy if it was seen, else from the labels."""
    if loss is not None and loss.kind == "cross_entropy":
        return loss.outputs
    return int(labels.max()) + 1


def context_features(context: Tensor, classes: int | None) -> Tensor:
    """Context as features: integer labels one-hot, anything else flattened per sample.

    Args:
        context: ``(N,)`` or ``(N, T)`` integer labels, or a float tensor of shape ``(N, ...)``.
        classes: The number of classes K for integer labels.

    Returns:
        ``(N, K)``, ``(N, T, K)``, or ``(N, D)``, float32. Labels outside ``0 .. K-1`` (an ``ignore_index``)
        become zero rows.
    """
    if classes is not None:
        known = (context >= 0) & (context < classes)
        return F.one_hot(context.clamp(0, classes - 1).long(), classes) * known.unsqueeze(-1).float()
    return context.float().reshape(context.shape[0], -1)


def is_label(context: Tensor) -> bool:
    """Whether ``context`` holds class labels rather than numbers."""
    return not context.is_floating_point() and not context.is_complex()


def beside(rows: Tensor, context: Tensor) -> Tensor:
    """Puts each sample's context beside every row of that sample.

    Args:
        rows: ``(N, ..., D)``.
        context: ``(N, K)``, or ``(N, ..., K)`` with the positions of ``rows``.

    Returns:
        ``(N, ..., D + K)``.
    """
    if context.shape[:-1] != rows.shape[:-1]:
        if context.ndim != 2:
            context = context.flatten(1)
        context = context.reshape(context.shape[0], *([1] * (rows.ndim - 2)), context.shape[-1])
        context = context.expand(*rows.shape[:-1], context.shape[-1])
    return torch.cat([rows, context], dim=-1)


__all__ = [
    "as_rows",
    "beside",
    "context_features",
    "count_classes",
    "from_rows",
    "is_label",
    "join_rows",
    "split_rows",
]
