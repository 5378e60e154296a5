"""The less common options of a loss model's head."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_sg.arguments import MOST_FEATURES, check_fields, optional, whole
from lightning_sg.predictors.layers import DEPTH, HIDDEN_NORM, WIDTH, HiddenNorm
from lightning_sg.predictors.normalize import NORMALIZATION, Normalization


@dataclass(frozen=True)
class HeadOptions:
    """How the heads of a ``LossModelPredictor`` are made, apart from their hidden layers.

    Args:
        normalize: How the head's input is scaled, see :class:`~lightning_sg.predictors.normalize.InputScale`.
        rank: Factors the last layer's weight into two thin matrices that meet in this many features. By default 64 for
            a weight of more than 2**20 elements; 0 for never.
        samples: Takes the softmax over a sample of the classes: those of up to this many labels of the batch, and at
            least as many others. By default 1024 with more than 8192 classes; 0 for never. See
            :class:`~lightning_sg.predictors.sampled.SampledSoftmax`.
        conv_layers: The number of 3 × 3 convolutions before the head's other layers; for feature maps only.
        conv_width: The number of channels of each convolution.
        pooled_side: With one label for each sample, feature maps are averaged to at most this many cells a side.
        hidden_norm: What normalizes each hidden layer before its ReLU: ``"batch"`` for BatchNorm, ``"layer"`` for
            LayerNorm, or ``"none"``.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range.
    """

    normalize: Normalization = "none"
    rank: int | None = None
    samples: int | None = None
    conv_layers: int = 0
    conv_width: int = 64
    pooled_side: int = 7
    hidden_norm: HiddenNorm = "batch"

    def __post_init__(self) -> None:
        check_fields(
            "HeadOptions",
            self,
            normalize=NORMALIZATION,
            rank=optional(whole(0, MOST_FEATURES)),
            samples=optional(whole(0, MOST_FEATURES)),
            conv_layers=DEPTH,
            conv_width=WIDTH,
            pooled_side=whole(1, 10_000),
            hidden_norm=HIDDEN_NORM,
        )


__all__ = ["HeadOptions"]
