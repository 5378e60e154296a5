"""The alignment guard: when it takes over, what it does then, and when it gives back."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import (
    AlignmentGuard,
    Boundary,
    ExactGradients,
    GradientPredictor,
    LocalLoss,
    MLPPredictor,
    SyntheticGradients,
    TrueGradient,
    ZeroPredictor,
)
from lightning_sg.predictors.base import Gradients, LossInfo
from tests.models import CLASSES, FEATURES, Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


class Switched(GradientPredictor):
    """Predicts the opposite of what it learned last until it has learned from ``bad`` batches, then the same."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad = bad

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        self.weight = nn.Parameter(torch.zeros(()))
        self.learned = 0
        self.mean = torch.zeros_like(activations[0][0])

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        sign = -1.0 if self.learned < self.bad else 1.0
        return (sign * self.mean.expand_as(activations[0]),)

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        self.learned += 1
        self.mean = targets[0].mean(0)
        return self.weight * 0.0


class Broken(MLPPredictor):
    """Predicts NaN from its tenth prediction on, until it is built anew."""

    built = 0

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        super().build(activations, context, loss)
        Broken.built += 1
        self.broken = Broken.built == 1
        self.count = 0

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        self.count += 1
        gradients = super().forward(activations, context)
        return tuple(g * math.nan for g in gradients) if self.broken and self.count > 10 else gradients


class Straight(Classifier):
    """Without BatchNorm, whose gradients have no mean over a batch for :class:`Switched` to predict."""

    def __init__(self, stages: int) -> None:
        super().__init__(stages)
        for block in self.net:
            if isinstance(block, nn.Sequential):
                block[1] = nn.Identity()


class Same(Straight):
    """Its target hardly changes: the labels are all alike, and it does not learn."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), torch.zeros_like(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(module: pl.LightningModule, callback: SyntheticGradients, epochs: int = 2) -> list[str]:
    """Trains; returns what was warned of a boundary."""
    pl.seed_everything(7, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_epochs=epochs, callbacks=[callback]).fit(module, loader())
    return [str(warning.message) for warning in caught if str(warning.message).startswith("Boundary ")]


def test_it_takes_over_while_predictions_point_away_and_gives_back_when_they_do_not() -> None:
    guard = AlignmentGuard(patience=10)
    callback = SyntheticGradients(predictor=Switched(bad=40), guard=guard, exact=ExactGradients(every=0))
    said = fit(Same(stages=2), callback, epochs=24)  # 120 batches
    assert len(said) == 2
    assert "pointed away" in said[0]
    assert "falls back to no gradient" in said[0]
    assert "net.1" in said[0]
    assert "used again" in said[1]
    assert not callback.trainers["net.1"].guarded


@pytest.mark.parametrize(("fallback", "like"), [("zero", ZeroPredictor()), ("couple", TrueGradient())])
def test_meanwhile_the_stage_is_given_the_fallback(fallback: Any, like: GradientPredictor) -> None:
    """The guard takes over at the tenth batch learned from; from there on the runs are alike."""

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradient = pl_module.net[0][0].weight.grad
            self.last = None if gradient is None else gradient.clone()

    def last(callback: SyntheticGradients) -> Tensor | None:
        pl.seed_everything(7, verbose=False)
        look = Look()
        module = Same(stages=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_trainer(max_epochs=6, callbacks=[callback, look]).fit(module, loader())
        return look.last

    arguments: dict[str, Any] = {"exact": ExactGradients(every=0)}
    guarded = SyntheticGradients(
        predictor=Switched(bad=999), guard=AlignmentGuard(patience=10, fallback=fallback), **arguments
    )
    found, expected = last(guarded), last(SyntheticGradients(predictor=like, **arguments))
    assert guarded.trainers["net.1"].guarded
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        torch.testing.assert_close(found, expected)


def test_a_predictor_can_be_the_fallback() -> None:
    callback = SyntheticGradients(
        predictor=Switched(bad=999),
        guard=AlignmentGuard(patience=10, fallback=LocalLoss()),
        exact=ExactGradients(every=0),
    )
    module = Classifier(stages=3)
    said = fit(module, callback, epochs=12)
    assert any("falls back to LocalLoss" in line for line in said)
    record = list(callback.trainers["net.1"].ledger)[-1]
    assert record.prediction is not None
    assert record.prediction[0].abs().sum() > 0
    assert record.shadow is not None


def test_a_predictor_that_is_not_finite_starts_afresh() -> None:
    Broken.built = 0
    module = Classifier(stages=2)
    said = fit(module, SyntheticGradients(predictor=Broken(hidden=8), guard=AlignmentGuard(patience=20)), epochs=30)
    assert Broken.built == 2
    assert "not finite" in said[0]
    assert "used again" in said[-1]
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


def test_one_and_two_processes_decide_alike() -> None:
    def work(devices: int) -> Any:
        pl.seed_everything(7, verbose=False)
        module = Straight(stages=3)
        callback = SyntheticGradients(
            predictor=Switched(bad=15),
            guard=AlignmentGuard(patience=10, fallback="couple"),
            exact=ExactGradients(every=3),
        )
        strategy = "synthetic_gradients" if devices > 1 else "auto"
        make_trainer(strategy=strategy, devices=devices, max_epochs=4, callbacks=[callback]).fit(
            module, loader(), loader(shuffle=False)
        )
        return state_of(module)

    expected = work(1)
    for state in run_ranks(2, lambda: work(2)):
        assert_same_state(expected, state)


class Plain(pl.LightningModule):
    """No normalisation layers, SGD with momentum and a large learning rate: where errors feed on themselves."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        layers: list[nn.Module] = []
        for place in range(5):
            layers += [nn.Linear(64 if place else FEATURES, 64), nn.ReLU(), Boundary()]
        self.net = nn.Sequential(*layers, nn.Linear(64, CLASSES))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


def loss_of(rate: float, predictor: Any) -> float:
    """The mean loss of the last steps."""
    pl.seed_everything(1, verbose=False)
    module = Plain(rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = [SyntheticGradients(predictor=predictor)]
        make_trainer(max_epochs=40, callbacks=callbacks).fit(module, loader())
    return sum(module.losses[-20:]) / 20


@cache
def loss_detached(rate: float) -> float:
    return loss_of(rate, ZeroPredictor())


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.05, 0.2])
@pytest.mark.parametrize("predictor", ["auto", MLPPredictor(conditional=False), MLPPredictor()])
def test_a_network_without_normalisation_ends_no_worse_than_detached(rate: float, predictor: Any) -> None:
    detached = loss_detached(rate)
    assert math.isfinite(detached)
    assert loss_of(rate, predictor) <= 1.1 * detached + 0.1


@pytest.mark.parametrize(
    "arguments",
    [{"threshold": 1.0}, {"threshold": -1.1}, {"margin": -0.1}, {"patience": 0}, {"fallback": "stop"}],
)
def test_bad_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"AlignmentGuard\((?P<name>\w+)=\.\.\.\): (?P=name) must be"):
        AlignmentGuard(**arguments)
