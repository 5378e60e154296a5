"""The layers that predictors are made of."""

from __future__ import annotations

import itertools

from torch import nn


def zero_ended(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between them, the last of which starts at zero.

    Args:
        inputs: Width of the input.
        hidden: Width of each hidden layer.
        layers: Number of hidden layers; 0 for a single linear layer.
        outputs: Width of the output, zero until it is trained.
    """
    sizes = [inputs, *[hidden] * layers, outputs]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts += [nn.Linear(before, after), nn.ReLU()]
    last = parts[-2]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts[:-1])


__all__ = ["zero_ended"]
