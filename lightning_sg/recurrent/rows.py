"""Turns states of any shape into rows, one per sample, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_sg.predictors.base import Gradients


def to_rows(tensors: Sequence[Tensor], dims: Sequence[int]) -> Gradients:
    """Moves the samples first, and flattens where they were not: ``(layers, N, D)`` becomes ``(N, layers * D)``.

    Args:
        tensors: The tensors, of any shape.
        dims: The sample dimension of each tensor.
    """
    return tuple(tensor.movedim(dim, 0).flatten(1) if dim else tensor for tensor, dim in zip(tensors, dims))


def from_rows(rows: Sequence[Tensor], like: Sequence[Tensor], dims: Sequence[int]) -> Gradients:
    """The inverse of :func:`to_rows`, in the shapes and dtypes of ``like``."""
    tensors = []
    for row, tensor, dim in zip(rows, like, dims):
        first = tensor.movedim(dim, 0).shape
        tensors.append(row.reshape(first).movedim(0, dim).to(tensor.dtype))
    return tuple(tensors)


def choose(rows: Gradients, numbers: Tensor | None) -> Gradients:
    """The rows of the samples with these indices; ``None`` for all."""
    return rows if numbers is None else tuple(row[numbers] for row in rows)


def spread(rows: Gradients, numbers: Tensor | None, samples: int) -> Gradients:
    """The inverse of :func:`choose`, with zeros for all other samples."""
    if numbers is None:
        return rows
    return tuple(row.new_zeros(samples, *row.shape[1:]).index_copy(0, numbers, row) for row in rows)


__all__ = ["choose", "from_rows", "spread", "to_rows"]
