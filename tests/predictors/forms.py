"""Forms of activations, tasks with known gradients, and predictors to train on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg import GradientPredictor, HeadOptions, LinearPredictor, LossModelPredictor, MLPPredictor
from lightning_sg.predictors.base import LossInfo

SAMPLES, CLASSES = 16, 3


Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Form:
    """The shapes that cross a boundary, ``-1`` for the number of samples, and the shape of the labels."""

    shapes: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...] = (-1,)

    def activations(self, samples: int, generator: torch.Generator) -> Parts:
        return tuple(torch.randn(sized(shape, samples), generator=generator) for shape in self.shapes)

    def twice(self, parts: Parts) -> Parts:
        """Every sample a second time."""
        return tuple(torch.cat([part, part], shape.index(-1)) for part, shape in zip(parts, self.shapes))

    def take(self, parts: Parts, places: slice) -> Parts:
        return tuple(
            part.movedim(shape.index(-1), 0)[places].movedim(0, shape.index(-1))
            for part, shape in zip(parts, self.shapes)
        )


def sized(shape: tuple[int, ...], samples: int) -> tuple[int, ...]:
    return tuple(samples if size == -1 else size for size in shape)


FORMS = {
    "vectors": Form(((-1, 6),)),
    "sequences": Form(((-1, 4, 6),)),
    "sequences with a label for each position": Form(((-1, 4, 6),), (-1, 4)),
    "feature maps": Form(((-1, 4, 6, 5),)),
    "numbers": Form(((-1,),)),
    "two tensors": Form(((-1, 6), (-1, 4))),
    "two sequences": Form(((-1, 4, 6), (-1, 4, 3)), (-1, 4)),
    "an LSTM's output and state": Form(((-1, 4, 5), (1, -1, 5))),
    "an LSTM's output and the state of two layers": Form(((-1, 3, 4), (2, -1, 4))),
}


DIRECT: dict[str, Callable[[], GradientPredictor]] = {
    "linear, layer": LinearPredictor,
    "linear, none": functools.partial(LinearPredictor, normalize="none"),
    "linear without context": functools.partial(LinearPredictor, conditional=False, normalize="scale"),
    **{
        f"{layers} hidden layers, {'with' if conditional else 'without'} context": functools.partial(
            MLPPredictor, hidden=32, layers=layers, conditional=conditional, normalize="scale"
        )
        for layers in (0, 1, 2)
        for conditional in (True, False)
    },
}


LOSS_MODELS: dict[str, Callable[[], GradientPredictor]] = {
    f"loss model, {objective}, {normalize}": functools.partial(
        LossModelPredictor, hidden=32, objective=objective, head=HeadOptions(normalize=normalize, hidden_norm="none")
    )
    for objective in ("loss", "gradient", "both")
    for normalize in ("scale", "layer", "none")
}


ALONE = DIRECT | LOSS_MODELS


# BatchNorm in the head: what is predicted for a sample depends on the others.
TOGETHER: dict[str, Callable[[], GradientPredictor]] = {
    f"loss model, {objective}, hidden {norm}": functools.partial(
        LossModelPredictor, hidden=32, objective=objective, head=HeadOptions(hidden_norm=norm)
    )
    for objective, norm in (("loss", "batch"), ("both", "batch"), ("both", "layer"))
}


LEARNING = ALONE | TOGETHER


forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


learning = pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING.keys())


@dataclass
class Task:
    """Activations, labels and targets of one next stage: batch ``number`` is always the same."""

    form: Form
    seed: int = 5

    def weights(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def batch(self, number: int, samples: int = SAMPLES) -> tuple[Parts, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        activations = self.form.activations(samples, generator)
        return activations, torch.randint(CLASSES, sized(self.form.labels, samples), generator=generator)


class LinearTask(Task):
    """The target is linear in the activation and the label's one-hot vector."""

    def targets(self, activations: Parts, labels: Tensor, with_labels: bool) -> Parts:
        return tuple(
            0.01 * self._target(part, shape, labels, with_labels) for part, shape in zip(activations, self.form.shapes)
        )

    def _target(self, part: Tensor, shape: tuple[int, ...], labels: Tensor, with_labels: bool) -> Tensor:
        axis = 1 if len(shape) == 4 else -1
        rows = part.unsqueeze(-1) if shape == (-1,) else part.movedim(axis, -1)
        size = rows.shape[-1]
        target = rows @ self.weights(size, size)
        if with_labels:
            offsets = self.weights(CLASSES, size)[labels]
            if shape[0] == -1 and labels.ndim == 1:
                offsets = offsets.reshape(-1, *[1] * (rows.ndim - 2), size)
            target = target + offsets
        return target.squeeze(-1) if shape == (-1,) else target.movedim(-1, axis)


