"""One boundary's input predictor: what it learns from, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import (
    InputPredictor,
    NonFinitePredictionError,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticInputs,
)
from lightning_sg.inputs import InputTrainer
from lightning_sg.inputs.record import InputRecord
from lightning_sg.training.ledger import Ledger
from tests.input_models import Told, classifier, fit
from tests.models import FEATURES


def test_it_learns_what_it_has_not_seen() -> None:
    """The relative error on held-out batches falls far below that of the mean."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU()).requires_grad_(False)
    trainer = InputTrainer("cut", SyntheticInputs(), delay=1, seed=1)
    held_out = torch.randn(200, FEATURES)
    errors = []
    for _ in range(300):
        x = torch.randn(64, FEATURES)
        trainer.cross(x, [network(x)])
        if trainer.learned:
            with torch.no_grad():
                (guess,) = trainer.predictor(held_out)
            true = network(held_out)
            errors.append(float((guess - true).square().sum() / true.square().sum()))
    of_mean = float((network(held_out).mean(0) - network(held_out)).square().sum() / network(held_out).square().sum())
    assert errors[0] == pytest.approx(of_mean, rel=0.2)  # it begins with the mean
    assert errors[-1] < 0.2 * of_mean


class Linear(InputPredictor):
    """A predictor of one's own, as docs/unlocked.md shows it."""

    def build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        (shape,) = shapes
        self.net = nn.Linear(features.flatten(1).shape[1], shape[0])

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return (self.net(features.flatten(1)),)


@pytest.mark.slow
def test_a_predictor_of_ones_own_learns_with_an_optimizer_of_ones_own() -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.05))
        return made[-1]

    settings = SyntheticInputs(Linear(), optimizer=optimizer)
    trainer = fit(classifier(), SyntheticGradients(inputs=settings), max_epochs=40)
    assert len(made) == 3
    assert trainer.callback_metrics["sg/net.1/input_error"] < 0.7


class NotingLedger(Ledger[InputRecord]):
    """Notes which batch was due before which."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def due(self, now: int) -> list[InputRecord]:
        ready = super().due(now)
        self.seen += [(record.step, now) for record in ready]
        return ready


def test_batches_are_learned_from_delay_and_one_later_in_order() -> None:
    trainer = InputTrainer("cut", SyntheticInputs(), delay=2, seed=1)
    trainer.ledger = ledger = NotingLedger()
    for step in range(6):
        x = torch.randn(4, 3)
        given = trainer.cross(x, [torch.randn(4, 2)])
        assert (given is None) == (step < 3)  # until it has learned once, the true activation is used
    assert ledger.seen == [(0, 3), (1, 4), (2, 5)]
    assert trainer.learned == 3


def test_warm_up_uses_the_true_activation_while_it_learns() -> None:
    trainer = InputTrainer("cut", SyntheticInputs(warm_up=5), delay=0, seed=1)
    used = [trainer.cross(torch.randn(4, 3), [torch.randn(4, 2)]) is not None for _ in range(8)]
    assert used == [False] * 5 + [True] * 3
    assert trainer.learned == 7


def test_errors_name_the_boundary_and_say_what_to_do() -> None:
    wrong = Told(lambda features, shapes: (torch.zeros(len(features), 3),))
    with pytest.raises(SyntheticGradientsError, match=r"boundary 'net.1' predicts activations of shapes \[\(16, 3\)\]"):
        fit(classifier(), SyntheticGradients(inputs=SyntheticInputs(wrong)))
    raising = Told(lambda features, shapes: (features @ torch.ones(3, 3),))
    with pytest.raises(SyntheticGradientsError, match=r"boundary 'net.1' cannot predict .* another"):
        fit(classifier(), SyntheticGradients(inputs=SyntheticInputs(raising)))
    nan = Told(lambda features, shapes: (torch.full((len(features), *shapes[0]), torch.nan),))
    with pytest.raises(NonFinitePredictionError, match=r"synthetic input at boundary 'net.1' is not finite"):
        fit(classifier(), SyntheticGradients(inputs=SyntheticInputs(nan)))
    halved = SyntheticInputs(source=lambda batch: batch[0][::2])
    with pytest.raises(SyntheticGradientsError, match=r"Boundary 'net.1' is crossed .* samples first"):
        fit(classifier(), SyntheticGradients(inputs=halved))
