"""The layers that predictors are made of."""

from __future__ import annotations

import itertools
from typing import Literal, get_args

import torch
from torch import Tensor, nn

HiddenNorm = Literal["batch", "layer", "none"]


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of ``(..., D)``, of which some may not count: padding, say.

    A lone row has no spread: it is normalised by the running statistics.
    """

    #: Which rows count in the next pass, ``(...)``; ``None`` for all. No buffer: it belongs to one batch.
    counted: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """See :class:`torch.nn.BatchNorm1d`."""
        rows = input.reshape(-1, input.shape[-1])
        if not self.training or len(rows) < 2:
            return self._normalised(rows, self.running_mean, self.running_var).view_as(input)
        if self.counted is None:
            return super().forward(rows).view_as(input)
        weights = self.counted.reshape(-1).to(rows.dtype)
        number = weights.sum()
        weights = weights / number.clamp_min(1)
        mean = weights @ rows
        variance = weights @ (rows - mean).square()
        # Without asking a device how many rows count, which would stop it.
        enough = number > 1
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            share = (self.momentum or 0.0) * enough
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (number / (number - 1).clamp_min(1)), share)
        mean, variance = torch.where(enough, mean, self.running_mean), torch.where(enough, variance, self.running_var)
        return self._normalised(rows, mean, variance).view_as(input)

    def _normalised(self, rows: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        assert mean is not None
        assert variance is not None
        return (rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


def check_hidden_norm(kind: str) -> None:
    """Refuses an unknown name.

    Raises:
        ValueError: If ``kind`` is not one of :data:`HiddenNorm`.
    """
    if kind not in get_args(HiddenNorm):
        raise ValueError(f"hidden_norm must be 'batch', 'layer' or 'none', not '{kind}'.")


def zero_ended(
    inputs: int, hidden: int, layers: int, outputs: int, rank: int | None = None, norm: HiddenNorm = "none"
) -> nn.Sequential:
    """Linear layers with ReLU between them, the last of which starts at zero.

    Args:
        inputs: Width of the input.
        hidden: Width of each hidden layer.
        layers: Number of hidden layers; 0 for a single linear layer.
        outputs: Width of the output, zero until it is trained.
        rank: Makes the last layer's weight a product of two matrices with so many columns and rows between them.
        norm: What normalises each hidden layer before its ReLU.
    """
    sizes = [inputs, *[hidden] * layers]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts.append(nn.Linear(before, after))
        if norm != "none":
            parts.append(RowBatchNorm(after) if norm == "batch" else nn.LayerNorm(after))
        parts.append(nn.ReLU())
    if rank is not None:
        parts.append(nn.Linear(sizes[-1], rank, bias=False))
    last = nn.Linear(rank or sizes[-1], outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)


def convolutions(channels: int, width: int, layers: int, stride: int, norm: HiddenNorm = "none") -> nn.Sequential:
    """Convolutions of 3 × 3, each with a ReLU.

    Args:
        channels: Channels of the input.
        width: Channels of each layer's output.
        layers: Number of layers, at least 1.
        stride: That of every layer.
        norm: What normalises each layer before its ReLU: the channels over batch and cells, or each sample.
    """
    sizes = [channels, *[width] * layers]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts.append(nn.Conv2d(before, after, 3, stride=stride, padding=1))
        if norm != "none":
            parts.append(nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(1, after))
        parts.append(nn.ReLU())
    return nn.Sequential(*parts)


__all__ = ["HiddenNorm", "RowBatchNorm", "check_hidden_norm", "convolutions", "zero_ended"]
