"""Puts given gradients into a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sg.predictors.base import Gradients

Optional = tuple[Tensor | None, ...]


def inject(
    gradients: Gradients | None, tensors: Sequence[Tensor], samples: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """A scalar zero whose gradient with respect to ``tensors`` is the given one: d⟨h, ĝ⟩/dh = ĝ.

    Args:
        gradients: One for each tensor, of its shape; ``None`` for no gradient at all.
        tensors: Where the gradients enter the graph.
        samples: What the gradients are divided by, besides the factor of the backward pass.
        dtype: Of the scalar; by default torch's.
    """
    injected: Tensor = _Inject.apply(gradients, samples, dtype, *tensors)
    return injected


def cut(backward: Callable[[Optional], Optional], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of ``tensors``; a backward pass goes on with what ``backward`` makes of the gradients that arrive."""
    copies: tuple[Tensor, ...] = _Cut.apply(backward, *tensors)
    return copies


def blocked(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """NaN in the place of ``tensors``, which are given no gradient, as those of a batch that is left out."""
    values = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    return replace(values, cut(lambda gradients: (None,) * len(gradients), tensors))


def replace(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``values`` in the place of ``tensors``, which are given the gradients of ``values``."""
    replaced: tuple[Tensor, ...] = _Replace.apply(tuple(values), *tensors)
    return replaced


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradients: Gradients | None, samples: int, dtype: torch.dtype | None, *tensors: Tensor
    ) -> Tensor:
        ctx.sg_gradients = gradients
        ctx.sg_samples = samples
        ctx.sg_dtypes = [tensor.dtype for tensor in tensors]
        return torch.zeros((), device=tensors[0].device, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        if ctx.sg_gradients is None:
            return (None, None, None, *(None for _ in ctx.sg_dtypes))
        factor = factor / ctx.sg_samples
        parts = [(part * factor).to(dtype) for part, dtype in zip(ctx.sg_gradients, ctx.sg_dtypes)]
        return (None, None, None, *parts)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: Callable[[Optional], Optional], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sg_backward = backward
        ctx.set_materialize_grads(False)  # an output that the loss does not use has no gradient, not a zero one
        # A copy, so that an in-place operation in the next stage cannot reach what the predictor learns from.
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *ctx.sg_backward(gradients))


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *gradients)


__all__ = ["Optional", "blocked", "cut", "inject", "replace"]
