"""The contract of a gradient predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True)
class LossInfo:
    """The model's own loss, as far as one traced training step shows it.

    Attributes:
        kind: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"mse"``.
        outputs: The size of the class dimension, or of the last dimension for the other two.
        ignore_index: The label that ``cross_entropy`` skips.
    """

    kind: str
    outputs: int
    ignore_index: int = -100


class GradientPredictor(nn.Module, ABC):
    r"""Predicts the gradient of the loss with respect to the activations at one boundary.

    A predictor is given to :class:`~lightning_sg.SyntheticGradients` as a template without parameters;
    each boundary gets a deep copy, and :meth:`build` makes its parameters once the first activations
    are known. Nobody types sizes.

    The contract, for activations ``h`` of shape ``(N, ...)`` with ``N`` samples:

    * ``activations`` is a tuple of detached float32 tensors: those that cross the boundary and can carry a
      gradient, in order.
    * ``context`` is what the callback's ``context`` took from the batch (by default the labels), or ``None``.
    * Gradients are *per sample*: the gradient of the sum, not the mean, of the samples' losses. The callback
      multiplies the targets by ``N`` and divides predictions by ``N``, so that a smaller last batch is no outlier.
    * An untrained predictor predicts zero: the output layer starts at zero (Jaderberg et al. 2017,
      arXiv 1608.05343, supplement). Then the first steps are those of a detached network, not noise.

    The callback bounds predictions by the size of the targets seen (:class:`~lightning_sg.training.TargetScale`);
    ``forward`` need not.
    """

    #: True for a predictor that returns the target itself: the boundary then waits for the true gradient.
    exact: bool = False

    #: False for a predictor that learns from activations and context alone: then no target is asked for, and
    #: :meth:`loss` is given an empty tuple.
    needs_target: bool = True

    #: How much of what the prediction got wrong the stage applies once the true gradient arrives, late, through
    #: activations kept until then.
    correction: float = 0.0

    #: Root mean square of the per-sample targets, one for each activation; the callback keeps it up to date.
    target_rms: Tensor | None = None

    @abstractmethod
    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Makes the parameters for the sizes of ``activations`` and ``context``.

        Called once, before the first :meth:`forward`, with the random seed set per boundary.

        Args:
            activations: The tensors that cross the boundary, float32, each of shape ``(N, ...)``.
            context: What the callback took from the batch, or ``None``.
            loss: What the traced step told about the model's own loss, or ``None``.

        Raises:
            ValueError: If the predictor cannot work with these shapes or this context.
        """

    @abstractmethod
    def forward(self, activations: Gradients, context: Any) -> Gradients | None:
        """Predicts per-sample gradients.

        Args:
            activations: As in :meth:`build`.
            context: As in :meth:`build`.

        Returns:
            One tensor for each activation, of its shape; or ``None`` for "no gradient at all", which leaves
            the ``.grad`` of the stage above untouched as ``detach`` would.
        """

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """The loss this predictor is trained on: by default the relative squared error of :meth:`forward`.

        Args:
            activations: As in :meth:`build`.
            context: As in :meth:`build`.
            targets: The per-sample gradients that the next stage returned, one for each activation, of its shape.

        Returns:
            A scalar.
        """
        predictions = self(activations, context)
        assert predictions is not None
        return relative_error(predictions, targets, self.target_rms)


def relative_error(predictions: Sequence[Tensor], targets: Sequence[Tensor], rms: Tensor | None = None) -> Tensor:
    r"""The relative squared error :math:`\lVert ĝ - g \rVert^2 / \lVert g \rVert^2`.

    Relative, so that the learning rate of a predictor means the same at every boundary and at every time
    of the training, whatever the size of the gradients. A target that is much smaller than usual, or zero, is measured
    by the usual size: one such batch would otherwise give a gradient that an adaptive optimizer never forgets.

    Args:
        predictions: Gradients of any shapes.
        targets: Gradients of the same shapes.
        rms: The running root mean square of the targets, one for each.

    Returns:
        A scalar, float32.
    """
    error = torch.stack([(p - t).square().sum() for p, t in zip(predictions, targets)]).sum()
    size = torch.stack([t.square().sum() for t in targets]).sum()
    if rms is not None:
        usual = torch.stack([value.square() * target.numel() for value, target in zip(rms, targets)]).sum()
        size = torch.maximum(size, usual)
    return error / size.clamp_min(1e-24)


__all__ = ["GradientPredictor", "Gradients", "LossInfo", "relative_error"]
