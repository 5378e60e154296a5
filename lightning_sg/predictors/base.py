"""The contract of a gradient predictor, and the part of it that input predictors share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sg.predictors.norms import relative_error
from lightning_sg.predictors.positions import Crop
from lightning_sg.predictors.replayed import ReplayedLoss
from lightning_sg.predictors.stage_size import StageSize

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True)
class LossInfo:
    """What one traced training step reveals about the model's own loss.

    Attributes:
        kind: ``"cross_entropy"``, ``"binary_cross_entropy"`` (of logits or probabilities), ``"mse"``, ``"l1"``,
            ``"smooth_l1"`` or ``"huber"``; ``"replayed"`` for any other, whose operations are in ``replay``.
        outputs: The size of the class dimension for ``"cross_entropy"``, otherwise of the last dimension; 1 for
            outputs of shape ``(N,)``.
        ignore_index: The label that ``cross_entropy`` skips.
        label_smoothing: The ``label_smoothing`` of ``cross_entropy``.
        beta: Where the quadratic part ends: the ``beta`` of ``smooth_l1`` or the ``delta`` of ``huber``.
        crop: Which positions of a sequence it compares, if not all.
        replay: Repeats the model's own operations from its last outputs to its loss, if that is possible and the
            context is what they use of the batch.
    """

    kind: str
    outputs: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    beta: float = 1.0
    crop: Crop | None = None
    replay: ReplayedLoss | None = field(default=None, compare=False, repr=False)


class TargetUse(StrEnum):
    """What a gradient predictor does with targets, the gradients that the next stage returns.

    ============  ========  =======================  ==========================
    value         ``asks``  ``learns_from_targets``  ``learns_without_targets``
    ============  ========  =======================  ==========================
    ``NONE``      no        no                       yes
    ``BOUND``     yes       no                       yes
    ``OPTIONAL``  yes       yes                      yes
    ``REQUIRED``  yes       yes                      no
    ============  ========  =======================  ==========================
    """

    #: The next stage returns nothing, and predictions are neither bounded nor measured.
    NONE = "none"
    #: A target is requested only to bound and to measure the prediction; ``loss`` ignores it.
    BOUND = "bound"
    #: ``loss`` uses targets, but also works without: it gets ``()`` on batches whose target is not exact.
    OPTIONAL = "optional"
    #: ``loss`` needs targets.
    REQUIRED = "required"

    @property
    def asks(self) -> bool:
        """Whether the next stage returns targets to this predictor."""
        return self is not TargetUse.NONE

    @property
    def learns_from_targets(self) -> bool:
        """Whether ``loss`` depends on targets, so that better targets make a better predictor."""
        return self in (TargetUse.OPTIONAL, TargetUse.REQUIRED)

    @property
    def learns_without_targets(self) -> bool:
        """Whether ``loss`` accepts ``targets=()``."""
        return self is not TargetUse.REQUIRED


class Predictor(nn.Module, ABC):
    """A module that is built once sizes are known and then trained on a loss of its own.

    The two kinds are :class:`GradientPredictor` and :class:`~lightning_sg.InputPredictor`.
    """

    #: The running root mean square of each target, of shape ``(targets,)``. The gradient predictor's trainer sets it.
    target_rms: Tensor | None = None

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> None:
        """Makes the parameters."""

    @abstractmethod
    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the scalar loss that the predictor is trained on."""

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Makes the optimizer for users who name none: Adam with learning rate 1e-3.

        Args:
            parameters: All trainable parameters of the predictor; called after :meth:`build`.
        """
        return torch.optim.Adam(parameters, lr=1e-3, fused=True)


class GradientPredictor(Predictor):
    r"""Predicts the gradient of the loss with respect to the activations at one boundary.

    :class:`~lightning_sg.SyntheticGradients` takes a predictor as a template without parameters. Each boundary gets a
    deep copy, and :meth:`build` makes its parameters from the first activations, so nobody types sizes.

    The contract, for activations ``h`` of shape ``(N, ...)`` with ``N`` samples:

    * ``activations`` is a tuple of detached float32 tensors: those that cross the boundary and can carry a
      gradient, in order. Sequences have their positions second, also where the model has channels there, as
      one-dimensional convolutions do.
    * ``context`` is what the callback's ``context`` option took from the batch (the labels by default), or ``None``.
    * Gradients are *per sample*: the gradient of the sum of the samples' losses, not of their mean. The callback
      multiplies targets by ``N`` and divides predictions by ``N``, so that a smaller last batch is no outlier.
    * An untrained predictor predicts zero, because its output layer starts at zero (Jaderberg et al. 2017,
      arXiv 1608.05343, supplement). The first steps are then those of a detached network, not noise.

    The callback bounds predictions by the size of recent targets (:class:`~lightning_sg.training.TargetScale`), so
    ``forward`` need not.
    """

    #: What the predictor does with targets. It is final once :meth:`build` returns.
    target_use: TargetUse = TargetUse.REQUIRED

    @abstractmethod
    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Makes the parameters for the sizes of ``activations`` and ``context``.

        Called once, before the first :meth:`forward`, with a random seed that belongs to the boundary.

        Args:
            activations: The tensors that cross the boundary, float32, each of shape ``(N, ...)``.
            context: What the callback took from the batch, or ``None``.
            loss: What the traced step revealed about the model's own loss, or ``None``.

        Raises:
            ValueError: If the predictor cannot work with these shapes or this context.
        """

    def wants_exact(self, shapes: Sequence[tuple[int, ...]], context: Any) -> bool:
        """Whether the predictor gains from exact targets, as far as an unbuilt one can tell.

        All processes must get the same answer, but only one of them has activations to build with. So the answer must
        not depend on :meth:`build`.

        Args:
            shapes: The shapes that cross the boundary in the first training batch; empty if the step could not be
                traced.
            context: What the callback took from this batch.
        """
        return self.target_use.learns_from_targets

    def for_stage(self, stage: StageSize) -> GradientPredictor:
        """An unbuilt predictor that suits a stage of this size; by default the same for all.

        Args:
            stage: The stage before the boundary.
        """
        return self

    @property
    def learns_in_passing(self) -> bool:
        """Whether one pass both predicts and learns, on batches whose target is not learned from.

        Then :meth:`forward_and_backward` is called for these batches, in place of :meth:`forward` and :meth:`loss`.
        """
        return False

    def forward_and_backward(self, activations: Gradients, context: Any) -> tuple[Gradients, Tensor]:
        """Predicts, and puts the gradients of the predictor's own loss into its parameters.

        Args:
            activations: As in :meth:`build`.
            context: As in :meth:`build`.

        Returns:
            What :meth:`forward` would return, and what :meth:`loss` would without targets, both detached.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn in passing.")

    @abstractmethod
    def forward(self, activations: Gradients, context: Any) -> Gradients | None:
        """Predicts per-sample gradients.

        Args:
            activations: As in :meth:`build`.
            context: As in :meth:`build`.

        Returns:
            One tensor for each activation, of the same shape. ``None`` means no gradient at all: ``.grad`` in the
            stage above stays untouched, as after ``detach``.
        """

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """Returns the loss that the predictor is trained on, by default the relative squared error of :meth:`forward`.

        Args:
            activations: As in :meth:`build`.
            context: As in :meth:`build`.
            targets: The per-sample gradients that the next stage returned, one for each activation, of the same
                shape. May be ``()`` if ``target_use.learns_without_targets``.

        Returns:
            A scalar.
        """
        predictions = self(activations, context)
        assert predictions is not None
        return relative_error(predictions, targets, self.target_rms)


__all__ = ["GradientPredictor", "Gradients", "LossInfo", "Predictor", "TargetUse"]
