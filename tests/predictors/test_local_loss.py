"""Local losses, and how local learners do without targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sg import FeedbackAlignment, LocalLoss, LossModelPredictor
from lightning_sg.predictors.base import LossInfo

SAMPLES, CLASSES = 8, 3


def made(predictor: Any, activations: tuple[Tensor, ...], context: Any, loss: LossInfo | None = None) -> Any:
    torch.manual_seed(0)
    predictor.build(activations, context, loss)
    return predictor


def batch(*shape: int, seed: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    activations = (torch.randn(SAMPLES, *shape, generator=generator),)
    return activations, torch.randint(CLASSES, (SAMPLES,), generator=generator)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 8, 8)])
@pytest.mark.parametrize("make", [LocalLoss, FeedbackAlignment])
def test_local_learners_learn_without_targets(make: Any, shape: tuple[int, ...]) -> None:
    activations, labels = batch(*shape)
    predictor = made(make(), activations, labels)
    optimizer = torch.optim.Adam([p for p in predictor.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = predictor.loss(activations, labels, ())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    (prediction,) = predictor(activations, labels)
    assert prediction.shape == activations[0].shape
    assert prediction.isfinite().all()
    assert prediction.abs().sum() > 0


def test_a_local_loss_predicts_as_a_loss_model_does() -> None:
    activations, labels = batch(6)
    local, model = made(LocalLoss(hidden=16), activations, labels), made(LossModelPredictor(16), activations, labels)
    torch.nn.init.normal_(local.head[-1].weight)
    model.load_state_dict(local.state_dict())
    assert torch.equal(local(activations, labels)[0], model(activations, labels)[0])


def test_a_local_loss_has_no_other_objective() -> None:
    with pytest.raises(TypeError, match="objective"):
        LocalLoss(objective="gradient")
