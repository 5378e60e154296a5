"""A small convolutional network for MNIST and for its harder images, cut after every layer or into fewer stages."""

from __future__ import annotations

import torch
from torch import nn

from examples.mnist import CLASSES, Cuts, ImageClassifier, places_to_cut
from lightning_sg import Boundary

_SIDE = 28


class MnistCNN(ImageClassifier):
    """Two convolutions and two dense layers, with BatchNorm: three places to cut.

    Args:
        channels: Channels of the two convolutions; each is followed by pooling to half the side.
        width: Width of the dense layer before the last.
        learning_rate: Adam's at the start; it falls to zero along a cosine.
        cuts: Where the boundaries are: after ``"every"`` layer but the last, in the ``"middle"`` (after the
            convolutions), or at ``"none"``. After every layer makes ``"four"`` stages.
    """

    def __init__(
        self,
        channels: tuple[int, int] = (16, 32),
        width: int = 128,
        learning_rate: float = 1e-3,
        cuts: Cuts = "every",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        first, second = channels
        pooled = second * (_SIDE // 4) ** 2
        hidden = [
            _convolution(1, first),
            _convolution(first, second),
            nn.Sequential(nn.Flatten(), nn.Linear(pooled, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        ]
        layers: list[nn.Module] = [nn.Unflatten(1, (1, _SIDE, _SIDE))]
        places = places_to_cut(len(hidden), cuts)
        for number, layer in enumerate(hidden, start=1):
            layers.append(layer)
            if number in places:
                layers.append(Boundary())
        # Channels last: on a CPU, the convolutions and their pooling take less than half the time.
        self.net = nn.Sequential(*layers, nn.Linear(width, CLASSES)).to(memory_format=torch.channels_last)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    # Pooled before the rest: BatchNorm and ReLU, and what crosses the boundary, are then a quarter as large.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU()
    )
