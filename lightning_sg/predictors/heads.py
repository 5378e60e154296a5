"""A head: a small network that predicts one of the model's outputs and evaluates its loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.predictors.base import Gradients, LossInfo
from lightning_sg.predictors.closed_form import ClosedForm, LossOfOutputs
from lightning_sg.predictors.criteria import Criterion, Kind, LabelLoss, Labels, NumberLoss, kind_of
from lightning_sg.predictors.features import count_classes, join_rows
from lightning_sg.predictors.head_options import HeadOptions
from lightning_sg.predictors.layers import RowBatchNorm, zero_ended
from lightning_sg.predictors.own_loss import OwnCriterion, OwnLoss
from lightning_sg.predictors.positions import Crop
from lightning_sg.predictors.replay_head import ReplayHead, forms_of, seen_by
from lightning_sg.predictors.replayed import ReplayedLoss
from lightning_sg.predictors.sampled import SampledSoftmax
from lightning_sg.predictors.view import Place, View, place_of

# A last layer with more weights than this is factored into two thin ones of this rank.
_LARGEST_LAYER = 2**20
_RANK = 64
# With more classes than this, the softmax is over a sample that includes this many labels of the batch.
_MOST_CLASSES = 2**13
_SAMPLES = 1024


class Head(nn.Module):
    """Maps activations to the loss of each sample.

    Args:
        view: Turns activations into rows of features.
        net: Maps rows of features to outputs; its last layer is an ``nn.Linear``.
        criterion: Maps outputs to losses.
        samples: The number of labels in a sampled softmax; ``None`` for the full softmax.
        classes_from: Where the number of classes comes from, for :meth:`describe`.
    """

    def __init__(
        self, view: View, net: nn.Sequential, criterion: Criterion, samples: int | None = None, classes_from: str = ""
    ) -> None:
        super().__init__()
        self.view = view
        self.net = net
        self.criterion = criterion
        self.classes_from = classes_from
        self.sampled: SampledSoftmax | None = None
        if samples is not None and isinstance(criterion, LabelLoss):
            self.sampled = SampledSoftmax(criterion.classes, samples)

    def sample_losses(self, activations: Gradients, context: Any) -> Tensor:
        """The loss of each sample, ``(N,)``, averaged over the positions or cells of the sample."""
        rows = self.view(activations, _positions(context))
        criterion = self.criterion
        if not isinstance(criterion, LabelLoss) or criterion.soft:
            return criterion(self.net(rows), context)
        labels = criterion.labels(rows.shape[:-1], context)
        with self._counting(labels.counted, rows.shape[:-1]):
            if self.sampled is None:
                return criterion.of(self.net(rows), labels)
            rows = self.net[:-1](rows)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        values, counted = labels.values, labels.counted
        known = values if counted is None else values.where(counted, 0)
        losses = self.sampled(rows.flatten(0, -2), known.flatten(), last, criterion.smoothing).reshape(values.shape)
        return criterion.average(losses if counted is None else losses.where(counted, 0.0), labels)

    def gradients(self, activations: Gradients, context: Any, *, learns: bool) -> tuple[Tensor, Gradients] | None:
        """The mean loss, and the gradients of the samples' losses with respect to the activations, in closed form.

        Args:
            activations: The activations, each ``(N, ...)``.
            context: The labels or goals.
            learns: Whether to put the gradients of the head's parameters into them as well.

        Returns:
            ``None`` if this head has no closed form for this batch.
        """
        criterion = self.criterion
        if self.sampled is not None or not isinstance(criterion, (LabelLoss, NumberLoss)) or criterion.place == "cell":
            return None
        if not ClosedForm.fits(self.net, activations[0]):  # before the view, whose norms take in what passes through
            return None
        inputs, passes = activations, self.view.passes(activations)
        if passes:
            (rows,) = activations
        else:
            with torch.enable_grad():
                inputs = tuple(activation.detach().requires_grad_() for activation in activations)
                rows = self.view(inputs, _positions(context))
        places = rows.shape[:-1]
        flat = rows if passes else rows.detach().reshape(-1, rows.shape[-1])
        loss: LossOfOutputs
        known: Tensor | None = None  # the rows that have a label, if not all have
        if isinstance(criterion, LabelLoss) and not criterion.soft:
            labels = criterion.labels(places, context)
            if labels.counted is not None:
                known = labels.counted.flatten().nonzero().squeeze(1) if flat.device.type == "cpu" else None
                if known is None or len(known) < 2:  # to look for them, the host would wait for any other device
                    return None
                labels = Labels(labels.values.flatten()[known], None)
            loss = partial(criterion.mean_and_gradient, labels=labels)
        else:

            def loss(outputs: Tensor) -> tuple[Tensor, Tensor]:
                with torch.enable_grad():
                    leaf = outputs.requires_grad_()
                    value = criterion(leaf.unflatten(0, places), context).mean()
                    (gradient,) = torch.autograd.grad(value, leaf)
                return value.detach(), gradient

        value, gradient = ClosedForm(self.net).run(flat if known is None else flat[known], loss, learns=learns)
        if known is not None:
            gradient = torch.zeros_like(flat).index_copy_(0, known, gradient)
        own = [parameter for parameter in self.view.parameters() if learns]
        samples = len(activations[0])
        if not own:  # nothing but the prediction comes of it, which is of the sum over samples
            gradient.mul_(samples)
        if passes:
            return value, (gradient,)
        gradient = gradient.view_as(rows)
        found = torch.autograd.grad(rows, [*inputs, *own], gradient, allow_unused=True, materialize_grads=True)
        for parameter, part in zip(own, found[len(inputs) :]):
            parameter.grad = part
        parts = found[: len(inputs)]
        return value, tuple(part * samples for part in parts) if own else parts

    @contextmanager
    def _counting(self, counted: Tensor | None, places: torch.Size) -> Iterator[None]:
        """Excludes rows without a label from BatchNorm's statistics, so that they do not affect other gradients."""
        if counted is None or counted.shape != places:  # dense labels may be finer than the cells
            yield
            return
        norms = [layer for layer in self.net if isinstance(layer, RowBatchNorm)]
        for norm in norms:
            norm.counted = counted
        try:
            yield
        finally:
            for norm in norms:
                norm.counted = None

    def outputs(self, activations: Gradients) -> Tensor:
        """The head's outputs: ``(N, K)``, ``(N, T, K)`` or ``(N, H, W, K)``."""
        outputs: Tensor = self.net(self.view(activations))
        return outputs

    def update(self, activations: Gradients) -> None:
        """Updates running statistics; call it once for each batch that is learned from."""
        self.view.update(activations)
        if self.sampled is not None:
            self.sampled.advance()

    def describe(self) -> str:
        """Describes the head in words."""
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
            parts.append(f"{last.out_features} classes from {self.classes_from}")
        else:
            parts.append(f"{last.out_features} outputs with the loss '{kind}'")
        if self.sampled is not None:
            parts.append(f"softmax over {2 * self.sampled.samples} of them")
        return ", ".join(parts)


