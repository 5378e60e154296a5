"""Mixtures of synthetic and late true gradients: what is applied when, in one process as in several."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from lightning_sg import (
    DelayedGradient,
    ExactGradients,
    LateGradients,
    LossModelPredictor,
    MLPPredictor,
    SyntheticGradients,
    TrueGradient,
    ZeroPredictor,
)
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


class Nadam(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.NAdam(self.parameters(), 0.01, betas=(0.95, 0.999), decoupled_weight_decay=True)


class Sgd(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ByHand(Nadam):
    """Manual optimization, with two backward passes in each step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        optimizer.step()


def train(
    devices: int,
    *,
    stages: int = 4,
    epochs: int = 3,
    module: Any = Nadam,
    trainer: dict[str, Any] | None = None,
    **callback: Any,
) -> Any:
    """Trains, in ``devices`` processes, and returns the state of the module on each rank."""

    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        model = module(stages=stages)
        arguments: dict[str, Any] = {"max_epochs": epochs, **(trainer or {})}
        make_trainer(
            strategy="synthetic_gradients" if devices > 1 else "auto",
            devices=devices,
            callbacks=[SyntheticGradients(**callback)],
            **arguments,
        ).fit(model, loader(), loader(shuffle=False))
        return state_of(model)

    return run_ranks(devices, work) if devices > 1 else [work()]


CASES: dict[str, dict[str, Any]] = {
    "half and half": {"late": LateGradients()},
    "no further delay": {"late": LateGradients(share=0.3), "delay": 0},
    "late gradients of every third batch": {"late": LateGradients(every=3), "delay": 2},
    "late gradients alone": {"late": LateGradients(share=1)},
    "late gradients alone, of every other batch": {"late": LateGradients(share=1, every=2)},
    "predictors that learn from exact gradients on batches between": {
        "late": LateGradients(every=2),
        "exact": ExactGradients(every=3),
        "predictor": LossModelPredictor(objective="both"),
    },
    "direct predictors": {"late": LateGradients(), "predictor": MLPPredictor()},
    "no predictors": {"late": LateGradients(), "predictor": ZeroPredictor()},
    "after a warm-up": {"late": LateGradients(), "exact": ExactGradients(warm_up=4)},
    "one rule for each boundary": {
        "late": LateGradients(),
        "predictor": {"net.1": DelayedGradient(), "net.3": LossModelPredictor(), "net.5": TrueGradient()},
    },
    "accumulated batches": {"late": LateGradients(), "trainer": {"accumulate_grad_batches": 2}},
    "clipped by value": {
        "late": LateGradients(),
        "trainer": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    },
    "manual optimization": {"late": LateGradients(), "module": ByHand},
}


@pytest.mark.parametrize("case", CASES)
def test_one_two_three_and_four_processes_end_with_the_same_weights(case: str) -> None:
    (expected,) = train(1, **CASES[case])
    for devices in (2, 3, 4):  # with two and three, there are boundaries within a process
        for state in train(devices, **CASES[case]):
            assert_same_state(expected, state)
