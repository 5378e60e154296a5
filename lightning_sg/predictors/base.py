"""The contract of a gradient predictor, and what it shares with that of an input predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True)
class LossInfo:
    """The model's own loss, as far as one traced training step shows it.

    Attributes:
        kind: ``"cross_entropy"``, ``"binary_cross_entropy"`` (on logits or probabilities), ``"mse"``, ``"l1"``,
            ``"smooth_l1"`` or ``"huber"``.
        outputs: The size of the class dimension for ``"cross_entropy"``, else of the last one; 1 for outputs ``(N,)``.
        ignore_index: The label that ``cross_entropy`` skips.
        label_smoothing: That of ``cross_entropy``.
        beta: Where the quadratic part ends: the ``beta`` of ``smooth_l1`` or the ``delta`` of ``huber``.
    """

    kind: str
    outputs: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    beta: float = 1.0


class Predictor(nn.Module, ABC):
    """What is made once sizes are known, and then learns from a loss of its own: see its two kinds."""

    #: Root mean square of the targets, one for each; who trains a gradient predictor keeps it up to date.
    target_rms: Tensor | None = None

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> None:
        """Makes the parameters."""

    @abstractmethod
    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss that it is trained on, a scalar."""

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Makes the optimizer where users name none: Adam, learning rate 1e-3.

        Args:
            parameters: The predictor's, all of them, after :meth:`build`.
        """
        return torch.optim.Adam(parameters, lr=1e-3, fused=True)


class GradientPredictor(Predictor):
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

    Attributes tell the callback what else to do. ``correction`` and :meth:`wants_exact` must not depend on ``build``,
    which only one process calls; ``exact``, ``needs_target`` and ``uses_target`` are settled when it returns.

    The callback bounds predictions by the size of the targets seen (:class:`~lightning_sg.training.TargetScale`);
    ``forward`` need not.
    """

    #: True for a predictor that returns the target itself: the boundary then waits for the true gradient.
    exact: bool = False

    #: False for a predictor that learns from activations and context alone, as one with a local loss does: the next
    #: stage is asked for no target, and ``loss`` is called with ``targets=()``.
    needs_target: bool = True

    #: False for a predictor whose ``loss`` leaves the target aside, though it is asked for, to bound and to measure the
    #: prediction: it then learns from every batch, and no exact target is sent for.
    uses_target: bool = True

    #: True for a predictor whose ``loss`` also has something to learn without a target: it is then called with
    #: ``targets=()`` on batches whose target is a prediction in part, and is not to be learned from.
    learns_without_target: bool = False

    #: How much of what the prediction got wrong, the target minus the prediction, the stage applies when the target
    #: arrives late, through the activations that it kept; 0 for none, 1 for all of it.
    correction: float = 0.0

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

    def wants_exact(self, shapes: Sequence[tuple[int, ...]], context: Any) -> bool:
        """Whether exact targets are of use, as far as an unbuilt predictor can tell.

        All processes must come to the same answer, though only one of them has activations to build with.

        Args:
            shapes: Of what crosses the boundary, in the batch that training began with; empty if the step could not
                be followed without data.
            context: What the callback took from this batch.
        """
        return self.needs_target and self.uses_target and not self.exact

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
            targets: The per-sample gradients that the next stage returned, one for each activation, of its shape;
                ``()`` if the predictor says ``needs_target = False``.

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
    by the usual size: one such batch would otherwise give a gradient that an adaptive optimizer never forgets. Where
    there is no usual size, or next to none, a prediction is measured by a tenth of its own: the error is at most
    about 100.

    Args:
        predictions: Gradients of any shapes.
        targets: Gradients of the same shapes.
        rms: The running root mean square of the targets, one for each.

    Returns:
        A scalar, float32.
    """
    size = squared_norm(targets)
    if rms is not None:
        size = torch.maximum(size, usual_square(targets, rms))
    return squared_error(predictions, targets) / at_least_a_tenth(size, predictions)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all numbers in ``tensors``."""
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def squared_error(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The squared norm of the difference."""
    return squared_norm([p - t for p, t in zip(predictions, targets)])


def usual_square(targets: Sequence[Tensor], rms: Tensor) -> Tensor:
    """The squared norm that targets of these shapes usually have, by their running root mean squares."""
    return torch.stack([value.square() * target.numel() for value, target in zip(rms, targets)]).sum()


def at_least_a_tenth(size: Tensor, predictions: Sequence[Tensor]) -> Tensor:
    """A squared size to divide by that does not vanish beside the predictions', nor altogether."""
    own = squared_norm([prediction.detach() for prediction in predictions])
    return torch.maximum(size, 0.01 * own).clamp_min(1e-24)


__all__ = [
    "GradientPredictor",
    "Gradients",
    "LossInfo",
    "at_least_a_tenth",
    "relative_error",
    "squared_error",
    "squared_norm",
    "usual_square",
]
