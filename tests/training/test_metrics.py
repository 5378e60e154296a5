"""How well predictions meet their targets."""

from __future__ import annotations

import pytest
import torch

from lightning_sg.training import compare


def test_compare_measures_direction_and_size_over_all_tensors_together() -> None:
    prediction = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    targets = torch.tensor([[0.0, 0.0]]), torch.tensor([10.0])
    metrics = compare(prediction, targets)
    assert metrics["cosine"] == pytest.approx(4 / 5)
    assert metrics["norm_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_compare_of_multiples(factor: float) -> None:
    targets = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),)
    metrics = compare((factor * targets[0],), targets)
    assert metrics["cosine"] == pytest.approx(1.0 if factor > 0 else -1.0)
    assert metrics["norm_ratio"] == pytest.approx(abs(factor))


def test_compare_with_a_zero_prediction_is_zero() -> None:
    expected = {"cosine": 0.0, "norm_ratio": 0.0, "bias": 1.0, "variance": 0.0}
    assert compare((torch.zeros(3),), (torch.ones(3),)) == expected
    assert compare((torch.ones(3),), (torch.zeros(3),))["cosine"] == 0.0


def test_bias_and_variance_share_the_relative_squared_error() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(500, 4, generator=generator)
    noise = torch.randn(500, 4, generator=generator)
    noise = noise - noise.mean(0)
    relative = noise.square().sum() / target.square().sum()
    noisy = compare((target + noise,), (target,))
    assert noisy["bias"].item() == pytest.approx(0.0, abs=1e-5)
    assert noisy["variance"].item() == pytest.approx(relative.item(), rel=1e-4)
    biased = compare((target + 0.5,), (target,))
    assert biased["variance"].item() == pytest.approx(0.0, abs=1e-5)
    assert biased["bias"].item() == pytest.approx((4 * 0.25 * 500 / target.square().sum()).item(), rel=1e-4)
