"""States of any shape as rows, one for each sample, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sg.predictors.base import Gradients
from lightning_sg.recurrent.boundary import Which


def to_rows(tensors: Sequence[Tensor], dims: Sequence[int]) -> Gradients:
    """The samples first, and where they were not, one row each: an LSTM's ``(layers, N, D)`` as ``(N, layers * D)``.

    Args:
        tensors: Of any shapes.
        dims: For each, the dimension of its samples.
    """
    return tuple(tensor.movedim(dim, 0).flatten(1) if dim else tensor for tensor, dim in zip(tensors, dims))


def from_rows(rows: Sequence[Tensor], like: Sequence[Tensor], dims: Sequence[int]) -> Gradients:
    """The inverse of :func:`to_rows`, in the shapes and dtypes of ``like``."""
    tensors = []
    for row, tensor, dim in zip(rows, like, dims):
        first = tensor.movedim(dim, 0).shape
        tensors.append(row.reshape(first).movedim(0, dim).to(tensor.dtype))
    return tuple(tensors)


def going_on(last: Which) -> Tensor | None:
    """The numbers of the samples after which something follows; ``None`` for all of them."""
    if not isinstance(last, Tensor):
        return torch.zeros(0, dtype=torch.long) if last else None
    return (~last).nonzero().flatten()


def choose(rows: Gradients, numbers: Tensor | None) -> Gradients:
    """The rows of some samples."""
    return rows if numbers is None else tuple(row[numbers] for row in rows)


def spread(rows: Gradients, numbers: Tensor | None, samples: int) -> Gradients:
    """The inverse of :func:`choose`, with zeros for the other samples."""
    if numbers is None:
        return rows
    return tuple(row.new_zeros(samples, *row.shape[1:]).index_copy(0, numbers, row) for row in rows)


__all__ = ["choose", "from_rows", "going_on", "spread", "to_rows"]
