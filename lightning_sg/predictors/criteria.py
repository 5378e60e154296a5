"""The losses of heads: which one suits a context, and its value for each sample.

A *goal* is what a head's output is compared with, other than a label. (A *target* is always a gradient.)

Legend: N samples, T positions, H W cells of a feature map, H' W' pixels of an image, K outputs or classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.features import is_label
from lightning_sg.predictors.positions import resampled
from lightning_sg.predictors.resize import at_most, pick, resize
from lightning_sg.predictors.view import Place

Kind = Literal["cross_entropy", "binary_cross_entropy", "mse", "l1", "smooth_l1", "huber"]

# Outputs are compared with dense labels on a grid of at most this many points a side, and a cell.
_GRID = 128
_POINTS_IN_A_CELL = 4
# For activations that are not feature maps, a goal that is an image is averaged to at most this many pixels a side.
_IMAGE = 32


class Criterion(Protocol):
    """The loss of a head's outputs for each sample."""

    def __call__(self, outputs: Tensor, context: Any) -> Tensor:
        """Returns ``(N,)`` for outputs ``(N, K)``, ``(N, T, K)`` or ``(N, H, W, K)``."""


@dataclass(frozen=True)
class Labels:
    """The labels of a batch.

    Attributes:
        values: Integers, one for each place.
        counted: Which of them count; ``None`` for all.
    """

    values: Tensor
    counted: Tensor | None


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy that weights positions and cells as the model's own loss does.

    Attributes:
        place: What has an output of its own.
        classes: The number of classes K.
        task: The name of the task for messages, or ``""``.
        ignore_index: The label to skip. Negative labels are always skipped.
        smoothing: The share of each label that is spread over all classes.
        soft: Whether the context holds class probabilities ``(..., K)`` instead of labels.
        resamples: Whether outputs are resampled to as many positions as there are labels.
    """

    place: Place
    classes: int
    task: str = ""
    ignore_index: int = -100
    smoothing: float = 0.0
    soft: bool = False
    resamples: bool = False
    kind: Kind = "cross_entropy"

    def __call__(self, outputs: Tensor, context: Tensor) -> Tensor:
        """See :class:`Criterion`."""
        if self.soft:
            probabilities = context.float().reshape(outputs.shape)
            return by_sample(self.compare(outputs, probabilities))
        if self.resamples:
            outputs = resampled(outputs, context.shape[1])
        return self.of(outputs, self.labels(outputs.shape[:-1], context))

    def of(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The loss of each sample, given the result of :meth:`labels`."""
        if self.place == "cell":
            size = labels.values.shape[1], labels.values.shape[2]
            outputs = resize(outputs.movedim(-1, 1), size).movedim(1, -1)
        return self.average(self.compare(outputs, labels.values), labels)

    def labels(self, places: torch.Size, context: Tensor) -> Labels:
        """The integer labels for outputs at ``places``, with ``ignore_index`` in place of every label to skip.

        Raises:
            ValueError: If labels and places do not match one to one, or a label is beyond the classes.
        """
        if self.place == "cell" and (context.ndim == 3 or context.shape[1] == 1):
            images = context.reshape(context.shape[0], *context.shape[-2:])
            labels = pick(images, grid(images, places[1:])).long()
        elif context.numel() == places.numel():
            labels = (context if context.shape == places else context.reshape(places)).long()
        else:
            raise ValueError(
                f"labels of shape {tuple(context.shape)} are neither one for each sample nor one for each position or "
                f"cell of the activations; expected {tuple(places)}."
            )
        on_host = labels.device.type == "cpu"  # asking any other device would stop it
        if on_host and not 0 <= self.ignore_index < self.classes:
            least, largest = labels.aminmax()
            if int(least) >= 0 and int(largest) < self.classes:
                return Labels(labels, None)
        labels = labels.masked_fill(labels < 0, self.ignore_index)
        counted = labels != self.ignore_index
        if not on_host:
            return Labels(labels, counted)
        beyond = (labels >= self.classes) & (labels != self.ignore_index)
        if bool(beyond.any()):
            argument = f"classes={{'{self.task}': ...}}" if self.task else "classes=..."
            raise ValueError(
                f"label {int(labels[beyond][0])} is beyond the {self.classes} classes found in the model's loss "
                f"or the first batch. Give the number of classes: LossModelPredictor({argument})."
            )
        return Labels(labels, None if bool(counted.all()) else counted)

    def mean_and_gradient(self, outputs: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """The mean loss of rows of outputs ``(rows, K)``, all of whose labels count, and its gradient.

        The gradient is softmax minus label, which takes half as long as by autograd.
        """
        values = labels.values if labels.values.ndim == 1 else labels.values.reshape(-1)
        rows, classes = outputs.shape
        logarithms = F.log_softmax(outputs, dim=1)
        loss = F.nll_loss(logarithms, values)
        if self.smoothing:
            loss = (1 - self.smoothing) * loss - self.smoothing * logarithms.mean()
        gradient = logarithms.exp_()
        if self.smoothing:
            gradient -= self.smoothing / classes
        gradient.scatter_add_(1, values[:, None], gradient.new_full((rows, 1), self.smoothing - 1))
        return loss, gradient.div_(rows)

    def compare(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss at each place, given a label (or class probabilities) for each."""
        goal = labels.movedim(-1, 1) if self.soft else labels
        return F.cross_entropy(
            outputs.movedim(-1, 1),
            goal,
            ignore_index=-100 if self.soft else self.ignore_index,  # torch accepts no other with probabilities
            reduction="none",
            label_smoothing=self.smoothing,
        )

    def average(self, losses: Tensor, labels: Labels) -> Tensor:
        """The loss of each sample, scaled so that the batch mean is the mean over labels that are not skipped."""
        if labels.counted is None:
            return by_sample(losses)
        return by_sample(losses) * (labels.values.numel() / labels.counted.sum().clamp_min(1))


@dataclass(frozen=True)
class NumberLoss:
    """A regression loss, or binary cross-entropy on logits, of outputs ``(..., K)`` and goals of the same shape.

    Attributes:
        place: What has an output of its own.
        kind: The loss.
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
                f"the first batch had {outputs.shape[-1]} regression targets a row, so regression targets of shape "
                f"{tuple(context.shape)} do not fit the outputs, {tuple(outputs.shape)}."
            )
        return by_sample(self._compare(outputs, goal))

    def goal(self, places: torch.Size, context: Tensor) -> Tensor:
        """The goals at ``places``, of shape ``(..., K)``.

        Raises:
            ValueError: If the context does not divide evenly among the places.
        """
        numbers = context.float()
        if self.place == "cell":
            images = numbers.unsqueeze(1) if numbers.ndim == 3 else numbers
            return resize(images, grid(images, places[1:])).movedim(1, -1)
        if self.place == "sample" and numbers.ndim == 4:
            numbers = at_most(numbers, _IMAGE)
        if numbers.numel() % max(1, places.numel()):
            raise ValueError(
                f"regression targets of shape {tuple(context.shape)} do not divide evenly among {tuple(places)} rows."
            )
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


def kind_of(context: Tensor, place: Place, rows: int, loss: LossInfo | None) -> Kind:
    """The loss that suits a context: the model's own if it fits, otherwise one chosen by dtype.

    Args:
        context: Labels or goals.
        place: What has an output of its own.
        rows: The number of places in the whole batch.
        loss: What is known about the model's loss.

    Returns:
        If ``loss`` is unknown: ``"cross_entropy"`` for integers, ``"binary_cross_entropy"`` for booleans, otherwise
        ``"mse"``.
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
    # One integer a row but several outputs: either labels that the step turns one-hot, or one number for each position.
    largest = int(context.max())
    one_hot = 1 < largest < loss.outputs if kind == "binary_cross_entropy" else place == "sample"
    return "cross_entropy" if one_hot and largest < loss.outputs else kind


def grid(images: Tensor, cells: torch.Size) -> tuple[int, int]:
    """The size of the grid on which images ``(..., H', W')`` are compared with the outputs of ``cells`` cells."""
    height, width = (
        min(side, _GRID, _POINTS_IN_A_CELL * count) for side, count in zip(images.shape[-2:], cells, strict=True)
    )
    return height, width


def by_sample(losses: Tensor) -> Tensor:
    """Averages ``(N, ...)`` to ``(N,)``."""
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


__all__ = [
    "Criterion",
    "Kind",
    "LabelLoss",
    "Labels",
    "NumberLoss",
    "by_sample",
    "grid",
    "kind_of",
]
