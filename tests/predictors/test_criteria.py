"""The losses of heads are torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_sg.predictors.base import LossInfo
from tests.predictors.loss_models import CLASSES, SAMPLES, labels, made, normal


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_the_mean_loss_is_that_of_torch_with_ignored_labels_and_smoothing(smoothing: float, ignored: int) -> None:
    hidden, context = normal(SAMPLES, 5, 7), labels(SAMPLES, 5)
    context[0, :2] = ignored
    loss = LossInfo("cross_entropy", CLASSES, ignored, smoothing)
    predictor = made((hidden,), context, loss, layers=0)
    hidden.requires_grad_()
    value = F.cross_entropy(
        predictor.head(hidden).flatten(0, 1), context.flatten(), ignore_index=ignored, label_smoothing=smoothing
    )
    torch.testing.assert_close(predictor.loss((hidden,), context, ()), value)
    (expected,) = torch.autograd.grad(value * SAMPLES, hidden)
    torch.testing.assert_close(predictor((hidden,), context)[0], expected)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("l1", F.l1_loss),
        ("smooth_l1", lambda outputs, goal: F.smooth_l1_loss(outputs, goal, beta=0.3)),
        ("huber", lambda outputs, goal: F.huber_loss(outputs, goal, delta=0.3)),
        ("mse", F.mse_loss),
        ("binary_cross_entropy", F.binary_cross_entropy_with_logits),
    ],
)
def test_regression_losses_are_torchs(kind: str, function: Any) -> None:
    activations, goal = (normal(SAMPLES, 7),), normal(SAMPLES, 2).sigmoid()
    predictor = made(activations, goal, LossInfo(kind, 2, beta=0.3))
    assert predictor.kind == kind
    torch.testing.assert_close(predictor.loss(activations, goal, ()), function(predictor.head(activations[0]), goal))


def test_dense_labels_are_compared_with_interpolated_outputs() -> None:
    activations, context = (normal(SAMPLES, 4, 6, 5),), labels(SAMPLES, 12, 10)
    predictor = made(activations, context, layers=0)
    outputs = predictor.head(activations[0].movedim(1, -1)).movedim(-1, 1)
    expected = F.cross_entropy(F.interpolate(outputs, (12, 10), mode="bilinear"), context)
    torch.testing.assert_close(predictor.loss(activations, context, ()), expected)
