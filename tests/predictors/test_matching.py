"""How a gradient is matched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg import Matching
from lightning_sg.predictors.matching import gradient_error
from lightning_sg.predictors.norms import relative_error
from tests.predictors.loss_models import SAMPLES, labels, made, normal


def test_the_ways_to_match_measure_what_they_say() -> None:
    predictions, targets = (normal(4, 5), normal(4, 2)), (normal(4, 5, seed=1), normal(4, 2, seed=2))
    rms = torch.tensor([0.5, 2.0])
    error = sum((p - t).square().sum() for p, t in zip(predictions, targets))
    usual = 20 * 0.25 + 8 * 4.0
    assert gradient_error("l2", predictions, targets, rms) == pytest.approx(float(error) / usual)
    assert gradient_error("normalized", predictions, targets, rms) == relative_error(predictions, targets, rms)
    long = tuple(1e3 * part for part in predictions)
    flat = [torch.cat([part.flatten() for part in parts]) for parts in (predictions, targets)]
    expected = 1 - F.cosine_similarity(flat[0], flat[1], dim=0).item()
    assert gradient_error("cosine", long, targets, None).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("measure", ["l2", "cosine", "normalized"])
@pytest.mark.parametrize("rms", [None, torch.zeros(1), torch.full((1,), 1e-20), torch.ones(1)])
@pytest.mark.parametrize("size", [0.0, 1e-20])
@pytest.mark.parametrize("start", [0.0, 1e-3, 1.0])
def test_targets_of_zero_do_no_harm(measure: Any, rms: Tensor | None, size: float, start: float) -> None:
    prediction = (start * normal(SAMPLES, 7)).requires_grad_()
    error = gradient_error(measure, (prediction,), (size * normal(SAMPLES, 7, seed=1),), rms)
    (step,) = torch.autograd.grad(error, prediction)
    assert error.isfinite()
    assert error <= 101
    assert step.isfinite().all()
    # In units of the prediction itself the step is bounded, whatever the target.
    assert (step * prediction).abs().sum() <= 201


@pytest.mark.parametrize("measure", ["l2", "cosine", "normalized"])
def test_a_batch_of_zero_targets_hardly_moves_a_trained_predictor(measure: Any) -> None:
    activations, context = (normal(SAMPLES, 7),), labels(SAMPLES)
    predictor = made(activations, context, objective="gradient", matching=Matching(measure=measure))
    predictor.target_rms = predictor(activations, context)[0].square().mean().sqrt().reshape(1)

    def slope(targets: Tensor) -> float:
        predictor.zero_grad()
        predictor.loss(activations, context, (targets,)).backward()
        return max(p.grad.abs().max().item() for p in predictor.parameters() if p.grad is not None)

    usual = slope(float(predictor.target_rms) * normal(SAMPLES, 7, seed=3))
    assert slope(torch.zeros(SAMPLES, 7)) < 10 * usual


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="measure must be"):
        Matching(measure="l3")  # type: ignore[arg-type]
