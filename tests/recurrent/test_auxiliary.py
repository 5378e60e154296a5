"""The auxiliary task: what its loss adds to the target of a synthetic gradient."""

from __future__ import annotations

import torch

from lightning_sg import LinearPredictor
from lightning_sg.predictors.norms import relative_error
from lightning_sg.recurrent.auxiliary import Auxiliary
from lightning_sg.training.learner import Learner


def test_it_returns_the_gradient_of_its_weighted_loss_before_it_learns() -> None:
    torch.manual_seed(0)
    learner = Learner(LinearPredictor(conditional=False, normalize="none"), None, seed=1)
    auxiliary = Auxiliary(learner, weight=0.5)
    state, goal = torch.randn(6, 4), torch.randn(6, 4)
    auxiliary.gradient((state,), (goal,), None)  # builds the predictor, which starts at zero
    leaf = state.clone().requires_grad_()
    (0.5 * 6 * relative_error(learner.predictor((leaf,), None), (goal,))).backward()
    before = [parameter.clone() for parameter in learner.predictor.parameters()]
    (found,) = auxiliary.gradient((state,), (goal,), None)
    assert leaf.grad is not None
    assert leaf.grad.any()
    torch.testing.assert_close(found, leaf.grad)
    assert not all(torch.equal(old, new) for old, new in zip(before, learner.predictor.parameters(), strict=True))
