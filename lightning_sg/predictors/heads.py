"""A head: a small network that guesses one of the model's outputs and has its loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.predictors.base import Gradients, LossInfo
from lightning_sg.predictors.criteria import Criterion, Kind, LabelLoss, NumberLoss, OwnLoss, UserLoss, kind_of
from lightning_sg.predictors.features import count_classes
from lightning_sg.predictors.layers import HiddenNorm, RowBatchNorm, zero_ended
from lightning_sg.predictors.normalize import Normalization
from lightning_sg.predictors.sampled import SampledSoftmax
from lightning_sg.predictors.view import Place, View, place_of

# A last layer with more weights than this is made of two thin ones, of this width between them.
_LARGEST_LAYER = 2**20
_RANK = 64
# With more classes than this, the softmax is over a sample; this many labels of the batch are in it.
_MOST_CLASSES = 2**13
_SAMPLES = 1024


@dataclass(frozen=True)
class HeadOptions:
    """The options that a head shares with :class:`~lightning_sg.LossModelPredictor`, where they are described."""

    hidden: int = 64
    layers: int = 1
    normalize: Normalization = "none"
    rank: int | None = None
    samples: int | None = None
    conv_layers: int = 0
    conv_width: int = 64
    pooled_side: int = 7
    hidden_norm: HiddenNorm = "batch"


class Head(nn.Module):
    """From activations to the loss of each sample.

    Args:
        view: What the head sees.
        net: From rows of features to outputs; its last layer is ``nn.Linear``.
        criterion: From outputs to losses.
        samples: With so many, the softmax is over a sample of the classes.
        told_by: Where the number of classes comes from, for :meth:`describe`.
    """

    def __init__(
        self, view: View, net: nn.Sequential, criterion: Criterion, samples: int | None = None, told_by: str = ""
    ) -> None:
        super().__init__()
        self.view = view
        self.net = net
        self.criterion = criterion
        self.told_by = told_by
        self.sampled: SampledSoftmax | None = None
        if samples is not None and isinstance(criterion, LabelLoss):
            self.sampled = SampledSoftmax(criterion.classes, samples)

    def sample_losses(self, activations: Gradients, context: Any) -> Tensor:
        """The loss of each sample, ``(N,)``; positions and cells within a sample are averaged."""
        rows = self.view(activations)
        criterion = self.criterion
        if not isinstance(criterion, LabelLoss) or criterion.soft:
            return criterion(self.net(rows), context)
        labels = criterion.labels(rows.shape[:-1], context)
        counted = labels != criterion.ignore_index
        with self._counting(counted, rows.shape[:-1]):
            if self.sampled is None:
                return criterion.of(self.net(rows), labels)
            rows = self.net[:-1](rows)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        known = labels.where(counted, 0).flatten()
        losses = self.sampled(rows.flatten(0, -2), known, last, criterion.smoothing).reshape(labels.shape)
        return criterion.average(losses.where(counted, 0.0), labels)

    @contextmanager
    def _counting(self, counted: Tensor, places: torch.Size) -> Iterator[None]:
        """Tells BatchNorm which rows have a label: the others have no loss, and no say in the others' gradients."""
        norms = [layer for layer in self.net if isinstance(layer, RowBatchNorm)]
        # The labels of images may be finer than the cells. Asking another device would stop it.
        if counted.shape == places and not (counted.device.type == "cpu" and bool(counted.all())):
            for norm in norms:
                norm.counted = counted
        try:
            yield
        finally:
            for norm in norms:
                norm.counted = None

    def outputs(self, activations: Gradients) -> Tensor:
        """What the head guesses: ``(N, K)``, ``(N, T, K)`` or ``(N, H, W, K)``."""
        guessed: Tensor = self.net(self.view(activations))
        return guessed

    def update(self, activations: Gradients) -> None:
        """To be called once for each batch that is learned from."""
        self.view.update(activations)
        if self.sampled is not None:
            self.sampled.advance()

    def describe(self) -> str:
        """The head in words."""
        linear = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        last = linear[-1]
        hidden = [layer.out_features for layer in linear[:-1] if layer.bias is not None]
        depth = (
            f"head with {len(hidden)} hidden layer{'s' * (len(hidden) > 1)} of {hidden[0]}" if hidden else "linear head"
        )
        parts = [f"{depth} for each {self.view.place}"]
        if self.view.convolutions is not None:
            count, width = self.view.conv_layers, self.view.conv_width
            parts.append(f"after {count} convolution{'s' * (count > 1)} of {width} channels")
        if any(layer.bias is None for layer in linear):
            parts.append(f"of rank {last.in_features}")
        kind = getattr(self.criterion, "kind", "own")
        if isinstance(self.criterion, LabelLoss):
            parts.append(f"{last.out_features} classes from {self.told_by}")
        else:
            parts.append(f"{last.out_features} outputs with the loss '{kind}'")
        if self.sampled is not None:
            parts.append(f"softmax over {2 * self.sampled.samples} of them")
        return ", ".join(parts)


