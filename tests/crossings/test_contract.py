"""What every crossing does, whichever it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sg import DelayedGradient, LinearPredictor, LocalLoss, SyntheticInputs, ThroughTime, TrueGradient
from lightning_sg.crossings.base import BatchContext, Crossing, PlainCrossing
from lightning_sg.crossings.local import LocalCrossing
from lightning_sg.crossings.scale import GradientScale
from lightning_sg.inputs.crossing import PredictedInputs
from lightning_sg.inputs.trainer import InputTrainer
from lightning_sg.recurrent.crossing import TimeCrossing
from lightning_sg.replicas import Replicas
from lightning_sg.training import PredictorTrainer, TrainerOptions
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.record import TargetPlan
from lightning_sg.training.ruled import RuledBoundary

SAMPLES = 6
LABELS = torch.arange(SAMPLES) % 3


def context(plan: TargetPlan | None = None) -> BatchContext:
    plan = plan or TargetPlan()
    return BatchContext(0, LABELS, GradientScale(), plan=plan, features=torch.ones(SAMPLES, 4))


def local(trainer: BoundaryTrainer) -> Callable[[BatchContext], Crossing]:
    return lambda batch: LocalCrossing(trainer, batch)


def ruled(rule: TrueGradient | DelayedGradient) -> BoundaryTrainer:
    return RuledBoundary("cut", rule, 1, Replicas())


def with_inputs() -> Callable[[BatchContext], Crossing]:
    inputs = InputTrainer("cut", SyntheticInputs(), delay=0, seed=0)
    trainer = PredictorTrainer("cut", LinearPredictor(), TrainerOptions())
    return lambda batch: PredictedInputs(LocalCrossing(trainer, batch), inputs, batch, learns=True)


def in_time(batch: BatchContext) -> Crossing:
    trainer = PredictorTrainer("memory", LinearPredictor(), TrainerOptions())
    crossing = TimeCrossing("memory", trainer, ThroughTime(), None, state=True)
    crossing.begin(batch)
    return crossing


MAKES: dict[str, Callable[[], Callable[[BatchContext], Crossing]]] = {
    "plain": lambda: lambda _batch: PlainCrossing(),
    "a predictor": lambda: local(PredictorTrainer("cut", LinearPredictor(), TrainerOptions())),
    "a loss of its own": lambda: local(PredictorTrainer("cut", LocalLoss(hidden=4), TrainerOptions())),
    "the true gradient": lambda: local(ruled(TrueGradient())),
    "the true gradient, late": lambda: local(ruled(DelayedGradient())),
    "predicted inputs": with_inputs,
    "time": lambda: in_time,
}


@pytest.fixture(params=MAKES)
def make(request: pytest.FixtureRequest) -> Callable[[BatchContext], Crossing]:
    return MAKES[request.param]()


def tensors() -> list[Tensor]:
    return [torch.randn(SAMPLES, 5, requires_grad=True) * 2, torch.arange(SAMPLES), torch.ones(SAMPLES, 2)]


def test_what_crosses_keeps_its_form_and_what_carries_no_gradient_its_values(
    make: Callable[[BatchContext], Crossing],
) -> None:
    for _ in range(3):  # input predictors come in once they have learned
        given = tensors()
        crossing = make(context())
        crossed = crossing.forward(list(given))
        assert [(t.shape, t.dtype) for t in crossed] == [(t.shape, t.dtype) for t in given]
        assert crossed[0].requires_grad
        assert crossed[1] is given[1]
        assert crossed[2] is given[2]
        crossing.before_backward(crossed[0].sum())
        crossing.after_backward()
        crossing.end()


def test_without_gradients_nothing_is_changed(make: Callable[[BatchContext], Crossing]) -> None:
    given = tensors()
    with torch.no_grad():
        crossed = make(context()).forward(list(given))
    assert all(left is right for left, right in zip(crossed, given, strict=True))


def test_a_batch_that_ends_without_a_backward_pass_does_no_harm(make: Callable[[BatchContext], Crossing]) -> None:
    for _ in range(2):
        crossing = make(context(TargetPlan(exact=True)))
        crossing.forward(tensors())
        crossing.end()
    leaf = torch.randn(SAMPLES, 5, requires_grad=True)
    crossing = make(context(TargetPlan(coupled=True)))
    (crossed, *_rest) = crossing.forward([leaf * 1, LABELS, torch.ones(SAMPLES, 2)])
    crossed.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones(SAMPLES, 5)), "a coupled batch has the true gradient"
