"""The bound on predictions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sg.training import TargetScale, compare

CPU = torch.device("cpu")


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


@pytest.mark.parametrize("bound", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", [1e-3, 0.2, 5.0, 1e4])
def test_a_prediction_is_at_most_bound_times_the_targets_in_size(bound: float, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = TargetScale(bound)
    targets = torch.randn(16, 6, generator=generator), 0.01 * torch.randn(16, 3, generator=generator)
    scale.update(targets)
    predictions = tuple(size * torch.randn(target.shape, generator=generator) for target in targets)
    for limited, prediction, target in zip(scale.limit(predictions), predictions, targets):
        assert rms(limited) == pytest.approx(min(rms(prediction), bound * rms(target)), rel=1e-5)
        assert compare((limited,), (prediction,))["cosine"] == pytest.approx(1.0)


def test_before_the_first_target_the_bound_is_zero() -> None:
    (limited,) = TargetScale().limit((torch.ones(3, 2),))
    assert torch.equal(limited, torch.zeros(3, 2))
    assert TargetScale().rms is None


def test_the_size_of_targets_is_an_average_over_squares_that_weights_recent_ones() -> None:
    scale = TargetScale(decay=0.9)
    for value in (1.0, 2.0, 4.0):
        scale.update((torch.full((5,), value),))
    expected = ((0.81 * 1 + 0.9 * 4 + 16) / (0.81 + 0.9 + 1)) ** 0.5
    torch.testing.assert_close(scale.rms, torch.tensor([expected]))


def test_the_bound_recovers_from_zero_targets() -> None:
    scale = TargetScale()
    scale.update((torch.zeros(4),))
    (limited,) = scale.limit((torch.ones(4),))
    assert torch.equal(limited, torch.zeros(4))
    for _ in range(60):
        scale.update((torch.full((4,), 2.0),))
    (limited,) = scale.limit((torch.full((4,), 100.0),))
    torch.testing.assert_close(limited, torch.full((4,), 2.0), rtol=0.01, atol=0)


def test_a_zero_prediction_stays_zero() -> None:
    scale = TargetScale()
    scale.update((torch.ones(4),))
    assert torch.equal(scale.limit((torch.zeros(4),))[0], torch.zeros(4))


@pytest.mark.parametrize("targets", [0, 3])
def test_the_bound_survives_saving(targets: int) -> None:
    scale, restored = TargetScale(), TargetScale()
    for value in range(targets):
        scale.update((torch.full((4,), value + 1.0), torch.full((2,), value + 5.0)))
    restored.load_state_dict(scale.state_dict(), CPU)
    for each in (scale, restored):
        each.update((torch.ones(4), torch.ones(2)))
    assert torch.equal(restored.rms, scale.rms)  # type: ignore[arg-type]