@dataclass(frozen=True)
class HeadFactory:
    """Makes heads for the first batch.

    Attributes:
        hidden: The width of the hidden layers.
        layers: The number of hidden layers.
        options: All other options.
    """

    hidden: int
    layers: int
    options: HeadOptions

    def make(
        self,
        activations: Gradients,
        context: Tensor,
        loss: LossInfo | None,
        *,
        kind: Kind | None = None,
        classes: int | None = None,
        task: str = "",
    ) -> Head:
        """Makes a head for labels or goals.

        Args:
            activations: The first activations, each ``(N, ...)``.
            context: The first labels or goals.
            loss: What is known about the model's loss.
            kind: The head's loss; by default it is inferred from ``context`` and ``loss``.
            classes: The number of classes; by default it is inferred too.
            task: The name of the task, for messages.

        Raises:
            ValueError: If activations and context do not fit together.
        """
        place, crop = place_of(activations, context, loss), None if loss is None else loss.crop
        rows = join_rows(activations).shape
        if place != "position" or (crop is not None and not crop.fits(rows, context.shape)):
            crop = None
        resamples = place == "position" and crop is None and context.shape[1] != rows[1]
        view = self._view(place, crop, resamples=resamples)
        features = view.build(activations)
        with torch.no_grad():
            places = view(activations, _positions(context)).shape[:-1]
        known = kind or kind_of(context, place, places.numel(), loss)
        info = loss if loss is not None and loss.kind == known else LossInfo(known, 0)
        if known != "cross_entropy":
            numbers = NumberLoss(place, known, info.beta)
            return Head(view, self._net(features, numbers.goal(places, context).shape[-1]), numbers)
        soft = context.is_floating_point() and context.numel() != places.numel()
        classes, classes_from = _count(context, loss, classes, soft)
        labels = LabelLoss(place, classes, task, info.ignore_index, info.label_smoothing, soft, view.resamples)
        if not soft:
            labels.labels(places, context)  # raises for labels that do not fit before anything is made for them
        samples = None if soft or place == "cell" else self._samples(classes)
        return Head(view, self._net(features, classes), labels, samples, classes_from)

    def make_own(self, activations: Gradients, context: Any, own_loss: OwnLoss) -> Head:
        """Makes a head with a loss that the user gave.

        Args:
            activations: The first activations, each ``(N, ...)``.
            context: The first context, of any type.
            own_loss: The loss and the number of outputs.
        """
        place = place_of(activations, context)
        view = self._view(place)
        net = self._net(view.build(activations), own_loss.outputs)
        return Head(view, net, OwnCriterion(place, own_loss.function))

    def make_replayed(self, activations: Gradients, context: Any, loss: ReplayedLoss) -> ReplayHead:
        """Makes a head for the model's own loss, by its own operations.

        Args:
            activations: The first activations, each ``(N, ...)``.
            context: What the loss uses of the first batch.
            loss: The loss.

        Raises:
            ValueError: If activations and the outputs that the loss takes do not fit together.
        """
        forms = forms_of(loss, activations)
        crops = {form.crop for form in forms if form.place == "position"}
        crop = crops.pop() if len(crops) == 1 else None
        if crop is not None:  # what no output has is nothing to the head either
            forms = [replace(form, crop=None) for form in forms]
        views: dict[Place, View] = {}
        nets: dict[Place, nn.Sequential] = {}
        for place in dict.fromkeys(form.place for form in forms):
            views[place] = self._view(place, crop if place == "position" else None)
            outputs = sum(form.size for form in forms if form.place == place)
            nets[place] = self._net(views[place].build(seen_by(place, activations)), outputs)
        head = ReplayHead(loss, forms, views, nets)
        if not head.learns_from_zero(activations, context):
            for net in nets.values():
                last = net[-1]
                assert isinstance(last, nn.Linear)
                last.reset_parameters()
        return head

    def _view(self, place: Place, crop: Crop | None = None, *, resamples: bool = False) -> View:
        options = self.options
        return View(
            place,
            options.normalize,
            options.pooled_side,
            options.conv_layers,
            options.conv_width,
            options.hidden_norm,
            crop,
            resamples,
        )

    def _net(self, features: int, outputs: int) -> nn.Sequential:
        before = self.hidden if self.layers else features
        rank = self.options.rank
        if rank is None and before * outputs > _LARGEST_LAYER:
            rank = _RANK
        # Two layers are cheaper than one only if they are thin.
        thin = rank is not None and 0 < rank * (before + outputs) < before * outputs
        norm = self.options.hidden_norm
        return zero_ended(features, self.hidden, self.layers, outputs, rank if thin else None, norm)

    def _samples(self, classes: int) -> int | None:
        wanted = self.options.samples
        if wanted is None:
            wanted = _SAMPLES if classes > _MOST_CLASSES else 0
        return wanted if 0 < 2 * wanted < classes else None


def _positions(context: Any) -> int | None:
    return context.shape[1] if isinstance(context, Tensor) and context.ndim > 1 else None


def _count(context: Tensor, loss: LossInfo | None, classes: int | None, soft: bool) -> tuple[int, str]:
    """The number of classes, and where it comes from."""
    if classes is not None:
        return classes, "the option `classes`"
    if soft:
        return context.shape[-1], "the class probabilities in the context"
    if loss is None:
        return count_classes(context, loss), "the first batch"
    if loss.kind == "cross_entropy":
        return count_classes(context, loss), "the model's cross-entropy"
    return max(loss.outputs, count_classes(context, None)), "the model's outputs"


__all__ = ["Head", "HeadFactory"]
