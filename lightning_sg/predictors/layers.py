"""The layers that predictors are made of."""

from __future__ import annotations

import itertools

from torch import nn


def zero_ended(inputs: int, hidden: int, layers: int, outputs: int, rank: int | None = None) -> nn.Sequential:
    """Linear layers with ReLU between them, the last of which starts at zero.

    Args:
        inputs: Width of the input.
        hidden: Width of each hidden layer.
        layers: Number of hidden layers; 0 for a single linear layer.
        outputs: Width of the output, zero until it is trained.
        rank: Makes the last layer's weight a product of two matrices with so many columns and rows between them.
    """
    sizes = [inputs, *[hidden] * layers]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts += [nn.Linear(before, after), nn.ReLU()]
    if rank is not None:
        parts.append(nn.Linear(sizes[-1], rank, bias=False))
    last = nn.Linear(rank or sizes[-1], outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)


def convolutions(channels: int, width: int, layers: int, stride: int) -> nn.Sequential:
    """Convolutions of 3 × 3, each with a ReLU.

    Args:
        channels: Channels of the input.
        width: Channels of each layer's output.
        layers: Number of layers, at least 1.
        stride: That of every layer.
    """
    sizes = [channels, *[width] * layers]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*parts)


__all__ = ["convolutions", "zero_ended"]
