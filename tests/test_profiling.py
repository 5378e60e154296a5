"""The actions that Lightning's profilers see, and their kinds."""

from __future__ import annotations

import pytest
from lightning.pytorch.profilers import SimpleProfiler

from lightning_sg import profiling
from lightning_sg.profiling import BATCH, LIGHTNING, kind_of
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("[Strategy]SingleDeviceStrategy.training_step", "compute"),
        ("[LightningModule]Net.optimizer_step", "compute"),
        ("[_TrainingEpochLoop].train_dataloader_next", "data"),
        (profiling.WAIT_TARGET, "wait"),
        (profiling.LEARN, "predictor"),
        ("[Callback]Timer.on_train_batch_end", LIGHTNING),
        (BATCH, LIGHTNING),
    ],
)
def test_kind_of_an_action(action: str, kind: str) -> None:
    assert kind_of(action) == kind


def profiled_actions() -> list[str]:
    profiler = SimpleProfiler()
    trainer = make_trainer(strategy="synthetic_gradients", devices=2, max_steps=3, profiler=profiler)
    trainer.fit(Classifier(), loader())
    return list(profiler.recorded_durations)


def test_lightnings_profiler_sees_waiting_and_sending() -> None:
    last, first = run_ranks(2, profiled_actions)
    assert {profiling.WAIT_ACTIVATIONS, profiling.SEND, profiling.FAKE_TENSORS} <= set(last)
    assert {profiling.WAIT_TARGET, profiling.SEND, profiling.PREDICT, profiling.LEARN} <= set(first)
