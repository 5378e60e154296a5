"""A trace that ends between ``toggle_optimizer`` and ``untoggle_optimizer`` leaves no parameter frozen."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import Boundary, SyntheticGradients, TrueGradient
from lightning_sg.boundary import Boundaries
from lightning_sg.partition import trace_step
from tests.models import FEATURES, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks

NOISE, HIDDEN = 4, 8


class Adversarial(pl.LightningModule):
    """A generator with a boundary in it, and a discriminator; each trains while the other is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(NOISE, HIDDEN), nn.Tanh(), Boundary(), nn.Linear(HIDDEN, FEATURES), nn.Tanh()
        )
        self.discriminator = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        self.discriminator[0].bias.requires_grad_(False)  # frozen by the user, and to stay so

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        made = self.generator(real[:, :NOISE])
        self._update(first, self._loss(made, 1.0))
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        self._update(second, self._loss(real, 1.0) + self._loss(made.detach(), 0.0))
        self.untoggle_optimizer(second)

    def _loss(self, samples: Tensor, goal: float) -> Tensor:
        scores = self.discriminator(samples)
        return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, goal))

    def _update(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.discriminator)]


def trainable(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def train(devices: int, **arguments: Any) -> tuple[dict[str, Tensor], dict[str, bool]]:
    pl.seed_everything(4, verbose=False)
    module = Adversarial()
    strategy = "synthetic_gradients" if devices > 1 else "auto"
    trainer = make_trainer(strategy=strategy, devices=devices, **arguments)
    trainer.fit(module, loader(shuffle=False))
    return state_of(module), trainable(module)


def test_a_trace_restores_requires_grad() -> None:
    module = Adversarial()
    before = trainable(module)
    kept = module.discriminator[2].weight

    def step() -> None:
        kept.requires_grad_(False)
        module.generator[0].weight.requires_grad_(False)
        module.manual_backward(module._loss(module.generator(torch.ones(2, NOISE)), 1.0))
        raise AssertionError("the trace ends at manual_backward")

    boundaries = Boundaries(module)
    trace = trace_step(module, boundaries.sites, step, torch.device("cpu"))
    boundaries.remove()
    assert trace.order == ["generator.2"]
    assert trainable(module) == before


def test_a_discriminator_trains_after_a_trace_that_froze_it() -> None:
    state, frozen = train(1, callbacks=[SyntheticGradients(predictor=TrueGradient())])
    pl.seed_everything(4, verbose=False)
    plain = Adversarial()
    expected = trainable(plain)
    make_trainer().fit(plain, loader(shuffle=False))
    assert frozen == expected
    assert_same_state(state, state_of(plain), exact=True)


def test_two_processes_train_generator_and_discriminator_as_one() -> None:
    state, expected = train(1, callbacks=[SyntheticGradients()])
    for other, flags in run_ranks(2, lambda: train(2, callbacks=[SyntheticGradients()])):
        assert_same_state(state, other)
        assert flags == expected
