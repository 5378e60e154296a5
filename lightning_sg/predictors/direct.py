"""Direct predictors, whose output is the gradient itself: DNI and, with labels as context, conditional DNI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_sg.arguments import checked, flag
from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo
from lightning_sg.predictors.features import (
    beside,
    context_features,
    count_classes,
    is_label,
    join_rows,
    split_rows,
)
from lightning_sg.predictors.layers import DEPTH, WIDTH, zero_ended
from lightning_sg.predictors.normalize import NORMALIZATION, InputScale, Normalization
from lightning_sg.predictors.sizes import FirstSizes, resampled


class MLPPredictor(GradientPredictor):
    """Predicts the gradient with a small network on the normalized activation and the context.

    It works position by position on sequences ``(N, T, D)`` and feature maps ``(N, C, H, W)``. The network's output is
    in units of the targets' running root mean square, so that one learning rate serves every boundary.
    Source: Jaderberg et al. 2017, arXiv 1608.05343, section 2.1 (cDNI: section 2.2 and the supplement).

    Args:
        hidden: The width of the hidden layers.
        layers: The number of hidden layers; 0 makes the predictor linear.
        conditional: Whether the context is an input.
        normalize: How the input is scaled, see :class:`~lightning_sg.predictors.normalize.InputScale`.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range.
    """

    def __init__(
        self, hidden: int = 256, layers: int = 1, conditional: bool = True, normalize: Normalization = "layer"
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.hidden = checked(name, "hidden", hidden, WIDTH)
        self.layers = checked(name, "layers", layers, DEPTH)
        self.conditional = checked(name, "conditional", conditional, flag())
        self.scale = InputScale(checked(name, "normalize", normalize, NORMALIZATION))
        self.classes: int | None = None

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Makes the layers. Integer context of K classes becomes K inputs."""
        if self.conditional and isinstance(context, Tensor) and is_label(context):
            self.classes = count_classes(context, loss)
        self._sizes = FirstSizes(activations)
        rows = join_rows(activations)
        self.scale.update(rows)
        self._told: int | None = None
        self.net = zero_ended(self._inputs(rows, context).shape[-1], self.hidden, self.layers, rows.shape[-1])

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        """See :meth:`GradientPredictor.forward`."""
        rows, seen = self._sizes.rows(activations)
        gradients = split_rows(self.net(self._inputs(rows, context)), seen)
        gradients = self._sizes.back(gradients, activations)
        if self.target_rms is None:
            return gradients
        return tuple(gradient * rms for gradient, rms in zip(gradients, self.target_rms))

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """See :meth:`GradientPredictor.loss`."""
        self.scale.update(join_rows(activations))
        return super().loss(activations, context, targets)

    def _inputs(self, rows: Tensor, context: Any) -> Tensor:
        rows = self.scale(rows)
        if self.conditional and isinstance(context, Tensor):
            features = context_features(context, self.classes)
            if self._told is None:
                self._told = features.shape[-1]
            rows = beside(rows, resampled(features, -1, self._told))
        return rows


class LinearPredictor(MLPPredictor):
    """Predicts the gradient as a linear function of the normalized activation and the context.

    Simple, but not cheap: for D features it has D² weights, far more than an :class:`MLPPredictor` with a narrow hidden
    layer.

    Args:
        conditional: Whether the context is an input.
        normalize: How the input is scaled, see :class:`~lightning_sg.predictors.normalize.InputScale`.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If there is no such ``normalize``.
    """

    def __init__(self, conditional: bool = True, normalize: Normalization = "layer") -> None:
        super().__init__(hidden=1, layers=0, conditional=conditional, normalize=normalize)


__all__ = ["LinearPredictor", "MLPPredictor"]
