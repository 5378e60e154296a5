"""The rivals of synthetic gradients: what each promises, and what it computes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg import (
    DelayedGradient,
    Detach,
    FeedbackAlignment,
    LocalLoss,
    LossModelPredictor,
    TrueGradient,
    ZeroPredictor,
)
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


@pytest.mark.parametrize(
    ("predictor", "exact", "needs_target", "correction"),
    [
        (ZeroPredictor(), False, False, 0.0),
        (TrueGradient(), True, True, 0.0),
        (DelayedGradient(), False, True, 1.0),
        (DelayedGradient(shrink=0.7), False, True, 0.7),
        (LocalLoss(), False, False, 0.0),
        (FeedbackAlignment(), False, False, 0.0),
        (LossModelPredictor(), False, True, 0.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_each_asks_of_the_callback(predictor: Any, exact: bool, needs_target: bool, correction: float) -> None:
    assert (predictor.exact, predictor.needs_target, predictor.correction) == (exact, needs_target, correction)


def test_detach_is_the_zero_predictor() -> None:
    assert Detach is ZeroPredictor


def test_a_delayed_gradient_predicts_nothing_and_has_no_parameters() -> None:
    predictor = made(DelayedGradient(), *batch(6))
    assert predictor(*batch(6)) is None
    assert not list(predictor.parameters())


@pytest.mark.parametrize("shrink", [0.0, -1.0, 1.1, float("nan")])
def test_a_delayed_gradient_is_not_enlarged(shrink: float) -> None:
    with pytest.raises(ValueError, match="DelayedGradient needs 0 < shrink <= 1"):
        DelayedGradient(shrink)


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


@pytest.mark.parametrize("trained", [False, True])
def test_feedback_is_the_readouts_error_times_a_fixed_matrix(trained: bool) -> None:
    activations, labels = batch(6)
    predictor = made(FeedbackAlignment(scale=2.0, normalize="none"), activations, labels)
    readout = predictor.readout.head[-1]
    if trained:
        torch.nn.init.normal_(readout.weight)
    error = (activations[0] @ readout.weight.T + readout.bias).softmax(-1) - F.one_hot(labels, CLASSES)
    (matrix,) = predictor.feedback
    assert matrix.shape == (CLASSES, 6)
    torch.testing.assert_close(predictor(activations, labels)[0], error.detach() @ matrix)


def test_feedback_to_a_map_is_spread_over_the_cells_that_were_averaged() -> None:
    activations, labels = batch(2, 14, 14)
    predictor = made(FeedbackAlignment(), activations, labels)
    (error,) = predictor.errors(activations, labels)
    rows = (error @ predictor.feedback[0]).reshape(SAMPLES, 2, 7, 7)
    spread = rows.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    torch.testing.assert_close(predictor(activations, labels)[0], spread)


def test_the_feedback_matrix_is_not_trained_but_saved() -> None:
    activations, labels = batch(6)
    predictor = made(FeedbackAlignment(), activations, labels)
    predictor.loss(activations, labels, ()).backward()
    assert predictor.feedback[0].grad is None
    other = FeedbackAlignment()
    torch.manual_seed(1)
    other.build(activations, labels, None)
    other.load_state_dict(predictor.state_dict())
    assert torch.equal(other(activations, labels)[0], predictor(activations, labels)[0])


@pytest.mark.parametrize(
    ("options", "message"), [({"scale": 0.0}, "scale > 0"), ({"hidden": 0}, "hidden >= 1"), ({"layers": -1}, "layers")]
)
def test_feedback_alignment_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"FeedbackAlignment needs .*{message}"):
        FeedbackAlignment(**options)


@pytest.mark.parametrize("make", [LocalLoss, FeedbackAlignment, DelayedGradient, ZeroPredictor])
def test_rivals_can_be_copied_and_pickled(make: Any) -> None:
    activations, labels = batch(6)
    predictor = made(make(), activations, labels)
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        expected, got = predictor(activations, labels), other(activations, labels)
        assert (expected is None and got is None) or torch.equal(expected[0], got[0])
