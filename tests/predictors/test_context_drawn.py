"""Predictors are told of what the loss compares the network with, also where the step draws it at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import Boundary, MLPPredictor, SyntheticGradients
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks
from tests.seen_models import OUTPUTS, WIDTH, tensors
from tests.traced import traced

X, GOAL, _COUNTS, _WEIGHT = tensors(24)
#: Makes, of a batch, what goes into the network and what the loss compares its output with.
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]


def a_part(x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    torch.rand(3)  # what else is drawn before
    rows = torch.randperm(len(x))[: len(x) // 2]
    return x[rows], lambda out: y[rows]


def noise(x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    level = torch.randint(1, 4, (len(x), 1))
    added = torch.randn(len(x), OUTPUTS)
    return torch.cat([x[:, :2] * level, added], dim=1), lambda out: added * level


def dropped(x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    kept = F.dropout(y, 0.5)
    return x, lambda out: kept


def in_the_last_stage(x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    early = torch.rand(2)
    return x + early.sum(), lambda out: y + torch.randn_like(y) * early.sum()


DRAWN = {"a part of the batch": a_part, "noise": noise, "dropout": dropped, "in the last stage": in_the_last_stage}


class Drawing(pl.LightningModule):
    """Two stages; what they learn is drawn in each step."""

    def __init__(self, draw: Draw, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), Boundary(), nn.Linear(16, OUTPUTS))
        self.dropout = nn.Dropout(dropout)
        self.draw = draw
        self.goals: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, goal = self.draw(*batch)
        out = self.dropout(self.net(x))
        self.goals.append(goal(out).clone())
        return F.mse_loss(out, self.goals[-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Notes(MLPPredictor):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(hidden=4)
        self.told: list[Any] = []

    def forward(self, activations: Any, context: Any) -> Any:
        if not torch.is_grad_enabled():  # it does not learn
            self.told.append(context)
        return super().forward(activations, context)


def fit(draw: Draw, devices: int = 1, **options: Any) -> tuple[Drawing, Any]:
    pl.seed_everything(3, verbose=False)
    module, callback = Drawing(draw), SyntheticGradients(predictor=Notes(), **options)
    trainer = make_trainer(
        max_epochs=2,
        callbacks=[callback],
        devices=devices,
        strategy="synthetic_gradients" if devices > 1 else "auto",
    )
    trainer.fit(module, DataLoader(TensorDataset(X, GOAL), batch_size=8))
    return module, callback


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_predictors_are_told_what_the_step_draws(draw: Draw) -> None:
    module, callback = fit(draw)
    predictor = callback.trainers["net.2"].predictor
    assert len(predictor.told) == 6
    for told, goal in zip(predictor.told, module.goals[-6:], strict=True):  # the first step runs for the trace, too
        torch.testing.assert_close(told, goal)


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_two_processes_end_with_the_weights_of_one(draw: Draw) -> None:
    whole, _callback = fit(draw)
    for state in run_ranks(2, lambda: state_of(fit(draw, devices=2)[0])):
        assert_same_state(state_of(whole), state)


def test_drawing_again_leaves_the_users_numbers_alone() -> None:
    def after(**options: Any) -> Tensor:
        fit(a_part, **options)
        return torch.rand(3)

    torch.testing.assert_close(after(), after(context=None), rtol=0, atol=0)


def test_it_is_said_what_is_drawn() -> None:
    found = traced(Drawing(noise), (X, GOAL)).inputs
    assert found.context is not None
    assert "what the step draws (randint, randn), by the model's mse_loss" in found.context.words


def of_a_generator(x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return x, lambda out: y + torch.randn(y.shape, generator=torch.Generator())


@pytest.mark.parametrize(
    ("draw", "dropout", "reason"),
    [
        (of_a_generator, 0.0, "it is drawn from a generator of the step's (randn)"),
        (in_the_last_stage, 0.5, "it is drawn at random (randn_like), after numbers that cannot be drawn again"),
    ],
    ids=["a generator", "after dropout"],
)
def test_what_cannot_be_drawn_again_is_named(draw: Draw, dropout: float, reason: str) -> None:
    found = traced(Drawing(draw, dropout), (X, GOAL)).inputs
    assert found.context is None
    assert reason in found.reason
