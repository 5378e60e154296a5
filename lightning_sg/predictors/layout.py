"""The order of dimensions in which predictors see sequences."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_sg.predictors.base import Gradients


@dataclass(frozen=True)
class Layout:
    """Which of the tensors at a boundary are ``(N, C, T)``: predictors see all sequences as ``(N, T, C)``.

    Attributes:
        channels_second: The places of these tensors among those that can carry a gradient.
    """

    channels_second: frozenset[int] = frozenset()

    def turned(self, tensors: Gradients) -> Gradients:
        """Activations or gradients in the order of predictors, from that of the model, or the other way round."""
        if not self.channels_second:
            return tensors
        return tuple(
            tensor.transpose(1, 2) if place in self.channels_second else tensor for place, tensor in enumerate(tensors)
        )


__all__ = ["Layout"]
