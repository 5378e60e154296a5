"""The loss-model predictor: a small head whose own loss's gradient is the prediction."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo, relative_error
from lightning_sg.predictors.features import count_classes, is_label, join_rows
from lightning_sg.predictors.layers import zero_ended
from lightning_sg.predictors.normalize import InputScale, Normalization

# Feature maps are averaged to at most this many cells a side: a head needs no more, and stays cheap.
_POOLED_SIDE = 4


class LossModelPredictor(GradientPredictor):
    r"""Predicts :math:`ĝ = ∂ℓ(A(h), c)/∂h` for a small head A and the task's own loss ℓ.

    The head guesses the model's output from the activation, with the context c (the labels) as its goal. Its
    loss falls where the model's loss falls, so even a rough head gives a useful direction, unlike a direct
    predictor. This is the critic of Czarnecki et al. 2017, *Sobolev Training* (arXiv 1706.04859, section 4.2):
    with ``objective="both"`` it learns value and derivative.

    ``(N, D)`` activations and ``(N,)`` labels, ``(N, T, D)`` and ``(N, T)`` labels (one loss a position), ``(N, T, D)``
    and ``(N,)`` labels (positions averaged), ``(N, C, H, W)`` (averaged to at most 4 × 4 cells); float context
    ``(N, ...)`` gives a regression head with a squared loss.

    Args:
        hidden: Width of the head's hidden layers.
        layers: Number of hidden layers; 0 makes the head linear.
        objective: What the head is trained on: its own ``"loss"``, matching the target ``"gradient"``, or ``"both"``.
        gradient_weight: With ``"both"``, the weight of the relative gradient error beside the own loss.
        classes: The number of classes, where the model's own loss is not one that tells: then they would be counted in
            the first batch.
        normalize: How the head's input is scaled, see :class:`~lightning_sg.predictors.normalize.InputScale`.
    """

    def __init__(
        self,
        hidden: int = 128,
        layers: int = 1,
        objective: Literal["loss", "gradient", "both"] = "loss",
        gradient_weight: float = 1.0,
        normalize: Normalization = "layer",
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if hidden < 1 or layers < 0:
            raise ValueError(f"LossModelPredictor needs hidden >= 1 and layers >= 0, not {hidden} and {layers}.")
        if objective not in ("loss", "gradient", "both"):
            raise ValueError(f"objective must be 'loss', 'gradient' or 'both', not '{objective}'.")
        self.hidden = hidden
        self.layers = layers
        self.objective = objective
        self.gradient_weight = gradient_weight
        self.scale = InputScale(normalize)
        self.classes = classes
        self.kind = ""
        self.ignore_index = -100

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Makes the head: K outputs for labels of K classes, else the context's features."""
        if not isinstance(context, Tensor):
            raise ValueError(
                "LossModelPredictor needs the labels (or regression targets) as a tensor context, but got "
                f"{type(context).__name__}. Batches that are not (x, y) pairs need SyntheticGradients(context=...), "
                "a key, an index or a function of the batch; or use MLPPredictor, which can do without."
            )
        features = self._features(activations, context)
        self.scale.update(features)
        if is_label(context) and not (loss is not None and loss.kind == "binary_cross_entropy"):
            self.kind, outputs = "cross_entropy", self.classes or count_classes(context, loss)
            self.ignore_index = loss.ignore_index if loss is not None else -100
        else:
            self.kind = "binary_cross_entropy" if loss is not None and loss.kind == "binary_cross_entropy" else "mse"
            outputs = self._goal(features, context).shape[-1]
        self.head = zero_ended(features.shape[-1], self.hidden, self.layers, outputs)

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        """See :meth:`GradientPredictor.forward`."""
        return self._value_and_gradient(activations, context, create_graph=False)[1]

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """The head's mean loss, the relative error of its gradient, or their weighted sum."""
        self.scale.update(self._features(activations, context))
        if self.objective == "loss":
            return self._sample_losses(activations, context).sum() / activations[0].shape[0]
        value, gradients = self._value_and_gradient(activations, context, create_graph=True)
        error = relative_error(gradients, targets, self.target_rms)
        if self.objective == "gradient":
            return error
        return value / activations[0].shape[0] + self.gradient_weight * error

    def _value_and_gradient(self, activations: Gradients, context: Any, create_graph: bool) -> tuple[Tensor, Gradients]:
        with torch.enable_grad():
            inputs = tuple(activation.detach().requires_grad_() for activation in activations)
            value = self._sample_losses(inputs, context).sum()
            gradients = torch.autograd.grad(value, inputs, create_graph=create_graph)
        return value, gradients

    def _sample_losses(self, activations: Gradients, context: Tensor) -> Tensor:
        """The loss of each sample, ``(N,)``; positions within a sample are averaged."""
        features = self._features(activations, context)
        outputs = self.head(self.scale(features))
        if self.kind == "cross_entropy":
            labels = context.reshape(features.shape[:-1]).long()
            labels = torch.where(labels < 0, self.ignore_index, labels)
            beyond = (labels >= outputs.shape[-1]) & (labels != self.ignore_index)
            if labels.device.type == "cpu" and bool(beyond.any()):
                raise ValueError(
                    f"label {int(labels[beyond][0])} is beyond the {outputs.shape[-1]} classes that the model's loss "
                    "or the first batch showed. Say how many there are: LossModelPredictor(classes=...)."
                )
            losses = F.cross_entropy(outputs.movedim(-1, 1), labels, ignore_index=self.ignore_index, reduction="none")
        else:
            goal = self._goal(features, context)
            compare = F.mse_loss if self.kind == "mse" else F.binary_cross_entropy_with_logits
            losses = compare(outputs, goal, reduction="none")
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def _features(self, activations: Gradients, context: Tensor) -> Tensor:
        """What the head sees: ``(N, T, D)`` where the context has a label for each position, else ``(N, D)``."""
        pooled = tuple(_pool(activation) for activation in activations)
        rows = join_rows(pooled)
        if rows.ndim > 2 and context.shape[: rows.ndim - 1] != rows.shape[:-1]:
            rows = rows.flatten(1, -2).mean(1)  # one label for the whole sequence: (N, T, D) -> (N, D)
        return rows

    @staticmethod
    def _goal(features: Tensor, context: Tensor) -> Tensor:
        """Float context as the head's regression goal: one row for each row of ``features``."""
        return context.float().reshape(*features.shape[:-1], -1)


def _pool(activation: Tensor) -> Tensor:
    """``(N, C, H, W)`` -> ``(N, C * h * w)`` with h, w at most 4; everything else as it is."""
    if activation.ndim != 4:
        return activation
    height, width = (min(side, _POOLED_SIDE) for side in activation.shape[2:])
    return F.adaptive_avg_pool2d(activation, (height, width)).flatten(1)


__all__ = ["LossModelPredictor"]
