"""The oracle: a black box in the last of two processes computes what it computes in one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_sg import BlackBox, ControlVariate, Critic, Evolution, ScoreFunction, SyntheticGradients
from tests.blackbox.models import Controller, loader
from tests.everywhere import everywhere, trainer_for
from tests.models import assert_same_state, state_of

CASES: dict[str, Any] = {
    "critic": (lambda: BlackBox(noise=0.2), {}),
    "no_replay": (lambda: BlackBox(noise=0.2, estimator=Critic(hidden=16), replay=0), {}),
    "score_function": (lambda: BlackBox(noise=0.2, estimator=ScoreFunction(hidden=16)), {}),
    "control_variate": (lambda: BlackBox(noise=0.2, estimator=ControlVariate(hidden=16)), {}),
    "evolution": (lambda: BlackBox(noise=0.2, estimator=Evolution(), evaluations=4), {}),
    "accumulation": (lambda: BlackBox(noise=0.2), {"accumulate_grad_batches": 2}),
    "bf16": (lambda: BlackBox(noise=0.2), {"precision": "bf16-mixed"}),
}


@pytest.mark.filterwarnings("ignore:The check of the boundaries ended")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_with_the_weights_of_one(case: str) -> None:
    plant, arguments = CASES[case]

    def work(devices: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        pl.seed_everything(3, verbose=False)
        module = Controller(plant(), cut=True)
        start = state_of(module)
        trainer_for(devices, [SyntheticGradients()], max_epochs=3, **arguments).fit(module, loader(), loader())
        return start, state_of(module)

    ((start, expected),) = everywhere(1, work)
    moved = [name for name in start if not torch.equal(start[name], expected[name])]
    assert moved == list(start)
    for _start, state in everywhere(2, work):
        if case == "bf16":
            for name, tensor in expected.items():
                torch.testing.assert_close(state[name], tensor, rtol=2e-2, atol=2e-2)
        else:
            assert_same_state(expected, state)


class Slow(Controller):
    """Its scores come from a pool of threads, one batch after the next has begun at the earliest."""

    pool: ThreadPoolExecutor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        costs = self.costs(batch)
        return self.plant.loss([self.pool.submit(part.clone) for part in costs.split(7)])

    def on_train_start(self) -> None:
        self.pool = ThreadPoolExecutor(2)

    def on_train_end(self) -> None:
        self.pool.shutdown()


@pytest.mark.filterwarnings("ignore:The check of the boundaries ended")
@pytest.mark.parametrize("delay", [0, 2])
def test_scores_that_come_later_are_learned_from_at_the_same_step_everywhere(delay: int) -> None:
    def work(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = Slow(cut=True)
        trainer_for(devices, [SyntheticGradients(delay=delay)], max_epochs=3).fit(module, loader())
        return state_of(module)

    (expected,) = everywhere(1, work)
    for state in everywhere(2, work):
        assert_same_state(expected, state)
