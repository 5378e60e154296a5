"""What a step has held is let go of at its end, not when Python next looks for cycles."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sg import (
    AlignmentGuard,
    Chunks,
    LinearPredictor,
    LocalLoss,
    SyntheticGradients,
    SyntheticInputs,
    ThroughTime,
)
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks
from tests.test_recurrent import CHUNK, LENGTH, sequences
from tests.test_recurrent_stages import TwoStages

FIRST, STEPS = 6, 10


class Garbage(Callback):
    """Collects what some steps leave behind that only the search for cycles finds."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_others: Any) -> None:
        if trainer.global_step == FIRST:
            gc.collect()
            gc.disable()
        if trainer.global_step == STEPS - 1:
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            self.found = [type(each).__name__ for each in gc.garbage if is_of_interest(each)]
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


def is_of_interest(each: Any) -> bool:
    kind = type(each)
    return kind.__module__.startswith(("lightning_sg", "tests")) or kind.__name__ in ("Tensor", "Parameter")


def left_by(devices: int, make: Callable[[], SyntheticGradients], module: Any = None, data: Any = None) -> list[str]:
    garbage = Garbage()
    trainer = make_trainer(
        strategy="synthetic_gradients" if devices > 1 else "auto",
        devices=devices,
        callbacks=[make(), garbage],
        max_steps=STEPS,
        max_epochs=-1,
    )
    trainer.fit(module or Classifier(), data or loader(samples=16 * STEPS))
    return garbage.found


RUNS: dict[str, Callable[[], SyntheticGradients]] = {
    "by default": SyntheticGradients,
    "linear": lambda: SyntheticGradients(predictor=LinearPredictor()),
    "local loss": lambda: SyntheticGradients(predictor=LocalLoss()),
    "exact gradients": lambda: SyntheticGradients(exact_every=2, correction=0.5),
    "a share of the true gradient": lambda: SyntheticGradients(mix=0.5),
    "two steps of delay": lambda: SyntheticGradients(delay=2),
    "a guard that couples": lambda: SyntheticGradients(guard=AlignmentGuard(fallback="couple", patience=1)),
    "synthetic inputs": lambda: SyntheticGradients(inputs=SyntheticInputs()),
    "random updates": lambda: SyntheticGradients(update_probability=0.5),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_leaves_no_garbage(name: str) -> None:
    assert not Counter(left_by(1, RUNS[name]))


@pytest.mark.parametrize("name", RUNS)
def test_nor_does_it_in_several_processes(name: str) -> None:
    for found in run_ranks(2, lambda: left_by(2, RUNS[name])):
        assert not Counter(found)


@pytest.mark.parametrize(
    ("devices", "settings"),
    [(1, ThroughTime(auxiliary=0.1)), (2, ThroughTime(auxiliary=0.1)), (1, ThroughTime(trace_decay=0.5))],
)
def test_nor_does_it_at_boundaries_in_time(devices: int, settings: ThroughTime) -> None:
    def make() -> SyntheticGradients:
        predictor = LinearPredictor(conditional=False, normalize="none")
        return SyntheticGradients(predictor=predictor, through_time=settings)

    def work() -> list[str]:
        module = TwoStages()
        if settings.trace_decay:  # for boundaries in time alone
            module.cut = nn.Identity()
        return left_by(devices, make, module, Chunks(sequences(4), CHUNK, sequence_length=LENGTH))

    for found in run_ranks(2, work) if devices == 2 else [work()]:
        assert not Counter(found)
