"""The losses of heads: which one a context calls for, and its value for each sample.

Legend: N samples, T positions, H W cells of a feature map, H' W' of an image, K outputs or classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.features import is_label
from lightning_sg.predictors.resize import at_most, pick, resize
from lightning_sg.predictors.view import Place

Kind = Literal["cross_entropy", "binary_cross_entropy", "mse", "l1", "smooth_l1", "huber"]
OwnLoss = Callable[[Tensor, Any], Tensor]

# Dense labels are looked at on a grid of at most this many points a side, and for each cell of the feature map.
_GRID = 128
_POINTS_IN_A_CELL = 4
# A goal that is an image, for activations without cells, is averaged to at most this many a side.
_IMAGE = 32


class Criterion(Protocol):
    """The loss of a head's outputs, by sample."""

    def __call__(self, outputs: Tensor, context: Any) -> Tensor:
        """Returns ``(N,)`` for outputs ``(N, K)``, ``(N, T, K)`` or ``(N, H, W, K)``."""


def check_kind(kind: str) -> None:
    """Refuses an unknown name.

    Raises:
        ValueError: If ``kind`` is not one of :data:`Kind`.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"losses must be among {', '.join(get_args(Kind))}, not '{kind}'.")


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy, with the labels of positions and cells averaged as the model's own loss averages them.

    Attributes:
        place: What has an output of its own.
        classes: The number of classes K.
        task: The name of the task for messages, or ``""``.
        ignore_index: The label that has no loss, beside all negative ones.
        smoothing: The share of each label that is spread over all classes.
        soft: Whether the context holds chances ``(..., K)`` instead of labels.
    """

    place: Place
    classes: int
    task: str = ""
    ignore_index: int = -100
    smoothing: float = 0.0
    soft: bool = False
    kind: Kind = "cross_entropy"

    def __call__(self, outputs: Tensor, context: Tensor) -> Tensor:
        """See :class:`Criterion`."""
        if self.soft:
            chances = context.float().reshape(outputs.shape)
            return by_sample(self.compare(outputs, chances))
        return self.of(outputs, self.labels(outputs.shape[:-1], context))

    def of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample, for labels that :meth:`labels` has found."""
        if self.place == "cell":
            outputs = resize(outputs.movedim(-1, 1), (labels.shape[1], labels.shape[2])).movedim(1, -1)
        return self.average(self.compare(outputs, labels), labels)

    def labels(self, places: torch.Size, context: Tensor) -> Tensor:
        """The labels for outputs at ``places``: integers, all that are ignored as ``ignore_index``.

        Raises:
            ValueError: If there are not as many labels as places, or a label is beyond the classes.
        """
        if self.place == "cell" and (context.ndim == 3 or context.shape[1] == 1):
            images = context.reshape(context.shape[0], *context.shape[-2:])
            labels = pick(images, grid(images, places[1:]))
        elif context.numel() == places.numel():
            labels = context.reshape(places)
        else:
            raise ValueError(
                f"labels of shape {tuple(context.shape)} are neither one for each sample nor one for each position or "
                f"cell of the activations; {tuple(places)} would fit."
            )
        labels = labels.long().masked_fill(labels < 0, self.ignore_index)
        if labels.device.type != "cpu":  # asking it would stop it
            return labels
        beyond = (labels >= self.classes) & (labels != self.ignore_index)
        if bool(beyond.any()):
            told = f"classes={{'{self.task}': ...}}" if self.task else "classes=..."
            raise ValueError(
                f"label {int(labels[beyond][0])} is beyond the {self.classes} classes that the model's loss "
                f"or the first batch showed. Say how many there are: LossModelPredictor({told})."
            )
        return labels

    def compare(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss at each place, for labels (or chances) at the places of ``outputs``."""
        goal = labels.movedim(-1, 1) if self.soft else labels
        return F.cross_entropy(
            outputs.movedim(-1, 1),
            goal,
            ignore_index=-100 if self.soft else self.ignore_index,  # torch refuses others beside chances
            reduction="none",
            label_smoothing=self.smoothing,
        )

    def average(self, losses: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample; the mean of all is that over the labels which are not ignored."""
        counted = (labels != self.ignore_index).sum().clamp_min(1)
        return by_sample(losses) * (labels.numel() / counted)


@dataclass(frozen=True)
class NumberLoss:
    """A regression loss, or binary cross-entropy on logits, of outputs ``(..., K)`` and goals that fit them.

    Attributes:
        place: What has an output of its own.
        kind: Which loss.
        beta: Where the quadratic part of ``"smooth_l1"`` and ``"huber"`` ends.
    """

    place: Place
    kind: Kind
    beta: float = 1.0

    def __call__(self, outputs: Tensor, context: Tensor) -> Tensor:
        """See :class:`Criterion`."""
        goal = self.goal(outputs.shape[:-1], context)
        if self.place == "cell":
            outputs = resize(outputs.movedim(-1, 1), (goal.shape[1], goal.shape[2])).movedim(1, -1)
        if goal.shape != outputs.shape:
            raise ValueError(
                f"a goal of shape {tuple(context.shape)} was {outputs.shape[-1]} numbers for each row in the first "
                f"batch, and does not fit outputs of shape {tuple(outputs.shape)}."
            )
        return by_sample(self._compare(outputs, goal))

    def goal(self, places: torch.Size, context: Tensor) -> Tensor:
        """The goals at ``places``, ``(..., K)``.

        Raises:
            ValueError: If the context has no whole number of goals for each place.
        """
        numbers = context.float()
        if self.place == "cell":
            images = numbers.unsqueeze(1) if numbers.ndim == 3 else numbers
            return resize(images, grid(images, places[1:])).movedim(1, -1)
        if self.place == "sample" and numbers.ndim == 4:
            numbers = at_most(numbers, _IMAGE)
        if numbers.numel() % max(1, places.numel()):
            raise ValueError(f"a goal of shape {tuple(context.shape)} does not divide among {tuple(places)} rows.")
        return numbers.reshape(*places, numbers.numel() // max(1, places.numel()))

    def _compare(self, outputs: Tensor, goal: Tensor) -> Tensor:
        if self.kind == "binary_cross_entropy":
            return F.binary_cross_entropy_with_logits(outputs, goal, reduction="none")
        if self.kind == "l1":
            return F.l1_loss(outputs, goal, reduction="none")
        if self.kind == "smooth_l1":
            return F.smooth_l1_loss(outputs, goal, reduction="none", beta=self.beta)
        if self.kind == "huber":
            return F.huber_loss(outputs, goal, reduction="none", delta=self.beta)
        return F.mse_loss(outputs, goal, reduction="none")


@dataclass(frozen=True)
class UserLoss:
    """A function of the user's. Its arguments and results are those of ``LossModelPredictor(loss=...)``.

    Attributes:
        place: What has an output of its own.
        function: The function.
    """

    place: Place
    function: OwnLoss
    kind: str = "own"

    def __call__(self, outputs: Tensor, context: Any) -> Tensor:
        """See :class:`Criterion`.

        Raises:
            ValueError: If the function returns anything but one number, or one for each sample.
        """
        samples = outputs.shape[0]
        if self.place == "cell":
            outputs = resize(outputs.movedim(-1, 1), tuple(context.shape[-2:]))
        losses = self.function(outputs, context)
        told = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if not isinstance(losses, Tensor) or losses.shape not in ((), (samples,)):
            raise ValueError(
                f"loss(outputs, context) must return the losses of the {samples} samples, of shape ({samples},), or "
                f"their mean, a scalar; it returned {told}."
            )
        if not losses.requires_grad and outputs.requires_grad:
            raise ValueError(
                "loss(outputs, context) returned a tensor without a gradient. It must be computed from `outputs`, by "
                "operations that have one (no .item(), .detach(), argmax or numpy)."
            )
        return losses.expand(samples) if losses.ndim == 0 else losses


def kind_of(context: Tensor, place: Place, rows: int, loss: LossInfo | None) -> Kind:
    """The loss that suits a context: the model's own where it can be that one, else by the kind of numbers.

    Args:
        context: Labels or goals.
        place: What has an output of its own.
        rows: How many outputs there are, all samples together.
        loss: What is known about the model's loss.

    Returns:
        Without knowledge ``"cross_entropy"`` for integers, ``"binary_cross_entropy"`` for booleans, else ``"mse"``.
    """
    if loss is None or loss.kind not in get_args(Kind):
        if context.dtype == torch.bool:
            return "binary_cross_entropy"
        return "cross_entropy" if is_label(context) else "mse"
    kind: Kind = loss.kind  # type: ignore[assignment]
    if not is_label(context):
        soft = place != "cell" and context.shape[-1:] == (loss.outputs,) and context.numel() == rows * loss.outputs
        return "mse" if kind == "cross_entropy" and not soft else kind
    if kind == "cross_entropy" or place == "cell" or context.numel() != rows or loss.outputs == 1:
        return kind
    # One integer a row and several outputs: labels that the step makes one-hot, or numbers, one for each position.
    largest = int(context.max())
    one_hot = 1 < largest < loss.outputs if kind == "binary_cross_entropy" else place == "sample"
    return "cross_entropy" if one_hot and largest < loss.outputs else kind


def grid(images: Tensor, cells: torch.Size) -> tuple[int, int]:
    """At how many points an image ``(..., H', W')`` is compared with the outputs of ``cells`` cells."""
    height, width = (
        min(side, _GRID, _POINTS_IN_A_CELL * count) for side, count in zip(images.shape[-2:], cells, strict=True)
    )
    return height, width


def by_sample(losses: Tensor) -> Tensor:
    """``(N, ...)`` -> ``(N,)``, averaged."""
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


__all__ = [
    "Criterion",
    "Kind",
    "LabelLoss",
    "NumberLoss",
    "OwnLoss",
    "UserLoss",
    "by_sample",
    "check_kind",
    "grid",
    "kind_of",
]
