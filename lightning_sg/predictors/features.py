"""Turns activations and context of any shape into rows of features for a predictor's layers.

Legend: N samples, T positions, C channels, H W height and width, D features, K classes, P rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg.predictors.base import Gradients, LossInfo


def as_rows(tensor: Tensor) -> Tensor:
    """Turns a tensor into rows of features, one for each sample, position or cell.

    Args:
        tensor: ``(N, D)``, ``(N, T, D)``, ``(N, C, H, W)`` or ``(N,)``. Any other shape becomes one row a sample.

    Returns:
        ``(N, D)``, ``(N, T, D)``, ``(N, H, W, C)``, ``(N, 1)``, or ``(N, all features)``.
    """
    if tensor.ndim == 1:
        return tensor.unsqueeze(-1)
    if tensor.ndim == 4:
        return tensor.movedim(1, -1)
    if tensor.ndim in (2, 3):
        return tensor
    return tensor.flatten(1)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Inverts :func:`as_rows`: gives ``rows`` the shape of ``like``."""
    return rows.movedim(-1, 1) if like.ndim == 4 else rows.reshape(like.shape)


def join_rows(activations: Gradients) -> Tensor:
    """Concatenates activations, position by position if all have the same positions.

    Args:
        activations: Tensors of shape ``(N, ...)``. All but the first may have samples second, as an LSTM's states
            ``(layers, N, D)`` do. Others are left out, such as these states beside a packed sequence.

    Returns:
        ``(..., D_1 + D_2 + ...)`` if all have the same leading dimensions, else ``(N, all features)``.
    """
    rows = [as_rows(activation) for activation in activations]
    if len(rows) == 1:
        return rows[0]
    if any(row.shape[:-1] != rows[0].shape[:-1] for row in rows):
        samples = activations[0].shape[0]
        first = [_samples_first(activation, samples) for activation in activations]
        rows = [activation.flatten(1) for activation in first if activation.shape[0] == samples]
    return torch.cat(rows, dim=-1)


def split_rows(rows: Tensor, like: Gradients) -> Gradients:
    """Inverts :func:`join_rows`: splits ``rows`` into tensors of the shapes of ``like``."""
    shapes = [as_rows(activation).shape for activation in like]
    if all(shape[:-1] == rows.shape[:-1] for shape in shapes):
        parts = rows.split([shape[-1] for shape in shapes], dim=-1)
        return tuple(from_rows(part, activation) for part, activation in zip(parts, like))
    samples = like[0].shape[0]
    firsts = [_samples_first(activation, samples) for activation in like]
    seen = [first for first in firsts if first.shape[0] == samples]
    parts = iter(rows.split([first.numel() // samples for first in seen], dim=-1))
    gradients = []
    for first, activation in zip(firsts, like):
        if first.shape[0] != samples:
            gradients.append(torch.zeros_like(activation))
            continue
        gradients.append(next(parts).reshape(first.shape).movedim(0, sample_dimension(activation, samples)))
    return tuple(gradients)


def sample_dimension(tensor: Tensor, samples: int) -> int:
    """The dimension of the samples: 0 in ``(N, ...)``, 1 in ``(L, N, ...)``."""
    return int(tensor.shape[0] != samples and tensor.ndim > 1 and tensor.shape[1] == samples)


def _samples_first(tensor: Tensor, samples: int) -> Tensor:
    """Moves samples to the front: ``(N, ...)`` from ``(N, ...)`` or ``(L, N, ...)``."""
    return tensor.movedim(sample_dimension(tensor, samples), 0)


def count_classes(labels: Tensor, loss: LossInfo | None) -> int:
    """The number of classes, from the model's own cross-entropy if it is known, otherwise from the labels."""
    if loss is not None and loss.kind == "cross_entropy":
        return loss.outputs
    return int(labels.max()) + 1


def context_features(context: Tensor, classes: int | None) -> Tensor:
    """Turns context into features: integer labels become one-hot, anything else is flattened per sample.

    Args:
        context: ``(N,)`` or ``(N, T)`` integer labels, or a float tensor of shape ``(N, ...)``.
        classes: The number of classes K for integer labels, otherwise ``None``.

    Returns:
        ``(N, K)``, ``(N, T, K)``, or ``(N, D)``, float32. Labels outside ``0 .. K-1``, such as an
        ``ignore_index``, become rows of zeros.
    """
    if classes is not None:
        known = (context >= 0) & (context < classes)
        return F.one_hot(context.clamp(0, classes - 1).long(), classes) * known.unsqueeze(-1).float()
    return context.float().reshape(context.shape[0], -1)


def is_label(context: Tensor) -> bool:
    """Whether ``context`` holds class labels: it is neither floating point nor complex."""
    return not context.is_floating_point() and not context.is_complex()


def beside(rows: Tensor, context: Tensor) -> Tensor:
    """Puts each sample's context beside every row of that sample.

    Args:
        rows: ``(N, ..., D)``.
        context: ``(N, K)``, or ``(N, ..., K)`` with the same positions as ``rows``.

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
    "sample_dimension",
    "split_rows",
]
