"""What a step has held is let go of at its end, not when Python next looks for cycles."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sg import ThroughTime
from tests.models import Classifier, loader
from tests.ranks import run_ranks
from tests.recurrent_models import TwoStages
from tests.watched import CALLBACKS, Make, chunks, in_time, train_watched

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


def left_by(devices: int, make: Make, module: pl.LightningModule | None = None, data: Any = None) -> list[str]:
    garbage = Garbage()
    train_watched(garbage, devices, make, module or Classifier(), data or loader(samples=16 * STEPS), STEPS)
    return garbage.found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.smoke] if name == "by default" else []) for name in CALLBACKS]
)
def test_a_step_leaves_no_garbage(name: str) -> None:
    assert not Counter(left_by(1, CALLBACKS[name]))


@pytest.mark.parametrize("name", CALLBACKS)
def test_nor_does_it_in_several_processes(name: str) -> None:
    for found in run_ranks(2, lambda: left_by(2, CALLBACKS[name])):
        assert not Counter(found)


@pytest.mark.parametrize(
    ("devices", "settings"),
    [(1, ThroughTime(auxiliary=0.1)), (2, ThroughTime(auxiliary=0.1)), (1, ThroughTime(trace_decay=0.5))],
)
def test_nor_does_it_at_boundaries_in_time(devices: int, settings: ThroughTime) -> None:
    def work() -> list[str]:
        module = TwoStages()
        if settings.trace_decay:  # for boundaries in time alone
            module.cut = nn.Identity()
        return left_by(devices, lambda: in_time(settings), module, chunks())

    for found in run_ranks(2, work) if devices == 2 else [work()]:
        assert not Counter(found)
