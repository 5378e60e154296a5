"""The oracle: a run split over processes computes what the same run computes in one process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_sg import SyntheticGradients
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


def train(devices: int, delay: int = 1, epochs: int = 4, **callback: Any) -> Any:
    """Trains, in ``devices`` processes, and returns the state of the module on each rank."""

    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=4)
        strategy = "synthetic_gradients" if devices > 1 else "auto"
        trainer = make_trainer(
            strategy=strategy,
            devices=devices,
            max_epochs=epochs,
            callbacks=[SyntheticGradients(delay=delay, **callback)],
        )
        trainer.fit(module, loader(), loader(shuffle=False))
        return state_of(module), {k: float(v) for k, v in trainer.callback_metrics.items()}

    return run_ranks(devices, work) if devices > 1 else [work()]


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_one_two_and_four_processes_end_with_the_same_weights(delay: int) -> None:
    ((expected, metrics),) = train(1, delay)
    for devices in (2, 4):
        for state, seen in train(devices, delay):
            assert_same_state(expected, state)
            assert seen["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-5)
