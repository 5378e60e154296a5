"""All stages stop after the same batch, whoever wants to stop."""

from __future__ import annotations

import time
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
)

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy
from tests.blocks import plain
from tests.everywhere import everywhere, trainer_for
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks
from tests.two_stages import Two


class Worsening(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.log("val_loss", 1.0 + self.current_epoch)


def test_early_stopping_stops_all_stages() -> None:
    def work(devices: int) -> int:
        stopping = EarlyStopping("val_loss", patience=1)
        trainer = trainer_for(devices, [SyntheticGradients(), stopping], max_epochs=10)
        trainer.fit(Worsening(), loader(), loader())
        return trainer.current_epoch

    assert everywhere(1, work) + everywhere(3, work) == [2, 2, 2, 2]


class StopAt(Callback):
    """One process alone wants to stop, in mid-epoch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 7:
            trainer.should_stop = True


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stop_that_one_stage_wants_stops_all_after_the_same_batch(rank: int) -> None:
    def work(devices: int) -> int:
        trainer = trainer_for(devices, [SyntheticGradients(), StopAt(rank)], max_epochs=1)
        trainer.fit(Classifier(), loader(samples=16 * 40))
        return trainer.global_step

    steps = everywhere(3, work)
    assert len(set(steps)) == 1
    assert 7 <= steps[0] <= 20  # the wish travels up to the first stage, and the last batches travel down


class Stopping(Two):
    def on_train_epoch_end(self) -> None:
        if self.trainer.is_global_zero:
            self.trainer.should_stop = True


def test_a_stop_at_the_end_of_an_epoch_is_every_stages() -> None:
    def work() -> int:
        trainer = make_trainer(strategy=SyntheticGradientStrategy(timeout=15.0), devices=2, max_epochs=5)
        trainer.fit(Stopping(), loader())
        return trainer.current_epoch

    assert run_ranks(2, work) == [1, 1]


def test_max_time_stops_all_stages_after_the_same_batch() -> None:
    class Slow(lightning_callbacks.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_arguments: Any) -> None:
            time.sleep(0.02)

    def work() -> tuple[int, float]:
        began = time.monotonic()
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=20.0),
            devices=2,
            max_epochs=-1,
            max_time={"seconds": 3},
            callbacks=[Slow()],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(plain(), loader())
        return trainer.global_step, time.monotonic() - began

    (steps, took), (other, _) = run_ranks(2, work)
    assert steps == other > 5
    assert took < 15
