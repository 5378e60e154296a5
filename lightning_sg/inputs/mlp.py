"""The default input predictor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sg.arguments import checked
from lightning_sg.inputs.base import Activations, InputPredictor
from lightning_sg.predictors.layers import DEPTH, HIDDEN_NORM, WIDTH, HiddenNorm, zero_ended
from lightning_sg.predictors.normalize import InputScale

_MEMORY = 0.99


class MLPInputPredictor(InputPredictor):
    """Predicts the activations from the flattened input of the batch with a small network.

    Each activation is predicted as its running mean plus the network's output times its running standard deviation.
    The network's last layer starts at zero, so that an untrained network predicts the mean.

    Args:
        hidden: Width of the hidden layers.
        layers: Number of hidden layers; 0 makes the predictor linear.
        hidden_norm: What normalises each hidden layer before its ReLU: ``"batch"``, ``"layer"`` or ``"none"``.
    """

    mean: Tensor
    square: Tensor
    seen: Tensor

    def __init__(self, hidden: int = 256, layers: int = 2, hidden_norm: HiddenNorm = "batch") -> None:
        super().__init__()
        name = type(self).__name__
        self.hidden = checked(name, "hidden", hidden, WIDTH)
        self.layers = checked(name, "layers", layers, DEPTH)
        self.hidden_norm: HiddenNorm = checked(name, "hidden_norm", hidden_norm, HIDDEN_NORM)
        self.scale = InputScale("scale")

    def build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        """Makes the layers, with one output per number in a sample's activations."""
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes]
        outputs = sum(self.sizes)
        rows = features.flatten(1)
        if not rows.shape[1] or not outputs:
            raise ValueError("there is nothing to predict from, or nothing to predict: a size is zero")
        self.scale.update(rows)
        self.net = zero_ended(rows.shape[1], self.hidden, self.layers, outputs, norm=self.hidden_norm)
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("square", torch.zeros(outputs))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features: Tensor) -> Activations:
        """See :meth:`InputPredictor.forward`."""
        rows = self.net(self.scale(features.flatten(1)))
        deviation = (self.square - self.mean.square()).clamp_min(0).sqrt()
        parts = (self.mean + deviation * rows).split(self.sizes, dim=1)
        return tuple(part.unflatten(1, shape) if shape else part[:, 0] for part, shape in zip(parts, self.shapes))

    def loss(self, features: Tensor, activations: Activations) -> Tensor:
        """See :meth:`InputPredictor.loss`; first updates the running mean and deviation."""
        self.scale.update(features.flatten(1))
        self._take(
            torch.cat(
                [activation.flatten(1) if activation.ndim > 1 else activation[:, None] for activation in activations],
                dim=1,
            )
        )
        return super().loss(features, activations)

    @torch.no_grad()
    def _take(self, rows: Tensor) -> None:
        self.seen += 1
        share = torch.maximum(1 / self.seen, torch.full_like(self.seen, 1 - _MEMORY))  # at first a plain mean
        self.mean.lerp_(rows.mean(0), share)
        self.square.lerp_(rows.square().mean(0), share)


__all__ = ["MLPInputPredictor"]
