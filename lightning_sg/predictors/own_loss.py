"""A loss that the user gives, and its use as the criterion of a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sg.arguments import MOST_FEATURES, check_fields, function, whole
from lightning_sg.predictors.resize import resize
from lightning_sg.predictors.view import Place


@dataclass(frozen=True)
class OwnLoss:
    """A loss of your own for the head of a ``LossModelPredictor``.

    Args:
        function: Called as ``function(outputs, context)`` with the head's outputs and the context, which may be of any
            type. Returns the losses of the samples, ``(N,)``, or their mean, a scalar. ``outputs`` has shape
            ``(N, K)`` for K = ``outputs``, ``(N, T, K)`` if the context has positions, or ``(N, K, H', W')`` if it is
            dense.
        outputs: The number K of outputs that the head has.

    Raises:
        TypeError: If ``function`` cannot be called, or ``outputs`` is no whole number.
        ValueError: If ``outputs`` is out of range.
    """

    function: Callable[[Tensor, Any], Any]  # jsonargparse would take a result type `Tensor` for a class to instantiate
    outputs: int

    def __post_init__(self) -> None:
        takes = function("a function of (outputs, context)")
        check_fields("OwnLoss", self, function=takes, outputs=whole(1, MOST_FEATURES))


@dataclass(frozen=True)
class OwnCriterion:
    """Evaluates :attr:`OwnLoss.function`.

    Attributes:
        place: What has an output of its own.
        function: See :class:`OwnLoss`.
    """

    place: Place
    function: Callable[[Tensor, Any], Any]
    kind: str = "own"

    def __call__(self, outputs: Tensor, context: Any) -> Tensor:
        """See :class:`~lightning_sg.predictors.criteria.Criterion`.

        Raises:
            ValueError: If the function returns anything but a differentiable scalar or ``(N,)``.
        """
        samples = outputs.shape[0]
        if self.place == "cell":
            outputs = resize(outputs.movedim(-1, 1), tuple(context.shape[-2:]))
        losses = self.function(outputs, context)
        if not isinstance(losses, Tensor) or losses.shape not in ((), (samples,)):
            returned = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"OwnLoss: function(outputs, context) must return the losses of the {samples} samples, of shape "
                f"({samples},), or their mean, a scalar; it returned {returned}."
            )
        if not losses.requires_grad and outputs.requires_grad:
            raise ValueError(
                "OwnLoss: function(outputs, context) returned a tensor without a gradient. Compute it from `outputs` "
                "with differentiable operations (no .item(), .detach(), argmax or numpy)."
            )
        return losses.expand(samples) if losses.ndim == 0 else losses


__all__ = ["OwnCriterion", "OwnLoss"]
