"""Scales activations to a range that suits a predictor's layers."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg.arguments import checked, one_of

Normalization = Literal["scale", "layer", "none"]
NORMALIZATION = one_of(*get_args(Normalization))

_MEMORY = 0.99


class InputScale(nn.Module):
    """Divides features by a running scale, normalizes each row, or does nothing.

    Args:
        kind: ``"scale"`` divides by one number, the running root mean square of all features, which preserves the
            differences between samples. ``"layer"`` is a LayerNorm without parameters, which bounds each row whatever
            the network does. ``"none"`` does nothing.

    Raises:
        ValueError: If there is no such kind.
    """

    square: Tensor

    def __init__(self, kind: Normalization) -> None:
        super().__init__()
        self.kind = checked("InputScale", "kind", kind, NORMALIZATION)
        self.register_buffer("square", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Scales ``features`` of shape ``(..., D)``."""
        if self.kind == "layer" and features.shape[-1] > 1:
            return F.layer_norm(features, features.shape[-1:])
        if self.kind == "scale":
            return features / self.square.sqrt().clamp_min(1e-12)
        return features

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Updates the running scale with one batch; the first batch sets it."""
        now = features.square().mean()
        self.square.copy_(torch.where(self.square == 0, now, _MEMORY * self.square + (1 - _MEMORY) * now))


__all__ = ["NORMALIZATION", "InputScale", "Normalization"]
