"""Building blocks of predictors."""

from __future__ import annotations

import itertools
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_sg.arguments import MOST_FEATURES, MOST_LAYERS, one_of, whole

HiddenNorm = Literal["batch", "layer", "none"]

# What the options of a predictor's layers may be.
WIDTH = whole(1, MOST_FEATURES)
DEPTH = whole(0, MOST_LAYERS)
HIDDEN_NORM = one_of(*get_args(HiddenNorm))


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of ``(..., D)``, which can leave out rows such as padding.

    A single row has no variance, so it is normalized by the running statistics.
    """

    #: Which rows count in the next pass, ``(...)``; ``None`` for all. It belongs to one batch, so it is no buffer.
    counted: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """See :class:`torch.nn.BatchNorm1d`."""
        rows = input.reshape(-1, input.shape[-1])
        if not self.training or len(rows) < 2:
            return self._normalized(rows, self.running_mean, self.running_var).view_as(input)
        if self.counted is None:
            return super().forward(rows).view_as(input)
        weights = self.counted.reshape(-1).to(rows.dtype)
        number = weights.sum()
        weights = weights / number.clamp_min(1)
        mean = weights @ rows
        variance = weights @ (rows - mean).square()
        # Stays on the device: asking it how many rows count would synchronize.
        enough = number > 1
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = (self.momentum or 0.0) * enough
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (number / (number - 1).clamp_min(1)), share)
        mean, variance = torch.where(enough, mean, self.running_mean), torch.where(enough, variance, self.running_var)
        return self._normalized(rows, mean, variance).view_as(input)

    def _normalized(self, rows: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        assert mean is not None
        assert variance is not None
        return (rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


def zero_ended(
    inputs: int, hidden: int, layers: int, outputs: int, rank: int | None = None, norm: HiddenNorm = "none"
) -> nn.Sequential:
    """Makes linear layers with ReLU between them; the last one starts at zero.

    Args:
        inputs: The width of the input.
        hidden: The width of each hidden layer.
        layers: The number of hidden layers; 0 for a single linear layer.
        outputs: The width of the output, which is zero until it is trained.
        rank: Factors the last layer's weight into two matrices of at most this rank.
        norm: What normalizes each hidden layer before its ReLU.
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
    """Makes 3 × 3 convolutions, each followed by a ReLU.

    Args:
        channels: The number of input channels.
        width: The number of output channels of each layer.
        layers: The number of layers, at least 1.
        stride: The stride of each layer.
        norm: What normalizes each layer before its ReLU: ``"batch"`` normalizes each channel over batch and cells,
            ``"layer"`` each sample.
    """
    sizes = [channels, *[width] * layers]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts.append(nn.Conv2d(before, after, 3, stride=stride, padding=1))
        if norm != "none":
            parts.append(nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(1, after))
        parts.append(nn.ReLU())
    return nn.Sequential(*parts)


__all__ = ["DEPTH", "HIDDEN_NORM", "WIDTH", "HiddenNorm", "RowBatchNorm", "convolutions", "zero_ended"]