def make_head(
    options: HeadOptions,
    activations: Gradients,
    context: Tensor,
    loss: LossInfo | None,
    *,
    kind: Kind | None = None,
    classes: int | None = None,
    task: str = "",
) -> Head:
    """A head for labels or goals.

    Args:
        options: Sizes.
        activations: The first ones, each ``(N, ...)``.
        context: The first labels or goals.
        loss: What is known about the model's loss.
        kind: The head's loss, where it is not to be found from ``context`` and ``loss``.
        classes: The number of classes, where ``loss`` does not tell.
        task: The name of the task, for messages.

    Raises:
        ValueError: If activations and context do not fit together.
    """
    place = place_of(activations, context)
    view = _view(options, place)
    features = view.build(activations)
    with torch.no_grad():
        places = view(activations).shape[:-1]
    known = kind or kind_of(context, place, places.numel(), loss)
    told = loss if loss is not None and loss.kind == known else LossInfo(known, 0)
    if known == "cross_entropy":
        soft = context.is_floating_point() and context.numel() != places.numel()
        told_by = "the option `classes`"
        if classes is None and soft:
            classes, told_by = context.shape[-1], "the chances in the context"
        elif classes is None:
            classes, told_by = _count(context, loss)
        labels = LabelLoss(place, classes, task, told.ignore_index, told.label_smoothing, soft)
        if not soft:
            labels.labels(places, context)  # complains of labels that do not fit before anything is made for them
        samples = None if soft or place == "cell" else _samples(options.samples, classes)
        return Head(view, _net(options, features, classes), labels, samples, told_by)
    numbers = NumberLoss(place, known, told.beta)
    return Head(view, _net(options, features, numbers.goal(places, context).shape[-1]), numbers)


def make_own_head(options: HeadOptions, activations: Gradients, context: Any, function: OwnLoss, outputs: int) -> Head:
    """A head with a loss of the user's.

    Args:
        options: Sizes.
        activations: The first ones, each ``(N, ...)``.
        context: The first context, of any kind.
        function: From the head's outputs and the context to losses.
        outputs: The number of outputs.
    """
    place = place_of(activations, context)
    view = _view(options, place)
    return Head(view, _net(options, view.build(activations), outputs), UserLoss(place, function))


def _view(options: HeadOptions, place: Place) -> View:
    return View(
        place,
        options.normalize,
        options.pooled_side,
        options.conv_layers,
        options.conv_width,
        options.hidden_norm,
    )


def _net(options: HeadOptions, features: int, outputs: int) -> nn.Sequential:
    before = options.hidden if options.layers else features
    rank = options.rank
    if rank is None and before * outputs > _LARGEST_LAYER:
        rank = _RANK
    # Two layers are cheaper than one only if they are thin.
    thin = rank is not None and 0 < rank * (before + outputs) < before * outputs
    return zero_ended(features, options.hidden, options.layers, outputs, rank if thin else None, options.hidden_norm)


def _samples(wanted: int | None, classes: int) -> int | None:
    if wanted is None:
        wanted = _SAMPLES if classes > _MOST_CLASSES else 0
    return wanted if 0 < 2 * wanted < classes else None


def _count(labels: Tensor, loss: LossInfo | None) -> tuple[int, str]:
    if loss is None:
        return count_classes(labels, loss), "the first batch"
    if loss.kind == "cross_entropy":
        return count_classes(labels, loss), "the model's cross-entropy"
    return max(loss.outputs, count_classes(labels, None)), "the model's outputs"


__all__ = ["Head", "HeadOptions", "make_head", "make_own_head"]
