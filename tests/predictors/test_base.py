"""The contract's own parts: uses of targets, the default loss, a predictor of the user's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sg import GradientPredictor, TargetUse
from lightning_sg.predictors.norms import relative_error


class MeanGradient(GradientPredictor):
    """Predicts one vector for all samples."""

    def build(self, activations: tuple[Tensor, ...], context: Any, loss: Any) -> None:
        self.vectors = torch.nn.ParameterList([torch.zeros(h.shape[1:]) for h in activations])

    def forward(self, activations: tuple[Tensor, ...], context: Any) -> tuple[Tensor, ...]:
        return tuple(vector.expand_as(h) for vector, h in zip(self.vectors, activations))


@pytest.mark.parametrize(
    ("use", "asks", "learns_from_targets", "learns_without_targets"),
    [
        (TargetUse.NONE, False, False, True),
        (TargetUse.BOUND, True, False, True),
        (TargetUse.OPTIONAL, True, True, True),
        (TargetUse.REQUIRED, True, True, False),
    ],
)
def test_what_each_use_of_targets_implies(
    use: TargetUse, asks: bool, learns_from_targets: bool, learns_without_targets: bool
) -> None:
    assert use.asks is asks
    assert use.learns_from_targets is learns_from_targets
    assert use.learns_without_targets is learns_without_targets
    assert TargetUse(str(use)) is use


@pytest.mark.parametrize("use", TargetUse)
def test_by_default_exact_targets_are_wanted_by_what_learns_from_targets(use: TargetUse) -> None:
    predictor = MeanGradient()
    predictor.target_use = use
    assert predictor.wants_exact([(4, 3)], None) is use.learns_from_targets


def test_by_default_targets_are_required() -> None:
    assert MeanGradient().target_use is TargetUse.REQUIRED


def test_the_default_loss_is_the_relative_error_by_the_usual_size() -> None:
    activations, targets = (torch.zeros(4, 3),), (torch.ones(4, 3),)
    predictor = MeanGradient()
    predictor.build(activations, None, None)
    torch.nn.init.constant_(predictor.vectors[0], 0.5)
    assert predictor.loss(activations, None, targets).item() == pytest.approx(0.25)
    predictor.target_rms = torch.tensor([2.0])
    assert predictor.loss(activations, None, targets).item() == pytest.approx(0.25 / 4)
    assert predictor.loss(activations, None, targets) == relative_error(
        predictor(activations, None), targets, predictor.target_rms
    )


def test_the_default_optimizer_is_adam() -> None:
    optimizer = MeanGradient().default_optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 1e-3
