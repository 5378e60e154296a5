"""The sampled softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sg import HeadOptions
from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.sampled import SampledSoftmax
from tests.predictors.loss_models import labels, made, normal


def sampled(**options: Any) -> Any:
    head = HeadOptions(samples=20)
    activations, context = (normal(4, 8, 16),), labels(4, 8, classes=200)
    loss = LossInfo("cross_entropy", 200)
    return made(activations, context, loss, layers=0, head=head, **options), activations, context


@pytest.mark.parametrize("objective", ["loss", "gradient", "both"])
def test_the_sampled_softmax_leaves_the_users_random_numbers(objective: str) -> None:
    predictor, activations, context = sampled(objective=objective)
    before = torch.get_rng_state()
    predictor.loss(activations, context, activations).backward()
    predictor(activations, context)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad.isfinite().all() for parameter in predictor.parameters())


def test_the_sampled_softmax_draws_the_same_wherever_it_runs_and_anew_after_learning() -> None:
    predictor, activations, context = sampled()
    other, *_ = sampled()
    torch.manual_seed(99)  # the rest of another process
    (first,) = predictor(activations, context)
    assert torch.equal(first, other(activations, context)[0])
    assert torch.equal(first, predictor(activations, context)[0])
    for one in (predictor, other):
        one.loss(activations, context, ())
    (second,) = predictor(activations, context)
    assert not torch.equal(first, second)
    assert torch.equal(second, other(activations, context)[0])
    resumed, *_ = sampled()
    resumed.load_state_dict(predictor.state_dict())
    assert torch.equal(second, resumed(activations, context)[0])


def test_the_classes_are_those_of_the_batch_and_others_all_different() -> None:
    softmax = SampledSoftmax(200, 20)
    context = labels(64, classes=200)
    chosen, correction = softmax.draw(context)
    counted = set(context[::4].tolist())
    assert len(set(chosen.tolist())) == 40
    assert counted <= set(chosen.tolist())
    known = torch.tensor([label in counted for label in chosen.tolist()])
    assert torch.all(correction[known] == 0)
    expected = torch.tensor((200 - len(counted)) / (40 - len(counted))).log()
    torch.testing.assert_close(correction[~known], expected.expand(40 - len(counted)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sampled_loss_is_near_the_full_one(smoothing: float) -> None:
    rows, context, last = normal(32, 16), labels(32, classes=200), nn.Linear(16, 200)
    softmax = SampledSoftmax(200, 60)
    full = F.cross_entropy(last(rows), context, label_smoothing=smoothing).item()
    estimates = []
    for _ in range(20):
        estimates.append(softmax(rows, context, last, smoothing).mean().item())
        softmax.advance()
    assert sum(estimates) / 20 == pytest.approx(full, rel=0.01)
    assert len(set(estimates)) == 20


def test_ignored_labels_have_no_gradient_in_the_sampled_softmax() -> None:
    predictor, activations, context = sampled()
    context[0, :3] = -100
    (prediction,) = predictor(activations, context)
    assert torch.equal(prediction.abs().sum(-1) == 0, context == -100)