class ClassifierTask(Task):
    """The target is the gradient of a classifier's loss; the labels are drawn as the classifier expects them."""

    def logits(self, activations: Parts) -> Tensor:
        features = []
        for part, shape in zip(activations, self.form.shapes):
            if len(shape) == 4:
                part = part.mean((2, 3))
            elif shape[0] != -1:
                part = part.movedim(1, 0).flatten(1)
            elif len(self.form.labels) == 1:
                part = part.reshape(part.shape[0], -1, part.shape[-1] if part.ndim > 1 else 1).mean(1)
            features.append(part)
        rows = torch.cat(features, -1)
        # Averages over positions are small; the same spread of logits for every form.
        return 2 * rows / rows.detach().square().mean().sqrt() @ self.weights(rows.shape[-1], CLASSES)

    def batch(self, number: int, samples: int = SAMPLES) -> tuple[Parts, Tensor]:
        activations, labels = super().batch(number, samples)
        chances = self.logits(activations).softmax(-1)
        drawn = chances.flatten(0, -2).multinomial(1, generator=torch.Generator().manual_seed(number))
        return activations, drawn.reshape(labels.shape)

    def targets(self, activations: Parts, labels: Tensor) -> Parts:
        inputs = tuple(part.clone().requires_grad_() for part in activations)
        losses = F.cross_entropy(self.logits(inputs).movedim(-1, 1), labels, reduction="none")
        return torch.autograd.grad(losses.flatten(1).mean(1).sum() if losses.ndim > 1 else losses.sum(), inputs)


def built(make: Callable[[], GradientPredictor], activations: Parts, context: Any, loss: Any = None) -> Any:
    torch.manual_seed(0)
    predictor = make()
    predictor.build(activations, context, loss)
    return predictor


def train(
    predictor: GradientPredictor, steps: int, batch: Callable[[int], tuple[Parts, Tensor, Parts]], rate: float = 1e-2
) -> None:
    """Trains as the callback does: Adam, and the size of the targets known."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate)
    for step in range(steps):
        activations, context, targets = batch(step)
        if step == 0:
            predictor.target_rms = torch.stack([target.square().mean().sqrt() for target in targets])
        optimizer.zero_grad()
        predictor.loss(activations, context, targets).backward()
        optimizer.step()


def trained_a_little(make: Callable[[], GradientPredictor], form: Form) -> GradientPredictor:
    task = LinearTask(form)
    predictor: GradientPredictor = built(make, *task.batch(0), LossInfo("cross_entropy", CLASSES))

    def batch(number: int) -> tuple[Parts, Tensor, Parts]:
        activations, labels = task.batch(number)
        return activations, labels, task.targets(activations, labels, with_labels=True)

    train(predictor, 5, batch)
    return predictor


def predict(predictor: GradientPredictor, activations: Parts, context: Any) -> Parts:
    with torch.no_grad():
        prediction = predictor(activations, context)
    assert prediction is not None
    return tuple(part.detach() for part in prediction)


def cosine(left: Parts, right: Parts) -> float:
    both = [torch.cat([part.flatten() for part in parts]) for parts in (left, right)]
    return F.cosine_similarity(both[0], both[1], dim=0).item()
