"""Brings activations to a scale that a predictor's layers can work with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Normalization = Literal["scale", "layer", "none"]

_MEMORY = 0.99


class InputScale(nn.Module):
    """Divides features by a running scale, normalises each row, or does nothing.

    Args:
        kind: ``"scale"``: by one number, the running root mean square of all features, which keeps what sets
            samples apart. ``"layer"``: a LayerNorm without parameters, which bounds the input of each row whatever
            the network does. ``"none"``: nothing.
    """

    square: Tensor

    def __init__(self, kind: Normalization) -> None:
        super().__init__()
        if kind not in ("scale", "layer", "none"):
            raise ValueError(f"normalize must be 'scale', 'layer' or 'none', not '{kind}'.")
        self.kind = kind
        self.register_buffer("square", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Normalises ``features`` of shape ``(..., D)``."""
        if self.kind == "layer" and features.shape[-1] > 1:
            return F.layer_norm(features, features.shape[-1:])
        if self.kind == "scale":
            return features / self.square.sqrt().clamp_min(1e-12)
        return features

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Takes one batch into the running scale; the first sets it."""
        now = features.square().mean()
        self.square.copy_(torch.where(self.square == 0, now, _MEMORY * self.square + (1 - _MEMORY) * now))


__all__ = ["InputScale", "Normalization"]
